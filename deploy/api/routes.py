"""The endpoint as an ASGI application: its routes, and the middleware before them."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from deploy.api.config import ApiConfig
from deploy.api.engine_client import EngineClient
from deploy.api.grammars.pool import GrammarPool
from deploy.api.http.access_log import RequestLog
from deploy.api.http.asgi import RequestGuard
from deploy.api.http.errors import ApiError, answer_api_error, answer_http_error
from deploy.api.http.keys import ApiKeys, KeyGuard
from deploy.api.http.pacing import UnreadOf, paced
from deploy.api.ingress import Ingress, ServedModel, Tokenizer
from deploy.api.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.api.openai.responses import Completion
from deploy.api.openai.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from deploy.api.schema import (
    DescribedApp,
    Health,
    ModelDescription,
    ModelList,
    Operation,
    ReadyReport,
    Version,
)

CHAT = Operation(
    "create_chat_completion",
    "Answer a chat",
    {200: Completion},
    errors=(400, 404, 429, 503),
    body=ChatCompletionRequest,
    example={"messages": [{"role": "user", "content": "Write a haiku."}], "max_tokens": 32},
    streams=True,
)
COMPLETION = Operation(
    "create_completion",
    "Continue a text",
    {200: Completion},
    errors=(400, 404, 429, 503),
    body=CompletionRequest,
    example={"prompt": "def add(a, b):", "max_tokens": 32},
    streams=True,
)
TOKENIZE = Operation(
    "tokenize",
    "The tokens of a text or a chat",
    {200: TokenizeResponse},
    errors=(400, 404, 503),
    body=TokenizeRequest,
    example={"prompt": "def add(a, b):"},
)
DETOKENIZE = Operation(
    "detokenize",
    "The text of tokens",
    {200: DetokenizeResponse},
    errors=(400, 404),
    body=DetokenizeRequest,
    example={"tokens": [1, 2, 3]},
)
MODELS = Operation("list_models", "The model that is served, in a list", {200: ModelList}, errors=(503,))
MODEL = Operation("get_model", "The model that is served", {200: ModelDescription}, errors=(404, 503))
VERSION = Operation("get_version", "Which version this is", {200: Version})
HEALTH = Operation("get_health", "Whether this process answers", {200: Health})
READY = Operation(
    "get_readiness", "Whether a request would be served now", {200: ReadyReport, 503: ReadyReport}
)


class PacedApp(DescribedApp):
    """The endpoint, which sends no faster than its clients read."""

    def __init__(self, *, model: str, keys: bool, unread_of: UnreadOf | None) -> None:
        super().__init__(model=model, keys=keys)
        self._unread_of = unread_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not a middleware: FastAPI puts one of its own before ours, and only here is `send` the server's.
        if scope["type"] == "http":
            send = paced(send, unread_of=self._unread_of)
        await super().__call__(scope, receive, send)


def build_ingress(
    *,
    client: EngineClient,
    tokenizer: Tokenizer,
    model: ServedModel,
    grammars: GrammarPool,
    config: ApiConfig,
    unread_of: UnreadOf | None = None,
) -> FastAPI:
    """Return the endpoint as a FastAPI application.

    unread_of: for a server whose `send` does not wait for the client. Raises ValueError for a file of API
    keys that cannot be read.
    """
    app = PacedApp(model=model.name, keys=config.keys_file is not None, unread_of=unread_of)
    ingress = Ingress(
        client,
        tokenizer=tokenizer,
        model=model,
        grammars=grammars,
        timeout_s=config.request_timeout_s,
        has_keys=config.keys_file is not None,
    )
    _add_routes(app, ingress)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    # The middleware that is added last is the outermost.
    app.add_middleware(
        RequestGuard, max_body_bytes=config.max_body_mib * 2**20, body_timeout_s=config.body_timeout_s
    )
    if config.keys_file is not None:
        app.add_middleware(KeyGuard, keys=ApiKeys(config.keys_file))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestLog, lines=config.access_log)
    return app


def _add_routes(app: DescribedApp, ingress: Ingress) -> None:
    app.add_operation("POST", "/v1/chat/completions", ingress.chat_completions, CHAT)
    app.add_operation("POST", "/v1/completions", ingress.completions, COMPLETION)
    app.add_operation("GET", "/v1/models", ingress.models, MODELS)
    app.add_operation("GET", "/v1/models/{name:path}", ingress.model, MODEL)
    app.add_operation("POST", "/tokenize", ingress.tokenize, TOKENIZE)
    app.add_operation("POST", "/detokenize", ingress.detokenize, DETOKENIZE)
    app.add_operation("GET", "/version", ingress.version, VERSION)
    app.add_operation("GET", "/health", ingress.health, HEALTH)
    app.add_operation("GET", "/ready", ingress.ready, READY)
