"""Time in the Fleet's tests is virtual: leases and pauses are as long as in production, and pass at once."""

from typing import Any

import pytest

from tests.support.virtual_time import VirtualTimeLoop


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualTimeLoop}
