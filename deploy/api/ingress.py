"""The OpenAI-compatible endpoint. It holds no state: any number of them may stand before one engine."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from fastapi import Request as HttpRequest
from fastapi import Response
from pydantic import BaseModel, ValidationError

from deploy.api.access_log import counted
from deploy.api.asgi import EventStream
from deploy.api.engine_client import EngineClient, Limits, Readiness, RouterLost, generate_all, no_router
from deploy.api.errors import INTERNAL_ERROR, ApiError, invalid_body
from deploy.api.reply import Reply, server_sent, to_json
from deploy.api.requests import ChatCompletionRequest, CompletionRequest, ignored_fields
from deploy.api.responses import ChatShape, CompletionShape, Shape, Vocabulary
from deploy.api.tokenize import DetokenizeRequest, TokenizeRequest, Tokens, tokenized
from deploy.version import version
from router.request import Request, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 5.0

Body = TypeVar("Body", bound=BaseModel)


class Tokenizer(Vocabulary, Tokens, Protocol):
    """What the ingress needs of router.tokenizer.Tokenizer."""


@dataclass(frozen=True)
class Served:
    """What the ingress must know of the model. defaults: of sampling, for what a request does not say."""

    name: str
    vocab_size: int
    defaults: SamplingParams


class Ingress:
    """The routes. timeout_s: of every request, None for as long as it takes."""

    def __init__(
        self, client: EngineClient, *, tokenizer: Tokenizer, model: Served, timeout_s: float | None
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._model = model
        self._timeout_s = timeout_s
        self._created = int(time.time())

    async def chat_completions(self, http: HttpRequest) -> Response:
        body = _parse(ChatCompletionRequest, await http.body())
        self._check_model(body.model)
        limits = self._limits()
        _check_count(body.n, limits, param="n")
        # In a thread: a long prompt must not hold up everybody's streams.
        prompt = await asyncio.to_thread(self._encode_chat, body, limits)
        return await self._answer(body, [prompt], ChatShape(self._tokenizer))

    async def completions(self, http: HttpRequest) -> Response:
        body = _parse(CompletionRequest, await http.body())
        self._check_model(body.model)
        limits = self._limits()
        _check_count(len(body.prompt) * body.n, limits, param="prompt" if len(body.prompt) > 1 else "n")
        prompts = await asyncio.to_thread(self._encode, body, limits)
        return await self._answer(body, prompts, CompletionShape(self._tokenizer))

    async def tokenize(self, http: HttpRequest) -> Response:
        body = _parse(TokenizeRequest, await http.body())
        self._check_model(body.model or self._model.name)
        most = self._limits().max_model_len
        try:
            answer = await asyncio.to_thread(tokenized, body, self._tokenizer, max_model_len=most)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        return _json_response(answer)

    async def detokenize(self, http: HttpRequest) -> Response:
        """The text of tokens, special ones among them."""
        body = _parse(DetokenizeRequest, await http.body())
        self._check_model(body.model or self._model.name)
        self._check_ids(body.tokens, param="tokens")
        prompt = await asyncio.to_thread(self._tokenizer.decode, body.tokens, skip_special_tokens=False)
        return _json_response({"prompt": prompt})

    async def models(self) -> Response:
        return _json_response({"object": "list", "data": [self._description()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return _json_response(self._description())

    async def version(self) -> Response:
        return _json_response({"version": version()})

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
        detail = {"ingress_pid": os.getpid(), **state.detail}
        report = {"ready": state.ready, "reason": state.reason, "detail": detail}
        return _json_response(report, status=200 if state.ready else 503)

    async def _answer(
        self, body: ChatCompletionRequest | CompletionRequest, prompts: list[list[int]], shape: Shape
    ) -> Response:
        reply_id = f"{shape.id_prefix}-{uuid4().hex}"
        requests = _requests(body, prompts, reply_id, self._model.defaults, timeout_s=self._timeout_s)
        prompt_tokens = sum(map(len, prompts))
        reply = Reply(
            shape,
            reply_id=reply_id,
            created=int(time.time()),
            model=self._model.name,
            prompt_tokens=prompt_tokens,
            num_choices=len(requests),
            logprobs=requests[0].params.logprobs is not None,
            include_usage=body.include_usage,
        )
        outputs = generate_all(self._client, requests)
        outputs = counted(outputs, completion_id=reply_id, prompt_tokens=prompt_tokens)
        if body.stream:
            return EventStream(_events(reply, outputs), event_of=_error_event)
        async with aclosing(outputs):
            async for index, output in outputs:
                reply.add(index, output)
        return Response(reply.whole(), media_type="application/json")

    def _encode_chat(self, body: ChatCompletionRequest, limits: Limits) -> list[int]:
        messages = [message.for_template() for message in body.messages]
        try:
            prompt = self._tokenizer.encode_chat(messages, template_kwargs=body.chat_template_kwargs)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        self._check_prompt(prompt, limits, param="messages", token_limit=body.token_limit)
        return prompt

    def _encode(self, body: CompletionRequest, limits: Limits) -> list[list[int]]:
        prompts = [self._tokenizer.encode(p) if isinstance(p, str) else p for p in body.prompt]
        for prompt in prompts:
            self._check_prompt(prompt, limits, param="prompt", token_limit=body.token_limit)
        return prompts

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            message = f"The model {name[:200]!r} does not exist; this server has {self._model.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_prompt(
        self, prompt: list[int], limits: Limits, *, param: str, token_limit: int | None
    ) -> None:
        """Whatever passes, the engine can run: it does not look at the ids again."""
        if not prompt:
            raise ApiError(400, "The prompt is empty.", param=param)
        self._check_ids(prompt, param=param)
        wanted = len(prompt) + (token_limit or 1)
        if wanted > limits.max_model_len:
            raise ApiError(
                400,
                f"This model's maximum context length is {limits.max_model_len} tokens, but {wanted} were asked for: "
                f"{len(prompt)} in the prompt and {wanted - len(prompt)} to generate.",
                param=param,
                code="context_length_exceeded",
            )

    def _check_ids(self, tokens: list[int], *, param: str) -> None:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._model.vocab_size):
            message = f"A token id is outside the vocabulary of {self._model.vocab_size}."
            raise ApiError(400, message, param=param)

    def _limits(self) -> Limits:
        try:
            return self._client.limits()
        except RouterLost as error:
            raise no_router(error) from error

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "sparkmoe",
            "max_model_len": self._limits().max_model_len,
        }


def _check_count(num_choices: int, limits: Limits, *, param: str) -> None:
    if num_choices > limits.max_requests:
        message = f"{num_choices} answers were asked for; this server holds at most {limits.max_requests} at a time."
        raise ApiError(400, message, param=param)


def _parse(kind: type[Body], sent: bytes) -> Body:
    try:
        body = kind.model_validate_json(sent)
    except ValidationError as error:
        raise invalid_body(error, sent) from error
    if ignored := sorted(set(ignored_fields(body))):
        logger.warning("ignored fields: %.500s", ", ".join(ignored))
    return body


def _requests(
    body: ChatCompletionRequest | CompletionRequest,
    prompts: list[list[int]],
    reply_id: str,
    defaults: SamplingParams,
    *,
    timeout_s: float | None,
) -> list[Request]:
    """n requests for each prompt; their places are the choices' indices."""
    try:
        params = [body.sampling(choice, defaults) for choice in range(body.n)]
    except ValueError as error:  # its message begins with the field: "top_p=2 must be ..."
        raise ApiError(400, str(error), param=str(error).partition("=")[0]) from error
    return [
        Request(f"{reply_id}-{place * body.n + choice}", tuple(prompt), params[choice], timeout_s=timeout_s)
        for place, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]


async def _events(
    reply: Reply, outputs: AsyncGenerator[tuple[int, RequestOutput], None]
) -> AsyncGenerator[bytes, None]:
    """The reply, output by output."""
    async with aclosing(outputs):
        async for index, output in outputs:
            if event := reply.event(index, output):
                yield event
    yield reply.ending()


def _error_event(error: Exception) -> bytes:
    """What a stream that has begun tells of its failure."""
    if not isinstance(error, ApiError):
        logger.error("the stream failed", exc_info=error)
        error = INTERNAL_ERROR
    return server_sent(error.body().decode()).encode()


def _json_response(content: Mapping[str, Any], *, status: int = 200) -> Response:
    return Response(to_json(content), status_code=status, media_type="application/json")
