"""The OpenAI-compatible endpoint. It holds no state: any number of them may stand before one engine."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from deploy.asgi import EventStream, RequestGuard, request_id
from deploy.engine_client import EngineClient, Readiness, RouterLost, generate_all
from deploy.errors import INTERNAL_ERROR, ApiError, answer_api_error, answer_http_error, invalid_body
from deploy.openai_types import ChatCompletionRequest, CompletionRequest, ignored_fields
from deploy.reply import Reply, server_sent, to_json
from deploy.responses import ChatShape, CompletionShape, Shape, Vocabulary
from router.request import Request, RequestOutput

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
READY_TIMEOUT_S = 5.0

Body = TypeVar("Body", bound=BaseModel)


class Tokenizer(Vocabulary, Protocol):
    """What the ingress needs of router.tokenizer.Tokenizer. Used from any thread."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, /) -> list[int]: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], /, *, template_kwargs: Mapping[str, Any]
    ) -> list[int]:
        """Raises ValueError for messages that the model's template refuses."""
        ...


def build_ingress(
    *, client: EngineClient, tokenizer: Tokenizer, model_name: str, max_model_len: int
) -> FastAPI:
    """The endpoint as an ASGI application. max_model_len: tokens of prompt and answer together."""
    ingress = Ingress(client, tokenizer=tokenizer, model_name=model_name, max_model_len=max_model_len)
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_api_route("/v1/chat/completions", ingress.chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", ingress.completions, methods=["POST"])
    app.add_api_route("/v1/models", ingress.models)
    app.add_api_route("/v1/models/{name:path}", ingress.model)
    app.add_api_route("/health", ingress.health)
    app.add_api_route("/ready", ingress.ready)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_middleware(RequestGuard, max_body_bytes=MAX_BODY_BYTES)
    return app


class Ingress:
    """The routes."""

    def __init__(
        self, client: EngineClient, *, tokenizer: Tokenizer, model_name: str, max_model_len: int
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._max_model_len = max_model_len
        self._created = int(time.time())

    async def chat_completions(self, http: HttpRequest) -> Response:
        body = _parse(ChatCompletionRequest, await http.body())
        self._check_model(body.model)
        prompt = await self._encode_chat(body)
        self._check_prompt(prompt, param="messages", token_limit=body.token_limit)
        return await self._answer(body, [prompt], ChatShape(self._tokenizer))

    async def completions(self, http: HttpRequest) -> Response:
        body = _parse(CompletionRequest, await http.body())
        self._check_model(body.model)
        prompts = await asyncio.to_thread(self._encode, body.prompt)
        for prompt in prompts:
            self._check_prompt(prompt, param="prompt", token_limit=body.token_limit)
        return await self._answer(body, prompts, CompletionShape(self._tokenizer))

    async def models(self) -> Response:
        return _json_response({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return _json_response(self._model())

    async def health(self) -> Response:
        """This process is alive; says nothing about the engine."""
        return _json_response({"status": "ok"})

    async def ready(self) -> Response:
        """Whether a request would be served now, for load balancers; and why not, for people."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                state = await self._client.ready()
        except RouterLost as error:
            state = Readiness(ready=False, reason=str(error))
        except TimeoutError:
            state = Readiness(ready=False, reason=f"the router did not answer within {READY_TIMEOUT_S} s")
        report = {"ready": state.ready, "reason": state.reason, "detail": state.detail}
        return _json_response(report, status=200 if state.ready else 503)

    async def _answer(
        self, body: ChatCompletionRequest | CompletionRequest, prompts: list[list[int]], shape: Shape
    ) -> Response:
        reply_id = f"{shape.id_prefix}-{uuid4().hex}"
        requests = _requests(body, prompts, reply_id)
        reply = Reply(
            shape,
            reply_id=reply_id,
            created=int(time.time()),
            model=self._model_name,
            prompt_tokens=sum(map(len, prompts)),
            num_choices=len(requests),
            logprobs=requests[0].params.logprobs is not None,
            include_usage=body.include_usage,
        )
        outputs = generate_all(self._client, requests)
        if body.stream:
            return EventStream(_events(reply, outputs))
        async with aclosing(outputs):
            async for index, output in outputs:
                reply.add(index, output)
        return Response(reply.whole(), media_type="application/json")

    async def _encode_chat(self, body: ChatCompletionRequest) -> list[int]:
        messages = [message.for_template() for message in body.messages]
        try:  # in a thread: a long prompt must not hold up everybody's streams
            return await asyncio.to_thread(
                self._tokenizer.encode_chat, messages, template_kwargs=body.chat_template_kwargs
            )
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [self._tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            message = f"The model {name[:200]!r} does not exist; this server has {self._model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_prompt(self, prompt: list[int], *, param: str, token_limit: int | None) -> None:
        if not prompt:
            raise ApiError(400, "The prompt is empty.", param=param)
        if min(prompt) < 0 or max(prompt) >= self._tokenizer.vocab_size:
            message = f"The prompt has a token id outside the vocabulary of {self._tokenizer.vocab_size}."
            raise ApiError(400, message, param=param)
        wanted = len(prompt) + (token_limit or 1)
        if wanted > self._max_model_len:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._max_model_len} tokens, but {wanted} were asked for: "
                f"{len(prompt)} in the prompt and {wanted - len(prompt)} to generate.",
                param=param,
                code="context_length_exceeded",
            )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "sparkmoe",
            "max_model_len": self._max_model_len,
        }


def _parse(kind: type[Body], sent: bytes) -> Body:
    try:
        body = kind.model_validate_json(sent)
    except ValidationError as error:
        raise invalid_body(error, sent) from error
    if ignored := sorted(set(ignored_fields(body))):
        logger.warning("%s: ignored fields: %.500s", request_id.get(), ", ".join(ignored))
    return body


def _requests(
    body: ChatCompletionRequest | CompletionRequest, prompts: list[list[int]], reply_id: str
) -> list[Request]:
    """n requests for each prompt; their places are the choices' indices."""
    try:
        params = [body.sampling(choice) for choice in range(body.n)]
    except ValueError as error:  # its message begins with the field: "top_p=2 must be ..."
        raise ApiError(400, str(error), param=str(error).partition("=")[0]) from error
    return [
        Request(f"{reply_id}-{place * body.n + choice}", tuple(prompt), params[choice])
        for place, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]


async def _events(
    reply: Reply, outputs: AsyncGenerator[tuple[int, RequestOutput], None]
) -> AsyncGenerator[bytes, None]:
    """The reply, output by output. An error before the first event is raised; after it, it is the last event."""
    started = False
    async with aclosing(outputs):
        try:
            async for index, output in outputs:
                if event := reply.event(index, output):
                    yield event
                    started = True
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, ApiError):
                logger.exception("%s: the stream failed", request_id.get())
                error = INTERNAL_ERROR
            yield server_sent(error.body().decode()).encode()
            return
    yield reply.ending()


def _json_response(content: Mapping[str, Any], *, status: int = 200) -> Response:
    return Response(to_json(content), status_code=status, media_type="application/json")
