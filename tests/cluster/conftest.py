"""Fixtures of the cluster's tests: one server for all tests that do not break it for good."""

from collections.abc import Iterator

import pytest

from tests.support.server import Server, serving


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    settings = ["fabric.dead_after_s=3", "fabric.slow_after_s=1", "router.ready_within_s=4"]
    settings += ["router.max_requests=32", "router.max_queue=4"]
    settings += ["api.body_timeout_s=3", "api.max_unread_tokens=100"]
    with serving(*settings, environment={"RAY_metrics_report_interval_ms": "1000"}) as running:
        yield running


@pytest.fixture(autouse=True)
def _start_from_ready(request: pytest.FixtureRequest) -> None:
    """Wait until the shared server is whole, whatever the test before did to it."""
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_ready()
