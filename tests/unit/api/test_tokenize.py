"""/tokenize and /detokenize, and what else is asked of the endpoint beside completions."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from deploy import version
from deploy.api.engine_client import Limits
from deploy.api.openai.tokenize import TokenizeRequest, tokenize
from router.text.tokenizer import Tokenizer
from tests.support.fake_engine import HELLO, LIMITS, FakeEngine, error_of, http_client, ingress_over
from tests.support.places import DEMO_MODEL

pytestmark = pytest.mark.anyio


async def test_a_text_and_its_tokens(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "né"})).json()
    assert answer == {
        "count": 3,
        "max_model_len": LIMITS.max_model_len,
        "tokens": list("né".encode()),
        "token_strs": None,
    }
    back = await http.post("/detokenize", json={"model": "demo", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": "né"}


async def test_a_chat_is_tokenised_as_it_would_be_answered(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/tokenize", json=HELLO | {"return_token_strs": True})).json()
    assert bytes(answer["tokens"]) == b"<user>hello"
    assert answer["token_strs"] == [f"<{token}>" for token in answer["tokens"]]


async def test_tools_are_tokenised_as_the_template_writes_them() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    engine = FakeEngine([])
    engine.reached = Limits(max_model_len=200, max_requests=1)
    async with http_client(ingress_over(engine)) as http:
        answer = (await http.post("/tokenize", json=HELLO | {"tools": [tool]})).json()
    assert bytes(answer["tokens"]) == f"<tools>{json.dumps([tool])}<user>hello".encode()


def test_special_tokens_of_a_text_and_of_a_chat() -> None:
    tokenizer = Tokenizer(DEMO_MODEL)
    begin = tokenizer.token_text(0)
    tokenizer._fast.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])

    def tokens(**fields: Any) -> list[int]:
        return tokenize(TokenizeRequest(**fields), tokenizer, max_model_len=100)["tokens"]

    plain = tokens(prompt="a b", add_special_tokens=False)
    assert tokenizer.pieces(plain) == ["a", "Ġb"]
    assert tokens(prompt="a b") == [0, *plain]
    messages = [{"role": "user", "content": "hi"}]
    asked, talked = tokens(messages=messages), tokens(messages=messages, add_generation_prompt=False)
    assert asked[: len(talked)] == talked
    assert len(asked) > len(talked)
    assert tokenizer.decode(asked, skip_special_tokens=False) == tokenizer.render_chat(messages)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/tokenize", {}, 400, "either prompt or messages"),
        ("/tokenize", HELLO | {"prompt": "x"}, 400, "either prompt or messages"),
        ("/tokenize", HELLO | {"add_special_tokens": True}, 400, "add_special_tokens=true"),
        ("/tokenize", {"messages": [{"role": "user", "content": "refuse"}]}, 400, "template failed"),
        (
            "/tokenize",
            {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]},
            400,
            "tools are for",
        ),
        ("/tokenize", HELLO | {"tools": [{"type": "magic"}]}, 400, "tools"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "other"),
        ("/detokenize", {"tokens": [256]}, 400, "outside the vocabulary of 256"),
        ("/detokenize", {"tokens": [-1]}, 400, "outside the vocabulary"),
        ("/detokenize", {"tokens": "x"}, 400, "valid array"),
        ("/detokenize", {}, 400, "required"),
    ],
)
async def test_what_cannot_be_tokenised_is_refused(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == status
    assert says in error_of(response)["message"]


async def test_a_version_is_told(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": version.version()}


def test_the_version_is_the_checkouts_or_else_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "ROOT", tmp_path)
    monkeypatch.setattr(version.metadata, "version", lambda name: f"{name} installed")
    assert version.version() == "sparkmoe installed"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"')
    assert version.version() == "sparkmoe installed"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "sparkmoe"\nversion = "1.2.3"')
    assert version.version() == "1.2.3"
