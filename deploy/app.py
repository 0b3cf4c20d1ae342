"""`import_path: deploy.app:build`: the Serve application that a config file names."""

import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deploy import logs
from deploy.api.http.keys import read_keys
from deploy.api.ingress import ServedModel
from deploy.api.routes import build_ingress
from deploy.config import AppArgs
from deploy.engine.client import HandleClient
from deploy.engine.replica import RouterReplica
from router.model_config import check_family, read_config, shape_of

logger = logging.getLogger(__name__)

NO_LIMIT = 100_000
"""Requests in flight that Serve allows: the queue, and its limit, are the engine's."""


AFTER_DRAIN_S = 2.0
"""For what is left to do once the last request has ended. The ingress goes first: the router is idle when it has left."""


class IngressReplica:
    """Answers HTTP. Serve calls `__serve_build_asgi_app__` after the constructor, in the replica's event loop."""

    def __init__(self, router: DeploymentHandle, args: AppArgs) -> None:
        logs.configure(args.api.log_format)
        self._args = args
        self._client = HandleClient(router)
        self._client.start()

    async def __del__(self) -> None:  # Serve awaits it when it stops a replica in order
        await self._client.stop()

    def __serve_build_asgi_app__(self) -> FastAPI:
        # transformers, for which `build` need not wait
        from router.text.tokenizer import Tokenizer, sampling_defaults

        path, name = self._args.model.path, self._args.model.name
        model = ServedModel(name, shape_of(read_config(path)).vocab_size, sampling_defaults(path))
        logger.info("unless a request says otherwise: %s", model.defaults)
        return build_ingress(
            client=self._client, tokenizer=Tokenizer(path), model=model, config=self._args.api
        )


def build(args: AppArgs) -> Application:
    """Refuses, with a sentence, a model that cannot be served and keys that cannot be read before any replica starts."""
    check_family(args.model.path)
    if args.api.keys_file is not None:
        read_keys(args.api.keys_file)
    ingress_class: Any = serve.ingress()(IngressReplica)
    grace_s = args.router.drain_s + AFTER_DRAIN_S
    router = _deployment(RouterReplica, name="Router", grace_s=grace_s)
    ingress = _deployment(ingress_class, name="Ingress", grace_s=grace_s)
    return ingress.bind(router.bind(args), args)


def _deployment(replica: type, *, name: str, grace_s: float) -> Any:
    """grace_s: for requests that still run when a replica is stopped, by whomever."""
    return serve.deployment(
        replica,
        name=name,
        max_ongoing_requests=NO_LIMIT,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
