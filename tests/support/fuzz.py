"""Requests that schemathesis makes up from the endpoint's own schema, for a fake engine and for a real one."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
"""The checks of an answer. Whether a refusal was right is for other tests: a body can be of the schema and its
prompt be too long."""

MAX_TOKENS = 4

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
"""The health checks that fail when a machine is busy."""


def check(case: schemathesis.Case, *, url: str | None = None, timeout_s: float) -> None:
    """Ask for a short answer to a case: it must come in time and be one that the schema has.

    url: None for an app.
    """
    case.body = shortened(case.body)
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=timeout_s)


def shortened(body: Any) -> Any:
    """Return a body whose answer has an end: max_tokens of MAX_TOKENS unless it is nonsense anyway."""
    if not isinstance(body, dict):
        return body
    limits = {
        name: min(body[name], MAX_TOKENS) if isinstance(body.get(name), int) else body.get(name, MAX_TOKENS)
        for name in ("max_tokens", "max_completion_tokens")
    }
    return body | {name: MAX_TOKENS if limit is None else limit for name, limit in limits.items()}
