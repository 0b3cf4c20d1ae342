"""Tests of who may use the endpoint while the file of keys changes under it."""

import logging
from pathlib import Path

import pytest
from httpx import AsyncClient, Response

from deploy.api.config import ApiConfig
from deploy.api.http import keys
from deploy.api.http.keys import ApiKeys, Key, read_keys
from deploy.api.http.quota import Quota
from tests.support.fake_engine import CHAT, HELLO, FakeEngine, error_of, http_client, ingress_over, says

pytestmark = pytest.mark.anyio

ORIGIN = "https://chat.example.org"


@pytest.fixture(autouse=True)
def _look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "CHECK_S", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nalice sesame\n  opensesame  \n")
    return file


def guarded(file: Path) -> AsyncClient:
    config = ApiConfig(keys_file=file, cors_origins=(ORIGIN,), max_body_mib=1)
    return http_client(ingress_over(FakeEngine(says("Hello")), config=config))


async def asked(http: AsyncClient, authorization: str | None) -> Response:
    headers = [] if authorization is None else [(b"authorization", authorization.encode("latin-1"))]
    return await http.post(CHAT, json=HELLO, headers=headers)


def test_a_line_is_a_key_or_a_name_and_a_key(file: Path) -> None:
    assert read_keys(file) == {b"sesame": Key("alice"), b"opensesame": Key("line 4")}


@pytest.mark.parametrize(
    ("line", "secret", "key"),
    [
        ("bob k requests=8 tokens_per_minute=100000 priority=yes", b"k", Key("bob", Quota(8, 100_000, True))),
        ("k priority=no requests=1", b"k", Key("line 1", Quota(1))),
        ("bob c2VjcmV0==", b"c2VjcmV0==", Key("bob")),
        ("bob a=b tokens_per_minute=5", b"a=b", Key("bob", Quota(None, 5))),
        ("requests=8", b"requests=8", Key("line 1")),
    ],
)
def test_fields_behind_a_key_are_its_quota(tmp_path: Path, line: str, secret: bytes, key: Key) -> None:
    (tmp_path / "keys").write_text(line)
    assert read_keys(tmp_path / "keys") == {secret: key}


@pytest.mark.parametrize("authorization", ["Bearer sesame", "bearer  opensesame"])
async def test_every_key_of_the_file_is_let_through(file: Path, authorization: str) -> None:
    async with guarded(file) as http:
        assert (await asked(http, authorization)).status_code == 200


@pytest.mark.parametrize(
    ("authorization", "says"),
    [
        (None, "is needed"),
        ("Bearer ", "is needed"),
        ("Basic sesame", "is needed"),
        ("Bearer alice", "none of this server's"),
        ("Bearer sesam", "none of this server's"),
        ("Bearer sésame", "none of this server's"),
    ],
)
async def test_everybody_else_is_not(file: Path, authorization: str | None, says: str) -> None:
    async with guarded(file) as http:
        response = await asked(http, authorization)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers.get_list("x-request-id")[0].startswith("req_")
    error = error_of(response)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert says in error["message"]


async def test_what_asks_for_no_key(file: Path) -> None:
    async with guarded(file) as http:
        for path in ("/health", "/ready", "/version"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/openapi.json", "/docs", "/nowhere", "/health/", "//health"):
            assert (await http.get(path)).status_code == 401, path


async def test_details_of_readiness_need_a_key(file: Path) -> None:
    async with guarded(file) as http:
        for headers, told in (
            ({}, False),
            ({"authorization": "Bearer wrong"}, False),
            ({"authorization": "Bearer sesame"}, True),
        ):
            answer = await http.get("/ready", headers=headers)
            assert answer.status_code == 200
            assert bool(answer.json()["detail"]) is told


async def test_a_browser_asks_first_and_may_read_the_refusal(file: Path) -> None:
    preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
    async with guarded(file) as http:
        allowed = await http.options(CHAT, headers=preflight)
        refused = await http.post(CHAT, json=HELLO, headers={"origin": ORIGIN})
        too_long = await http.post(
            CHAT, content=bytes(2**20 + 1), headers={"origin": ORIGIN, "authorization": "Bearer sesame"}
        )
    assert (allowed.status_code, refused.status_code, too_long.status_code) == (200, 401, 413)
    for response in (allowed, refused, too_long):
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert len(response.headers.get_list("x-request-id")) == 1


async def test_a_changed_file_counts_without_a_restart(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with guarded(file) as http:
        file.write_text("bob abracadabra\n")
        assert (await asked(http, "Bearer abracadabra")).status_code == 200
        assert (await asked(http, "Bearer sesame")).status_code == 401
    assert "the number of API keys is now 1" in caplog.text


async def test_an_empty_file_refuses_everybody(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with guarded(file) as http:
        file.write_text("# all are gone\n")
        assert (await asked(http, "Bearer sesame")).status_code == 401
        assert "has no key: everybody is refused" in caplog.text
    async with guarded(file) as http:  # nor does an ingress that starts again fail
        assert (await asked(http, "Bearer sesame")).status_code == 401
        file.write_text("alice sesame")
        assert (await asked(http, "Bearer sesame")).status_code == 200


@pytest.mark.parametrize("fate", ["deleted", "garbled"])
async def test_a_file_that_is_no_good_any_more_leaves_the_keys_as_they_were(
    file: Path, fate: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = ApiKeys(file)
    if fate == "deleted":
        file.unlink()
    else:
        file.write_text("a line of words")

    def name_of(secret: bytes) -> str | None:
        key = found.find(secret)
        return key[0] if key else None

    for _ in range(3):
        assert name_of(b"sesame") == "alice"
    assert caplog.text.count("the API keys stay as they were: api.keys_file: ") == 1
    file.write_text("carol alakazam")
    assert name_of(b"sesame") is None
    assert name_of(b"alakazam") == "carol"


def test_the_file_is_looked_at_once_a_second(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "CHECK_S", 60.0)
    found = ApiKeys(file)
    file.unlink()
    looks = []
    monkeypatch.setattr(keys, "_stamp", looks.append)
    for _ in range(100):
        found.find(b"sesame")
    assert not looks


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"# nobody\n\n", "has no key"),
        (b"alice my secret", "line 1: must be `KEY` or `NAME KEY`"),
        (b"alice secret requests=0", "line 1: requests must be a whole number above 0"),
        (b"alice secret requests=1e9", "line 1: requests must be"),
        (b"alice secret priority=maybe", "line 1: priority must be yes or no"),
        (b"alice secret requests=1 requests=2", "each once"),
        (b"alice secret requests=1 secret", "line 1: behind the key may stand"),
    ],
)
def test_a_file_that_is_no_good_is_refused_in_a_sentence_without_keys(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^api\.keys_file: ") as refused:
        read_keys(file)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)
