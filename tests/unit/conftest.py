"""Fixtures that the ingress's tests share (see fake_engine), and the fabric's (see fake_shard)."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.support import fake_shard
from tests.support.fake_engine import FakeEngine, http_client, ingress_over, says


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=[fake_shard.over_tcp, fake_shard.over_unix])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> fake_shard.Reach:
    """Run the test over TCP, and once more over the Unix sockets of its shards; returns which."""
    monkeypatch.setattr(fake_shard, "reach", request.param)
    return request.param


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(ingress_over(FakeEngine(says("Hello")))) as client:
        yield client
