"""Grammars are compiled in child processes: what one costs, only its own client sees."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.api.config import ApiConfig
from deploy.api.grammars import child, pool
from deploy.api.grammars.bounds import MAX_BYTES, check_lark
from deploy.api.grammars.pool import GrammarPool, GrammarRefused
from deploy.api.grammars.wanted import UserGrammars, WantedGrammar
from deploy.api.openai.messages import OfferedFunction
from deploy.api.reading.tool_formats import format_of
from router.request import QueueFull, RequestOutput
from router.sampling import grammar
from tests.support.fake_engine import CHAT, HELLO, FakeEngine, error_of, http_client, ingress_over, says
from tests.support.grammar_attacks import BEYOND_BOUNDS, WITHIN_BOUNDS, conjunction
from tests.support.json_schemas import random_schema
from tests.support.places import ROOT

pytestmark = pytest.mark.anyio

MIB = 2**20


def new_pool(served: UserGrammars = "all") -> GrammarPool:
    return GrammarPool(child.BYTES, vocab_size=262, served=served)


@pytest.fixture
async def grammars() -> AsyncIterator[GrammarPool]:
    fresh = new_pool()
    yield fresh
    fresh.close()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children() -> dict[int, str]:
    """The child processes for grammars of this process that live, by id; their states."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and child.__name__ in (stat.parent / "cmdline").read_text():
                found[int(stat.parent.name)] = state
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


