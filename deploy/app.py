"""The Serve application that a config file names with `import_path: deploy.app:build`."""

import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deploy import logs
from deploy.api.grammars.pool import GrammarPool
from deploy.api.http.keys import read_keys
from deploy.api.ingress import ServedModel
from deploy.api.routes import build_ingress
from deploy.config import AppArgs
from deploy.engine.client import HandleClient
from deploy.engine.replica import RouterReplica
from deploy.ray_private import unread_of
from router.model_config import check_family, read_config, shape_of

logger = logging.getLogger(__name__)

NO_LIMIT = 100_000
"""The number of requests in flight that Serve allows: the engine has the queue, and limits it."""

AFTER_DRAIN_S = 2.0
"""Seconds that a replica may take to stop after its last request has ended.

The ingress stops first: the router is idle once the ingress has left it.
"""


class IngressReplica:
    """The Serve deployment `Ingress`, which answers HTTP and hands requests to the router."""

    def __init__(self, router: DeploymentHandle, args: AppArgs) -> None:
        logs.configure(args.api.log_format)
        self._args = args
        self._client = HandleClient(router, max_unread=args.api.max_unread_tokens)
        self._client.start()

    async def __del__(self) -> None:  # Serve awaits this when it stops a replica in order
        await self._client.stop()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the endpoint.

        Serve finds this method by its name: see BUILD_ASGI_APP in deploy.ray_private.
        """
        # Imported here, because it imports transformers, for which `build` need not wait.
        from router.text.tokenizer import Tokenizer, sampling_defaults

        path, name = self._args.model.path, self._args.model.name
        model = ServedModel(name, shape_of(read_config(path)).vocab_size, sampling_defaults(path))
        logger.info("unless a request says otherwise: %s", model.defaults)
        api = self._args.api
        tokenizer = Tokenizer(path, special_tokens_in_content=api.special_tokens_in_content)
        grammars = GrammarPool(tokenizer.to_json(), vocab_size=model.vocab_size, served=api.user_grammars)
        return build_ingress(
            client=self._client,
            tokenizer=tokenizer,
            model=model,
            grammars=grammars,
            config=api,
            unread_of=unread_of,
        )


def build(args: AppArgs) -> Application:
    """Return the application of two deployments, Router and Ingress.

    Raises ValueError, before any replica starts, for a model that cannot be served and for API keys that
    cannot be read.
    """
    check_family(args.model.path)
    if args.api.keys_file is not None:
        read_keys(args.api.keys_file)
    ingress_class: Any = serve.ingress()(IngressReplica)
    grace_s = args.router.drain_s + AFTER_DRAIN_S
    router = _deployment(RouterReplica, name="Router", grace_s=grace_s)
    ingress = _deployment(ingress_class, name="Ingress", grace_s=grace_s)
    return ingress.bind(router.bind(args), args)


def _deployment(replica: type, *, name: str, grace_s: float) -> Any:
    """Return the deployment of a class.

    grace_s: how long requests that run may go on when a replica is stopped.
    """
    return serve.deployment(
        replica,
        name=name,
        max_ongoing_requests=NO_LIMIT,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
