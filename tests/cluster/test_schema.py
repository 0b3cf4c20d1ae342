"""A running server answers whatever it is asked in time and as its schema says, and goes on serving."""

import httpx
import pytest
import schemathesis
from hypothesis import settings

from tests.support import fuzz
from tests.support.fake_engine import FakeEngine, ingress_over
from tests.support.server import Server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ANSWER_S = 30
DESCRIBED = ingress_over(FakeEngine([])).openapi()
"""The schema of the endpoint; pytest wants to know the operations before there is a server."""

schema = schemathesis.openapi.from_dict(DESCRIBED)


def test_the_server_has_that_schema(server: Server) -> None:
    assert httpx.get(f"{server.url}/openapi.json").json() == DESCRIBED


@schema.parametrize()
@settings(max_examples=30, suppress_health_check=fuzz.SLOW)
def test_whatever_is_asked_is_answered_as_the_schema_says(case: schemathesis.Case, server: Server) -> None:
    fuzz.check(case, url=server.url, timeout_s=ANSWER_S)


def test_and_a_request_is_served_afterwards(server: Server) -> None:
    answer = server.client().completions.create(model="demo", prompt="def add(a, b):", max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1
    assert server.detail()["num_running"] == 0
