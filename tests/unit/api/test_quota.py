"""What one key may use: requests at a time, tokens a minute, priority; and that it is the same however it is used."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.api.config import ApiConfig
from deploy.api.http import keys
from deploy.api.http.errors import ApiError
from deploy.api.http.quota import Account, Quota, TokenBucket, Use
from tests.support.fake_engine import COMPLETIONS, FakeEngine, error_of, http_client, ingress_over, says

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 500)), max_size=30), rate=st.integers(1, 1000)
)
def test_nobody_gets_more_than_a_minutes_tokens_and_what_time_brings(
    steps: list[tuple[float, int]], rate: int
) -> None:
    """Whoever waits as long as told may go on; what is spent beyond that is at most what was asked for last."""
    bucket, now, spent, last = TokenBucket(rate, now=0.0), 0.0, 0, 0
    for pause_s, tokens in steps:
        now += pause_s
        if not bucket.wait_s(now=now):
            bucket.spend(tokens, now=now)
            spent, last = spent + tokens, tokens
        assert spent - last <= rate * (1 + now / 60) + 1e-6
    now += bucket.wait_s(now=now) + 1e-6
    assert bucket.wait_s(now=now) < 1e-3


def test_tokens_come_back_with_time() -> None:
    clock = Clock()
    account = Account(Quota(tokens_per_minute=60), clock=clock)
    account.begin(1)
    account.spend(90)
    with pytest.raises(ApiError) as refused:
        account.begin(1)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 31)
    assert "60 tokens a minute" in refused.value.message
    clock.now += 31
    account.begin(1)
    clock.now += 3600  # an hour of silence saves no more than a minute's tokens
    account.spend(61)
    with pytest.raises(ApiError):
        account.begin(1)
    account.allow(Quota(tokens_per_minute=60, requests=2))  # what was used counts on
    with pytest.raises(ApiError, match="2 requests at a time; 2 run"):
        account.begin(1)
    account.allow(Quota())
    account.begin(100)


def test_requests_at_a_time_are_counted_until_they_end() -> None:
    account = Account(Quota(requests=3), clock=Clock())
    first, second = Use(account), Use(account)
    with pytest.raises(ApiError, match="may have 3 requests at a time; 2 run and 2 more came"):
        second.grow_to(3)
    second.grow_to(2)
    assert account.running == 3
    with pytest.raises(ApiError) as refused:
        Use(account)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    second.end()
    first.end()
    assert account.running == 0


@pytest.fixture(autouse=True)
def _look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "CHECK_S", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text(
        "few k1 requests=2\nslow k2 tokens_per_minute=60\nfirst k3 priority=yes\nplain k4\n"
    )
    return tmp_path / "keys"


async def post(http: httpx.AsyncClient, key: str, **fields: Any) -> httpx.Response:
    body = {"model": "demo", "prompt": "x", **fields}
    return await http.post(COMPLETIONS, json=body, headers={"authorization": f"Bearer {key}"})


async def test_one_key_cannot_take_all(file: Path) -> None:
    engine = FakeEngine(lambda request: [None] if request.prompt == (ord("w"),) else says("Hello"))
    async with http_client(ingress_over(engine, config=ApiConfig(keys_file=file))) as http:
        waiting = asyncio.create_task(post(http, "k1", prompt="w"))
        while not engine.running:
            await asyncio.sleep(0)
        assert (await post(http, "k1")).status_code == 200
        refused = await post(http, "k1", n=2)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert (await post(http, "k4", n=20)).status_code == 200
        file.write_text(file.read_text().replace("requests=2", "requests=1"))
        assert (await post(http, "k1")).status_code == 429, "the one that runs counts on"
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (await post(http, "k1")).status_code == 200
        assert (await post(http, "k1", stream=True)).status_code == 200
        assert (await post(http, "k1")).status_code == 200


async def test_tokens_of_prompts_and_answers_count(file: Path) -> None:
    engine = FakeEngine(says("Hello"))  # five tokens
    async with http_client(ingress_over(engine, config=ApiConfig(keys_file=file))) as http:
        for _ in range(3):
            assert (await post(http, "k2", prompt="x" * 20, stream=True)).status_code == 200
        refused = await post(http, "k2")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 16, "15 tokens of 60 a minute are owed"
        assert (await post(http, "k4", prompt="x" * 20)).status_code == 200


async def test_priority_is_for_keys_that_have_it(file: Path) -> None:
    engine = FakeEngine(says("Hello"))
    async with http_client(ingress_over(engine, config=ApiConfig(keys_file=file))) as http:
        assert (await post(http, "k3", priority=-5)).status_code == 200
        assert engine.requests[-1].priority == -5
        refused = await post(http, "k4", priority=-5)
        assert refused.status_code == 403
        assert error_of(refused)["param"] == "priority"
        assert (await post(http, "k4", priority=0)).status_code == 200
    async with http_client(ingress_over(engine)) as http:  # without keys everybody may
        assert (await post(http, "any", priority=-5)).status_code == 200
