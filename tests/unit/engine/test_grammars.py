"""Grammars in the engine: what one costs, at a token or over a long answer, only its own request pays."""

import threading
from dataclasses import replace

import pytest

from router.request import Request, SamplingParams
from router.sampling import grammar
from router.sampling.grammar import Grammars, Guide
from tests.support.grammar_attacks import AMBIGUOUS, POWER
from tests.support.in_process import greedy, in_process
from tests.support.places import DEMO_MODEL

PROMPT = tuple(range(1, 20))
GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


def follow(of: str, text: bytes) -> Guide:
    """Return the guide after a text, a token for each byte, or after the first that it could not go on with."""
    grammars = Grammars("byte", vocab_size=262, eos=frozenset())
    guide = grammars.guide(of)
    for token in text:
        grammars.start_masks([guide])
        allowed = guide.allowed()
        assert allowed[token // 32] >> (token % 32) & 1 or guide.error
        grammars.accept([(guide, token)])
        if guide.error:
            break
    return guide


@pytest.mark.parametrize(
    ("of", "message"),
    [(AMBIGUOUS, "items; max is 300"), (POWER, "too many expressions")],
    ids=["ambiguous", "power"],
)
def test_a_grammar_beyond_its_limits_says_so(of: str, message: str) -> None:
    error = follow(of, b"a" * 2_000).error
    assert message in error
    assert len(error) < 310


def test_states_of_a_long_answer_are_bounded() -> None:
    """An automaton that grows with every letter: 100 MB after a long answer."""
    letters = bytes(97 + (n * n // 7 + n) % 2 for n in range(20_000))
    assert "too many states" in follow("start: /(.|\\n)*a(.|\\n){2000}/", letters).error


def test_masks_of_a_step_are_those_computed_alone() -> None:
    grammars = Grammars("byte", vocab_size=262, eos=frozenset({1}))
    texts = [
        grammar.of_regex("[a-f]+"),
        grammar.of_json_schema({"type": "integer"}),
        grammar.of_choice(["x", "yes"]),
    ]
    guides = [grammars.guide(text) for text in texts]
    alone = [grammars.guide(text).matcher.compute_bitmask() for text in texts]
    grammars.start_masks(guides)
    grammars.start_masks(guides)  # a step that failed is planned again
    assert [guide.allowed().tobytes() for guide in guides] == alone


def test_masks_are_computed_while_the_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In other threads than the engine's: they wait for the forward to begin, which must not wait for them."""
    forward = threading.Event()
    threads = set()
    compute = Grammars._masks

    def masks(self: Grammars, matchers: list) -> object:
        threads.add(threading.current_thread().name)
        assert forward.wait(30), "the forward waits for masks"
        return compute(self, matchers)

    monkeypatch.setattr(Grammars, "_masks", masks)
    with in_process(DEMO_MODEL, num_shards=1) as server:
        run = server.engine._forward

        def noted(plan: object) -> object:
            forward.set()
            return run(plan)  # type: ignore[arg-type]

        monkeypatch.setattr(server.engine, "_forward", noted)
        params = replace(GREEDY, grammar=grammar.of_choice(["yes"]))
        answers = server.run([Request("one", PROMPT, params)])
        assert answers["one"].text == "yes"
    assert threads
    assert "engine" not in threads


def test_a_costly_grammar_ends_its_own_request_alone() -> None:
    """As a fault of the request, which nobody shall send again."""
    with in_process(DEMO_MODEL, num_shards=1) as server:
        alone = server.run([greedy("alone", PROMPT, num_tokens=100)])["alone"].tokens
    faults = {}
    with in_process(DEMO_MODEL, num_shards=1) as server:
        take = server._take

        def noted(outputs: list) -> None:
            faults.update({output.id: output.at_fault for output in outputs if output.finish})
            take(outputs)

        server.engine._on_outputs = noted
        costly = [
            Request(f"costly-{n}", PROMPT, replace(GREEDY, grammar=AMBIGUOUS, max_tokens=500))
            for n in range(4)
        ]
        good = Request("good", PROMPT, replace(GREEDY, grammar=grammar.of_regex("(yes|no)( maybe){3}!")))
        answers = server.run(
            [*costly, good, greedy("free", PROMPT, num_tokens=100)], failing=[one.id for one in costly]
        )
    assert answers["free"].tokens == alone
    assert answers["good"].text.endswith(" maybe maybe maybe!")
    assert all("the grammar cannot go on" in (answers[one.id].error or "") for one in costly)
    assert faults == {one.id: True for one in costly} | {"good": False, "free": False}
