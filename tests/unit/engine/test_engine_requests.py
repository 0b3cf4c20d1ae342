"""Tests of what a request may ask of its answer, on the demo model."""

import gc
import json
import weakref
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLMatcher

from router.config import RouterConfig
from router.request import Request, SamplingParams
from router.text.tokenizer import Tokenizer
from tests.support.in_process import Joined, in_process
from tests.support.places import DEMO_MODEL

TOKENIZER = Tokenizer(DEMO_MODEL)
PROMPT = tuple(TOKENIZER.encode("def add(a, b):\n"))
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def answer(params: SamplingParams, prompt: tuple[int, ...] = PROMPT, **options: Any) -> Joined:
    return answers(Request("one", prompt, params, **options))["one"]


def answers(*requests: Request, config: RouterConfig | None = None) -> dict[str, Joined]:
    with in_process(DEMO_MODEL, num_shards=1, config=config) as server:
        return server.run(requests)


@pytest.fixture(scope="module")
def plain() -> Joined:
    return answer(replace(GREEDY, ignore_eos=True))


def test_a_bias_makes_a_token_certain_or_impossible(plain: Joined) -> None:
    likely = plain.tokens[0]
    assert answer(replace(GREEDY, logit_bias=((likely, -100),))).tokens[0] != likely
    assert answer(replace(GREEDY, logit_bias=((7, 100),), max_tokens=3)).tokens == [7, 7, 7]


def test_logprobs_are_the_models_own_whatever_rules_there_are(plain: Joined) -> None:
    scored = answer(replace(GREEDY, logit_bias=((7, 100),), max_tokens=1, logprobs=1)).logprobs[0]
    assert scored.token == 7
    assert scored.top[0][0] == plain.tokens[0]
    assert scored.logprob < scored.top[0][1]


@pytest.mark.parametrize("ends", ["token", "string"])
def test_min_tokens_come_before_any_end(plain: Joined, ends: str) -> None:
    """What would end the text after two tokens may not come, or does not count, before the sixth."""
    if ends == "token":
        params = replace(GREEDY, stop_token_ids=(plain.tokens[1],))
    else:
        params = replace(GREEDY, stop=(TOKENIZER.decode(plain.tokens[1:2]).strip() or " ",))
    early, late = answer(params), answer(replace(params, min_tokens=5))
    assert len(early.tokens) <= 2
    assert len(late.tokens) > 5


def test_why_it_stopped(plain: Joined) -> None:
    stop = TOKENIZER.decode(plain.tokens[:6])[-4:]
    by_string = answer(replace(GREEDY, stop=("nowhere", stop)))
    assert (by_string.finish, by_string.stop_reason) == ("stop", stop)
    by_token = answer(replace(GREEDY, stop_token_ids=(plain.tokens[2],)))
    assert (by_token.finish, by_token.stop_reason) == ("stop", plain.tokens[2])
    assert (plain.finish, plain.stop_reason) == ("length", None)


def test_no_token_at_all_but_the_prompts_scores() -> None:
    scored = answer(replace(GREEDY, max_tokens=0, prompt_logprobs=2))
    assert (scored.tokens, scored.text, scored.finish) == ([], "", "length")
    assert tuple(one.token for one in scored.prompt_logprobs) == PROMPT[1:]
    assert all(len(one.top) == 2 and one.top[0][1] >= one.logprob for one in scored.prompt_logprobs)


def test_a_time_limit_leaves_what_there_is() -> None:
    """Of a running request and of one that waits for it; a third has time enough."""
    endless = SamplingParams(temperature=0, ignore_eos=True)
    ended = answers(
        Request("running", PROMPT, endless, timeout_s=0.3),
        Request("waiting", PROMPT, endless, timeout_s=0.0),
        Request("patient", PROMPT, replace(GREEDY, ignore_eos=True), timeout_s=60),
        config=RouterConfig(max_requests=1),
    )
    assert [one.finish for one in ended.values()] == ["timeout", "timeout", "length"]
    assert ended["running"].text == TOKENIZER.decode(ended["running"].tokens)
    assert not ended["waiting"].tokens


def test_how_much_of_a_prompt_was_known() -> None:
    prompt = PROMPT * 10
    with in_process(DEMO_MODEL, num_shards=1) as server:
        first = server.run([Request("first", prompt, GREEDY)])["first"]
        second = server.run([Request("second", prompt, GREEDY)])["second"]
    assert (first.num_cached, second.num_cached) == (0, (len(prompt) - 1) // 16 * 16)
    assert first.tokens == second.tokens


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_holds_whatever_the_model_wants(temperature: float, ignore_eos: bool) -> None:
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    params = SamplingParams(
        grammar=grammar, temperature=temperature, seed=1, max_tokens=200, ignore_eos=ignore_eos
    )
    one = answer(params)
    assert one.finish == "stop"
    person = json.loads(one.text)
    assert person.keys() == {"name", "age"}
    assert person["age"] >= 0


def test_grammars_and_free_texts_share_steps(plain: Joined) -> None:
    """And one that is put back goes on where it was."""
    yes = LLMatcher.grammar_from_regex("(yes|no)( maybe)*!")
    requests = [
        Request("free", PROMPT, replace(GREEDY, ignore_eos=True)),
        Request("yes", PROMPT, replace(GREEDY, grammar=yes, max_tokens=40)),
    ]
    ours = answers(*requests)
    assert ours["free"].tokens == plain.tokens
    assert ours["yes"].text.startswith(("yes", "no"))


def test_a_wrong_grammar_is_refused_before_it_is_queued() -> None:
    wrong = replace(GREEDY, grammar=LLMatcher.grammar_from_lark("start: nothing"))
    with (
        in_process(DEMO_MODEL, num_shards=1) as server,
        pytest.raises(ValueError, match=r"grammar: .*unknown name"),
    ):
        server.engine.prepare(Request("x", PROMPT, wrong))


@pytest.mark.parametrize("timeout_s", [None, 600.0])
def test_who_has_ended_is_forgotten(timeout_s: float | None) -> None:
    """Also before its time is up: a server that runs for months must not collect them."""
    with in_process(DEMO_MODEL, num_shards=1) as server:
        prepared = server.engine.prepare(Request("one", PROMPT, GREEDY, timeout_s=timeout_s))
        server.answers["one"] = Joined()
        server.engine.submit(prepared)
        trace = weakref.ref(prepared)
        del prepared
        server.run([])
        gc.collect()
        assert trace() is None
