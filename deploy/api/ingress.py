"""Ingress: the handlers of the OpenAI-compatible endpoint.

They hold no state: any number of ingresses may serve one engine.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from fastapi import Request as HttpRequest
from fastapi import Response

from deploy.api.checks import check_count, check_scores, parse, too_long, too_many_scores
from deploy.api.engine_client import (
    EngineClient,
    Limits,
    RouterLost,
    generate_all,
    no_router,
    too_many,
)
from deploy.api.grammars.pool import GrammarPool, GrammarRefused
from deploy.api.grammars.wanted import WantedGrammar
from deploy.api.http.access_log import current_entry, note_outputs
from deploy.api.http.asgi import EventStream
from deploy.api.http.errors import INTERNAL_ERROR, ApiError
from deploy.api.http.keys import is_from_here
from deploy.api.http.quota import current_use
from deploy.api.openai.chat_shape import ChatShape
from deploy.api.openai.chats import ChatFormat
from deploy.api.openai.completion_shape import CompletionShape
from deploy.api.openai.limits import MAX_SCORES, num_scores
from deploy.api.openai.reply import Reply, server_sent, to_json
from deploy.api.openai.requests import ChatCompletionRequest, CompletionRequest
from deploy.api.openai.responses import Shape, Vocabulary
from deploy.api.openai.tokenize import DetokenizeRequest, TokenizeRequest, TokenizerLike, tokenize
from deploy.api.readiness import CachedReadiness
from deploy.version import version
from router.request import QueueFull, Request, RequestOutput, SamplingParams
from router.text.too_long import TooLong

logger = logging.getLogger(__name__)


class Tokenizer(Vocabulary, TokenizerLike, Protocol):
    """The part of router.text.tokenizer.Tokenizer that the ingress needs."""

    @property
    def chat_template(self) -> str: ...


@dataclass(frozen=True)
class ServedModel:
    """The model that the ingress serves. defaults: the sampling parameters that a request does not give."""

    name: str
    vocab_size: int
    defaults: SamplingParams


@dataclass(frozen=True)
class _EngineInputs:
    """A body prepared for the engine.

    prompts: as token ids. shape: that of the answer. wanted: the grammar that every choice has to follow, None
    for none.
    """

    prompts: list[list[int]]
    shape: Shape
    wanted: WantedGrammar | None


class Ingress:
    """The handlers of all routes.

    timeout_s: the limit of every request, None for none. has_keys: whether requests need a key.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        tokenizer: Tokenizer,
        model: ServedModel,
        grammars: GrammarPool,
        timeout_s: float | None,
        has_keys: bool,
    ) -> None:
        self._client = client
        self._readiness = CachedReadiness(client)
        self._has_keys = has_keys
        self._tokenizer = tokenizer
        self._model = model
        self._grammars = grammars
        self._timeout_s = timeout_s
        self._chats = ChatFormat(tokenizer.chat_template)
        self._created = int(time.time())

    async def chat_completions(self, http: HttpRequest) -> Response:
        """Answer a chat."""
        self._check_room()
        body = parse(ChatCompletionRequest, await http.body(), self._limits())
        self._check_model(body.model)
        limits = self._limits()
        check_count(body.n, limits, param="n")
        # In a thread, because a long prompt must not hold up everybody's streams.
        inputs = await asyncio.to_thread(self._chat_inputs, body, limits)
        return await self._answer(body, inputs)

    async def completions(self, http: HttpRequest) -> Response:
        """Continue a text."""
        self._check_room()
        body = parse(CompletionRequest, await http.body(), self._limits())
        self._check_model(body.model)
        limits = self._limits()
        check_count(len(body.prompt) * body.n, limits, param="prompt" if len(body.prompt) > 1 else "n")
        inputs = await asyncio.to_thread(self._completion_inputs, body, limits)
        return await self._answer(body, inputs)

    async def tokenize(self, http: HttpRequest) -> Response:
        """Return the tokens of a text or a chat."""
        body = parse(TokenizeRequest, await http.body(), self._limits())
        self._check_model(body.model or self._model.name)
        most = self._limits().max_model_len
        try:
            answer = await asyncio.to_thread(
                lambda: to_json(tokenize(body, self._tokenizer, max_model_len=most))
            )
        except TooLong as error:
            raise too_long(error, param="messages" if body.prompt is None else "prompt") from error
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        return Response(answer, media_type="application/json")

    async def detokenize(self, http: HttpRequest) -> Response:
        """Return the text of tokens, including that of special ones."""
        body = parse(DetokenizeRequest, await http.body(), self._limits())
        self._check_model(body.model or self._model.name)
        most = self._limits().max_model_len
        if len(body.tokens) > most:
            raise too_long(TooLong.in_tokens(len(body.tokens), max_tokens=most), param="tokens")
        self._check_ids(body.tokens, param="tokens")
        prompt = await asyncio.to_thread(self._tokenizer.decode_long, body.tokens, skip_special_tokens=False)
        return _json_response({"prompt": prompt})

    async def models(self) -> Response:
        """List the one model that is served."""
        return _json_response({"object": "list", "data": [self._description()]})

    async def model(self, name: str) -> Response:
        """Describe the model that is served."""
        self._check_model(name)
        return _json_response(self._description())

    async def version(self) -> Response:
        """Return the version of sparkmoe."""
        return _json_response({"version": version()})

    async def health(self) -> Response:
        """Answer as long as this process lives. Says nothing about the engine."""
        return _json_response({"status": "ok"})

    async def ready(self, http: HttpRequest) -> Response:
        """Tell load balancers whether a request would be served now, and people why not.

        What processes there are is told to owners of a key only, and without keys to this machine only.
        """
        state = await self._readiness.get()
        may_know = current_entry().key is not None or (not self._has_keys and is_from_here(http.scope))
        detail = {"ingress_pid": os.getpid(), **state.detail} if may_know else {}
        report = {"ready": state.ready, "reason": state.reason, "detail": detail}
        return _json_response(report, status=200 if state.ready else 503)

    async def _answer(
        self, body: ChatCompletionRequest | CompletionRequest, inputs: _EngineInputs
    ) -> Response:
        reply_id = f"{inputs.shape.id_prefix}-{uuid4().hex}"
        grammar = await self._grammar(inputs.wanted)
        requests = _requests(
            body, inputs.prompts, reply_id, self._model.defaults, grammar=grammar, timeout_s=self._timeout_s
        )
        prompt_tokens = [len(prompt) for prompt in inputs.prompts]
        reply = Reply(
            inputs.shape,
            reply_id=reply_id,
            created=int(time.time()),
            model=self._model.name,
            prompt_tokens=prompt_tokens,
            n=body.n,
            logprobs=requests[0].params.logprobs is not None,
            include_usage=body.include_usage,
        )
        check_scores(requests)
        if (use := current_use.get()) is not None:
            use.check_priority(body.priority)
            use.grow_to(len(requests))
            use.spend(sum(prompt_tokens))
        outputs = generate_all(self._client, requests)
        outputs = note_outputs(outputs, completion_id=reply_id, prompt_tokens=sum(prompt_tokens))
        if body.stream:
            return EventStream(_events(reply, outputs), event_of=_error_event)
        params = requests[0].params
        held = 0
        async with aclosing(outputs):
            async for index, output in outputs:
                held += num_scores(len(output.logprobs), params.logprobs)
                if held > MAX_SCORES:
                    raise too_many_scores(held, param="logprobs", instead="stream the answer")
                reply.add(index, output)
        # With logprobs it may be megabytes, which are made in a thread.
        scored = params.logprobs is not None or params.prompt_logprobs is not None
        whole = await asyncio.to_thread(reply.whole) if scored else reply.whole()
        return Response(whole, media_type="application/json")

    async def _grammar(self, wanted: WantedGrammar | None) -> str | None:
        """Return a grammar that a child process has compiled."""
        if wanted is None:
            return None
        try:
            return await self._grammars.compile(wanted)
        except GrammarRefused as error:
            raise ApiError(400, f"{wanted.field}: {error}", param=wanted.field) from error
        except QueueFull as error:
            raise too_many(error) from error

    def _chat_inputs(self, body: ChatCompletionRequest, limits: Limits) -> _EngineInputs:
        messages = [message.for_template() for message in body.messages]
        tools = [tool.for_template() for tool in body.offered]
        try:
            text = self._tokenizer.render_chat(
                messages, tools=tools, template_kwargs=body.chat_template_kwargs
            )
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        try:
            prompt = self._tokenizer.encode_rendered(text, at_most=limits.max_model_len)
        except TooLong as error:
            raise too_long(error, param="messages") from error
        self._check_prompt(prompt, limits, param="messages", token_limit=body.token_limit)
        self._check_ids(body.logit_bias, param="logit_bias")
        shape = ChatShape(
            self._tokenizer,
            new_reader=self._chats.new_reader(body, prompt=text),
            calls_finish=not body.names_tool,
        )
        return _EngineInputs([prompt], shape, self._chats.wanted_grammar(body))

    def _completion_inputs(self, body: CompletionRequest, limits: Limits) -> _EngineInputs:
        most = limits.max_model_len
        try:
            prompts = [
                self._tokenizer.encode(p, at_most=most) if isinstance(p, str) else p for p in body.prompt
            ]
        except TooLong as error:
            raise too_long(error, param="prompt") from error
        for prompt in prompts:
            self._check_prompt(prompt, limits, param="prompt", token_limit=body.token_limit)
        self._check_ids(body.logit_bias, param="logit_bias")
        shape = CompletionShape(self._tokenizer, body, prompts=prompts)
        return _EngineInputs(prompts, shape, body.output_constraint())

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            message = f"The model {name[:200]!r} does not exist; this server has {self._model.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_prompt(
        self, prompt: list[int], limits: Limits, *, param: str, token_limit: int | None
    ) -> None:
        """Raise ApiError for a prompt that the engine cannot run; the engine does not look at the ids again."""
        if not prompt:
            raise ApiError(400, "The prompt is empty.", param=param)
        self._check_ids(prompt, param=param)
        wanted = len(prompt) + (1 if token_limit is None else token_limit)
        if wanted > limits.max_model_len:
            raise ApiError(
                400,
                f"This model's maximum context length is {limits.max_model_len} tokens, but {wanted} were asked for: "
                f"{len(prompt)} in the prompt and {wanted - len(prompt)} to generate.",
                param=param,
                code="context_length_exceeded",
            )

    def _check_ids(self, tokens: Collection[int], *, param: str) -> None:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._model.vocab_size):
            message = f"A token id is outside the vocabulary of {self._model.vocab_size}."
            raise ApiError(400, message, param=param)

    def _check_room(self) -> None:
        """Raise ApiError if the engine is full or lost.

        Handlers call it first, because a server that is full must not spend its time on refusals.
        """
        try:
            self._client.check_room()
        except QueueFull as error:
            raise too_many(error) from error
        except RouterLost as error:
            raise no_router(error) from error

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