async def refusal(grammars: GrammarPool, fields: dict[str, Any], engine: FakeEngine) -> str:
    async with http_client(ingress_over(engine, grammars=grammars)) as http:
        response = await http.post(CHAT, json=HELLO | fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == next(iter(fields))
    assert error["message"].startswith(f"{error['param']}: ")
    assert "panic" not in error["message"]
    assert len(error["message"]) < 400
    assert not engine.requests, "the engine never sees it"
    return error["message"]


@pytest.mark.parametrize("attack", BEYOND_BOUNDS)
async def test_what_is_too_large_is_not_even_tried(attack: str) -> None:
    """A count names the limit, before any native code has seen the grammar."""
    fields, message = BEYOND_BOUNDS[attack]
    unstarted = new_pool()
    assert message in await refusal(unstarted, fields, FakeEngine(says("x")))
    assert not unstarted.started


@pytest.mark.parametrize("attack", WITHIN_BOUNDS)
async def test_what_is_too_costly_ends_a_child_at_most(grammars: GrammarPool, attack: str) -> None:
    await refusal(grammars, WITHIN_BOUNDS[attack], FakeEngine(says("x")))


@pytest.mark.parametrize("attack", [conjunction(1_000), conjunction(200)], ids=["1000 terms", "200 terms"])
async def test_without_counts_the_child_still_protects_us(
    grammars: GrammarPool, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.api.grammars.wanted.check_lark", lambda text: None)
    assert "too much memory" in await refusal(grammars, {"guided_grammar": attack}, FakeEngine(says("x")))


async def test_others_go_on_under_attack(grammars: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of the dearest grammars at once; our memory stays as it is, and answers that are structured come."""
    monkeypatch.setattr("deploy.api.grammars.wanted.check_lark", lambda text: None)
    monkeypatch.setattr(pool, "WAIT_S", 120)
    await grammars.compile(WantedGrammar("x", "regex", "a"))
    before = resident()
    engine = FakeEngine(says("1"))
    async with http_client(ingress_over(engine, grammars=grammars)) as http:

        async def ask(fields: dict[str, Any]) -> int:
            return (await http.post(CHAT, json=HELLO | fields, timeout=60)).status_code

        attacks = [asyncio.create_task(ask({"guided_grammar": conjunction(200 + n)})) for n in range(9)]
        known = [await ask({"guided_regex": "a"}) for _ in range(20)]
        assert known == [200] * 20
        assert not all(attack.done() for attack in attacks), "what is known waits for none of them"
        assert await ask({"guided_regex": "[ab]"}) == 200, "what is new waits for those that have begun"
        assert await asyncio.gather(*attacks) == [400] * 9
    assert resident() - before < 20 * MIB


async def test_a_deadline_is_kept(grammars: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    others = children().keys()
    monkeypatch.setattr(pool, "NUM_CHILDREN", 1)
    await grammars.compile(WantedGrammar("x", "regex", "a"))
    (pid,) = children().keys() - others
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(pool, "DEADLINE_S", 0.2)
    with pytest.raises(GrammarRefused, match="takes more than"):
        await grammars.compile(WantedGrammar("x", "regex", "b"))
    monkeypatch.setattr(pool, "DEADLINE_S", 60)
    assert await grammars.compile(WantedGrammar("x", "regex", "c")), "by a new child"
    assert pid not in children()


async def test_a_killed_child_is_replaced_and_no_grammar_blamed(grammars: GrammarPool) -> None:
    others = children().keys()
    for regex in "abcdef":
        assert await grammars.compile(WantedGrammar("x", "regex", regex))
    ours = children().keys() - others
    assert ours
    for pid in ours:
        os.kill(pid, signal.SIGKILL)
    for regex in "ghijkl":
        assert await grammars.compile(WantedGrammar("x", "regex", regex))
    assert not ours & children().keys()


async def test_children_end_with_their_parent() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from tests.unit.api.test_grammars import *\n"
        "ours = new_pool()\n"
        "asyncio.run(ours.compile(WantedGrammar('x', 'regex', 'a')))\n"
        "print(*children(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60
    )
    pids = [int(pid) for pid in ended.stdout.split()]
    assert pids
    async with asyncio.timeout(30):
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            await asyncio.sleep(0.01)


async def test_a_closed_pool_leaves_nothing() -> None:
    ours = new_pool()
    before = set(children())
    await ours.compile(WantedGrammar("x", "regex", "a"))
    ours.close()
    async with asyncio.timeout(30):
        while set(children()) - before:
            await asyncio.sleep(0.01)


async def test_what_is_known_costs_nothing(grammars: GrammarPool) -> None:
    """Good or refused, it is answered although no child lives to be asked."""
    good, bad = WantedGrammar("x", "regex", "a"), WantedGrammar("y", "regex", "(")
    made = await grammars.compile(good)
    with pytest.raises(GrammarRefused):
        await grammars.compile(bad)
    grammars.close()
    assert await grammars.compile(good) == made
    with pytest.raises(GrammarRefused, match="unclosed group"):
        await grammars.compile(WantedGrammar("z", "regex", "("))


async def test_what_is_known_is_bounded(grammars: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CACHE_BYTES", 10_000)
    for number in range(40):
        await grammars.compile(WantedGrammar("x", "choice", [f"{number:0500}"]))
    assert grammars.known_bytes <= 10_000


async def test_too_many_at_once_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_WAITING", 0)
    crowded = new_pool()
    with pytest.raises(QueueFull):
        await crowded.compile(WantedGrammar("x", "regex", "a"))
    async with http_client(ingress_over(FakeEngine(says("x")), grammars=crowded)) as http:
        response = await http.post(CHAT, json=HELLO | {"guided_regex": "a"})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


async def test_who_waits_too_long_is_told_to_come_again(
    grammars: GrammarPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "WAIT_S", 0.01)  # a child takes longer to start
    with pytest.raises(QueueFull):
        await grammars.compile(WantedGrammar("x", "regex", "a"))


@pytest.mark.parametrize(
    ("served", "refused"),
    [
        ("all", ()),
        ("json_only", ("guided_regex", "guided_grammar", "structured_outputs")),
        ("off", ("guided_regex", "guided_grammar", "guided_json", "guided_choice", "structured_outputs")),
    ],
)
async def test_some_grammars_can_be_switched_off(served: UserGrammars, refused: tuple[str, ...]) -> None:
    asked: dict[str, Any] = {
        "response_format": {"type": "json_object"},
        "guided_regex": "a",
        "guided_grammar": 'start: "a"',
        "guided_json": {"type": "integer"},
        "guided_choice": ["a"],
        "structured_outputs": {"regex": "a"},
    }
    ours = new_pool(ApiConfig(user_grammars=served).user_grammars)
    async with http_client(ingress_over(FakeEngine(says("x")), grammars=ours)) as http:
        for field, value in asked.items():
            response = await http.post(CHAT, json=HELLO | {field: value})
            assert response.status_code == (400 if field in refused else 200), field
            if field in refused:
                assert f"switched off on this server (api.user_grammars is {served})" in response.text
    ours.close()


async def test_ordinary_schemas_give_the_grammar_they_gave(grammars: GrammarPool) -> None:
    for seed in range(100):
        schema = random_schema(random.Random(seed))
        made = await grammars.compile(WantedGrammar("x", "json", schema))
        assert made == grammar.of_json_schema(schema)
        assert made == await grammars.compile(WantedGrammar("x", "json", json.dumps(schema)))


async def test_bounds_do_not_count_what_is_quoted() -> None:
    check_lark(
        'start: "&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&" /&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&&/ // & & &'
    )
    many = ", ".join(f'"p{n}": {{"type": "string"}}' for n in range(600))
    check_lark(f'start: @other\nother: %json {{"properties": {{{many}}}}}')


@pytest.mark.parametrize(
    "unit",
    ['"', '\\\\"', '"\\\\"', "/", "a", " ", "a ", "a [", "a {", "[", "\\n ", "//", "\\\\", "(?:"],
    ids=repr,
)
async def test_bounds_take_time_in_proportion(unit: str) -> None:
    """Whatever is repeated: a text that is read again from each of its characters takes minutes."""
    with contextlib.suppress(ValueError):
        check_lark('start: "' + unit * (MAX_BYTES // len(unit)))
    with contextlib.suppress(ValueError):
        check_lark(unit * (MAX_BYTES // len(unit)))


async def test_a_costly_grammar_is_the_clients_fault() -> None:
    """Nobody shall send it again, so it is no 503."""
    failed = RequestOutput(
        "", finish="error", error="the grammar cannot go on: too many items", at_fault=True
    )
    async with http_client(ingress_over(FakeEngine([failed]))) as http:
        response = await http.post(CHAT, json=HELLO)
        streamed = await http.post(CHAT, json=HELLO | {"stream": True})
    assert response.status_code == 400
    assert "the grammar cannot go on: too many items" in error_of(response)["message"]
    assert "invalid_request_error" in streamed.text


def test_definitions_are_not_repeated_without_end() -> None:
    """GLM's format repeats them for each property."""
    glm = format_of("<arg_key>")
    assert glm is not None
    properties = {f"p{n}": {"type": "integer"} for n in range(1_000)}
    function = OfferedFunction(
        name="f", parameters={"$defs": {"big": {"const": "a" * 10_000}}, "properties": properties}
    )
    with pytest.raises(ValueError, match=r"tools' schemas would take .* at most 131072 are taken"):
        glm.call_rules([function])
