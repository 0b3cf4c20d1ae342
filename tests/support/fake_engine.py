"""The surroundings of an ingress under test: a scripted engine and a tokenizer whose tokens are UTF-8 bytes."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai
from fastapi import FastAPI

from deploy.api.config import ApiConfig
from deploy.api.engine_client import EngineClient, Limits, Readiness, RouterLost
from deploy.api.grammars import child
from deploy.api.grammars.pool import GrammarPool
from deploy.api.ingress import ServedModel
from deploy.api.routes import build_ingress
from router.request import FinishReason, QueueFull, Request, RequestOutput, SamplingParams, TokenLogprob
from router.text.too_long import TooLong

LIMITS = Limits(max_model_len=64, max_requests=48)
MODEL = ServedModel("demo", vocab_size=256, defaults=SamplingParams(temperature=0.5, top_k=40))
PLAIN = ApiConfig()
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}

Step = RequestOutput | Exception | float | None
"""What an engine does next: put out, fail, pause for so many seconds, or (None) wait until it is cancelled."""


@dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer that renders a chat as <tools>[...]<role>content, calls in JSON behind the content, and
    `tail` at the end."""

    chat_template: str = ""
    tail: str = field(default="", kw_only=True)

    def encode(
        self, text: str, /, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]:
        num_bytes = len(text.encode())
        if at_most is not None and num_bytes > at_most:
            raise TooLong.in_tokens(num_bytes, max_tokens=at_most)
        return list(text.encode())

    encode_rendered = encode

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        if messages[-1]["content"] == "refuse":
            raise ValueError("the chat template failed: no")
        offered = f"<tools>{json.dumps(tools)}" if tools else ""
        return offered + "".join(map(_rendered, messages)) + self.tail

    def decode_long(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")

    def pieces(self, token_ids: Sequence[int], /) -> list[str]:
        return [f"<{token_id}>" for token_id in token_ids]

    def token_text(self, token_id: int, /) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int, /) -> bytes:
        return bytes([token_id])


def _rendered(message: Mapping[str, Any]) -> str:
    calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
    return f"<{message['role']}>{message['content']}{calls}"


class FakeEngine:
    """An engine that plays its script for every request. running: ids of the requests that hold a slot."""

    def __init__(self, script: Sequence[Step] | Callable[[Request], Sequence[Step]]) -> None:
        self._script = script if callable(script) else lambda request: script
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.readiness: Readiness | Exception = Readiness(ready=True, detail={"epoch": 3})
        self.reached: Limits | RouterLost = LIMITS
        self.full: QueueFull | None = None

    def limits(self) -> Limits:
        if isinstance(self.reached, RouterLost):
            raise self.reached
        return self.reached

    def check_room(self) -> None:
        self.limits()
        if self.full:
            raise self.full

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        self.running.add(request.id)
        try:
            for step in self._script(request):
                await asyncio.sleep(0)
                if step is None:
                    await asyncio.Event().wait()
                elif isinstance(step, int | float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield replace(step, id=request.id)
        finally:
            self.running.discard(request.id)

    async def ready(self) -> Readiness:
        if isinstance(self.readiness, Exception):
            raise self.readiness
        return self.readiness


def says(*texts: str, finish: FinishReason | None = "stop", logprobs: bool = False) -> list[Step]:
    """Return a script of outputs with these texts, a token for each byte; the last one finishes."""
    return [
        RequestOutput(
            id="",
            text=text,
            tokens=tuple(text.encode()),
            logprobs=tuple(TokenLogprob(t, -0.5, ((t, -0.5), (0, -2.0))) for t in text.encode() if logprobs),
            finish=finish if place == len(texts) else None,
        )
        for place, text in enumerate(texts, start=1)
    ]


_BYTES = ByteTokenizer()

GRAMMARS = GrammarPool(child.BYTES, vocab_size=262, served="all")
"""Of all tests of a process, which share its children."""


def ingress_over(
    engine: EngineClient,
    tokenizer: ByteTokenizer = _BYTES,
    *,
    config: ApiConfig = PLAIN,
    grammars: GrammarPool = GRAMMARS,
) -> FastAPI:
    """Return the real endpoint over an engine. It takes 40 ms to build."""
    return build_ingress(client=engine, tokenizer=tokenizer, model=MODEL, grammars=grammars, config=config)


def http_client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def client_of(engine: EngineClient, tokenizer: ByteTokenizer = _BYTES) -> openai.AsyncOpenAI:
    # Any: openai 3 wants httpx2's client, openai 2 httpx's; either works.
    over_asgi: Any = http_client(ingress_over(engine, tokenizer))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=over_asgi)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, after checking that it has OpenAI's shape."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return error
