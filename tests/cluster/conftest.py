"""One server for all tests that do not break it for good."""

from collections.abc import Iterator

import pytest

from tests.support.server import Server, serving


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with serving(
        "fabric.dead_after_s=3",
        "fabric.slow_after_s=1",
        "router.max_requests=32",
        "router.max_queue=4",
        "api.body_timeout_s=3",
        "api.max_unread_tokens=100",
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _start_from_ready(request: pytest.FixtureRequest) -> None:
    """A test that uses the shared server finds it whole, whatever the one before did to it."""
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_ready()
