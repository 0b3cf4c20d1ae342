"""The endpoint does what its schema says, whatever it is sent."""

from pathlib import Path

import schemathesis
from hypothesis import settings

from deploy.api.config import ApiConfig
from tests.support import fuzz
from tests.support.fake_engine import FakeEngine, ingress_over, says

APP = ingress_over(FakeEngine(says("Hello")))

schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(max_examples=20, suppress_health_check=fuzz.SLOW)
def test_whatever_is_asked_is_answered_as_the_schema_says(case: schemathesis.Case) -> None:
    fuzz.check(case, timeout_s=5)


def test_the_schema_has_the_bodies_that_are_parsed() -> None:
    described = APP.openapi()
    chat = described["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["required"] == ["model", "messages"]
    assert chat["properties"]["model"] == {"type": "string", "enum": ["demo"]}
    assert {"type": "null"} in chat["properties"]["n"]["anyOf"], "null is the same as absent"
    assert {"type": "string", "maxLength": 1024} in chat["properties"]["stop"]["anyOf"]
    assert {*described["paths"]["/v1/chat/completions"]["post"]["responses"]} == {
        *("200", "400", "404", "408", "413", "429", "500", "503")
    }
    assert "422" not in described["paths"]["/v1/models/{name}"]["get"]["responses"]


def test_the_schema_says_what_asks_for_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sesame")
    described = ingress_over(FakeEngine([]), config=ApiConfig(keys_file=tmp_path / "keys")).openapi()
    asking = {
        path
        for path, methods in described["paths"].items()
        for operation in methods.values()
        if operation.get("security") and "401" in operation["responses"]
    }
    assert described["paths"].keys() - asking == {"/health", "/ready", "/version"}
    assert described["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
