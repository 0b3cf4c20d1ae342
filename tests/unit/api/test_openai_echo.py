"""Prompts that come back, with their logprobs: what evaluation harnesses ask of /v1/completions."""

from typing import Any

import pytest

from router.request import Request, RequestOutput, TokenLogprob
from tests.support.fake_engine import FakeEngine, Step, client_of

pytestmark = pytest.mark.anyio


def scored(token: int) -> TokenLogprob:
    return TokenLogprob(token, -1.0, ((0, -0.5), (token, -1.0)))


def engine_of(text: bytes) -> FakeEngine:
    """Return an engine that answers a token at a time, with the prompt's scores in the first output."""

    def script(request: Request) -> list[Step]:
        prompt = tuple(map(scored, request.prompt[1:])) if request.params.prompt_logprobs is not None else ()
        if request.params.max_tokens == 0:
            return [RequestOutput("", prompt_logprobs=prompt, finish="length")]
        outputs: list[Step] = []
        for place, token in enumerate(text):
            logprobs = (scored(token),) if request.params.logprobs is not None else ()
            last = place == len(text) - 1
            outputs.append(
                RequestOutput(
                    "",
                    chr(token),
                    (token,),
                    logprobs,
                    prompt_logprobs=() if place else prompt,
                    finish="length" if last else None,
                )
            )
        return outputs

    return FakeEngine(script)


async def choices_of(engine: FakeEngine, *, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    """Return the choices as plain JSON, streamed ones joined."""
    completion: Any = await client_of(engine).completions.create(model="demo", stream=stream, **fields)
    if not stream:
        return [choice.model_dump() for choice in completion.choices]
    joined: dict[int, dict[str, Any]] = {}
    async for chunk in completion:
        (choice,) = [choice.model_dump() for choice in chunk.choices]
        if whole := joined.get(choice["index"]):
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"][name] += values
        else:
            joined[choice["index"]] = choice
    return [joined[index] for index in sorted(joined)]


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@both
async def test_echo_puts_the_prompt_before_the_text(stream: bool) -> None:
    choices = await choices_of(engine_of(b"cd"), prompt="ab", echo=True, stream=stream)
    assert [(c["text"], c["logprobs"], c["finish_reason"]) for c in choices] == [("abcd", None, "length")]


@both
async def test_echo_with_logprobs_begins_with_the_prompts(stream: bool) -> None:
    (choice,) = await choices_of(engine_of(b"cd"), prompt="ab", echo=True, logprobs=2, stream=stream)
    assert choice["text"] == "abcd"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "d"],
        "token_logprobs": [None, -1.0, -1.0, -1.0],
        "top_logprobs": [None, *({"\0": -0.5, letter: -1.0} for letter in "bcd")],
        "text_offset": [0, 1, 2, 3],
    }


@both
async def test_a_prompt_is_scored_without_an_answer(stream: bool) -> None:
    engine = engine_of(b"never")
    (choice,) = await choices_of(engine, prompt=[97, 98], echo=True, logprobs=1, max_tokens=0, stream=stream)
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert choice["logprobs"]["top_logprobs"] == [None, {"\0": -0.5, "b": -1.0}]
    params = engine.requests[0].params
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (0, 1, 1)


@both
async def test_echo_alone_without_an_answer(stream: bool) -> None:
    engine = engine_of(b"never")
    (choice,) = await choices_of(engine, prompt="ab", echo=True, max_tokens=0, stream=stream)
    assert (choice["text"], choice["logprobs"]) == ("ab", None)
    assert engine.requests[0].params.prompt_logprobs == 0  # what lets the engine generate nothing


@both
async def test_every_choice_of_a_batch_echoes_its_own_prompt(stream: bool) -> None:
    prompts = ["ab", "xyz"]
    choices = await choices_of(engine_of(b"!"), prompt=prompts, n=2, echo=True, logprobs=0, stream=stream)
    assert [choice["text"] for choice in choices] == ["ab!", "ab!", "xyz!", "xyz!"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2]] * 2 + [[0, 1, 2, 3]] * 2
    assert choices[0]["logprobs"]["top_logprobs"][1] == {"b": -1.0}


async def test_prompt_logprobs_are_vllms() -> None:
    (choice,) = await choices_of(
        engine_of(b"c"), prompt="ab", stream=False, extra_body={"prompt_logprobs": 1}
    )
    assert choice["text"] == "c"
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
            "0": {"logprob": -0.5, "rank": 1, "decoded_token": "\0"},
        },
    ]