def _requests(
    body: ChatCompletionRequest | CompletionRequest,
    prompts: list[list[int]],
    reply_id: str,
    defaults: SamplingParams,
    *,
    grammar: str | None,
    timeout_s: float | None,
) -> list[Request]:
    """Return n requests for each prompt; a request's place in the list is the index of its choice."""
    try:
        params = [body.sampling(choice, defaults, grammar=grammar) for choice in range(body.n)]
    except ValueError as error:  # its message begins with the field: "top_p=2 must be ..."
        raise ApiError(400, str(error), param=str(error).partition("=")[0]) from error
    return [
        Request(
            f"{reply_id}-{place * body.n + choice}",
            tuple(prompt),
            params[choice],
            priority=body.priority,
            timeout_s=timeout_s,
        )
        for place, prompt in enumerate(prompts)
        for choice in range(body.n)
    ]


async def _events(
    reply: Reply, outputs: AsyncGenerator[tuple[int, RequestOutput], None]
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a reply, output by output."""
    async with aclosing(outputs):
        async for index, output in outputs:
            if event := reply.event(index, output):
                yield event
    yield reply.ending()


def _error_event(error: Exception) -> bytes:
    """Return the last event of a stream that fails after it has begun."""
    if not isinstance(error, ApiError):
        logger.error("the stream failed", exc_info=error)
        error = INTERNAL_ERROR
    return server_sent(error.body().decode()).encode()


def _json_response(content: Mapping[str, Any], *, status: int = 200) -> Response:
    return Response(to_json(content), status_code=status, media_type="application/json")
