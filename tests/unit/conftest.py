"""What the ingress's tests share: see fake_engine."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.unit.fake_engine import FakeEngine, http_client, ingress_over, says


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(ingress_over(FakeEngine(says("Hello")))) as client:
        yield client
