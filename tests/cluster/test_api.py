"""Tests of what stands around the endpoint behind Ray Serve's proxy: keys, ids, limits, and logs of every
process."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Server, eventually, serving

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ASKED = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
INGRESS, ROUTER = "ServeReplica:sparkmoe:Ingress", "ServeReplica:sparkmoe:Router"
ALICE = {"authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Yield a folder for Ray's session: its path must be short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def keys(folder: Path) -> Path:
    file = folder / "keys"
    file.write_text("alice sesame\n")
    return file


@pytest.fixture(scope="module")
def guarded(folder: Path, keys: Path) -> Iterator[Server]:
    settings = ["api.log_format=json", f"api.keys_file={keys}", "api.max_body_mib=1"]
    with serving(*settings, environment={"RAY_TMPDIR": str(folder)}) as server:
        yield server


def logged(folder: Path) -> dict[str, list[str]]:
    """Return the lines that we wrote in every process, by the name of its actor.

    Beside them stand Ray's and Serve's own lines.
    """
    found: dict[str, list[str]] = {}
    for file in folder.glob("ray/session_2*/logs/worker-*.err"):
        lines = file.read_text().splitlines()
        actor = next((line for line in lines if line.startswith(":actor_name:")), "")
        found.setdefault(actor.removeprefix(":actor_name:"), []).extend(
            line for line in lines if line and not re.match(r":|(INFO|WARNING) .* -- ", line)
        )
    return found


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/v1/completions", ALICE, json.dumps(ASKED).encode(), 200),
        ("/v1/completions", ALICE, json.dumps(ASKED | {"stream": True}).encode(), 200),
        ("/v1/completions", ALICE, b"{", 400),
        ("/v1/completions", {}, json.dumps(ASKED).encode(), 401),
        ("/nowhere", ALICE, b"", 404),
        ("/v1/completions", ALICE, bytes(2**20 + 1), 413),
    ],
    ids=["whole", "streamed", "400", "401", "404", "413"],
)
def test_every_answer_has_one_id_and_one_line_in_the_log(
    guarded: Server, folder: Path, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    response = httpx.post(guarded.url + path, headers=headers, content=body, timeout=60)
    assert response.status_code == status
    [request_id] = response.headers.get_list("x-request-id")

    def told() -> list[dict[str, Any]]:
        lines = map(json.loads, logged(folder)[INGRESS])
        return [line for line in lines if line.get("request_id") == request_id and "seconds" in line]

    [line] = eventually(told, what=f"{request_id} is in a log", timeout_s=10)
    assert (line["status"], line["complete"]) == (status, True)
    assert line["key"] == ("alice" if headers else None)
    if status == 200:
        assert line["completion_id"] in response.text
        assert 1 <= line["completion_tokens"] <= 8


def test_the_logs_of_all_our_processes_are_json(guarded: Server, folder: Path) -> None:
    processes = logged(folder)
    assert {INGRESS, ROUTER, "Fleet", "ShardActor"} <= processes.keys()
    for actor in (INGRESS, ROUTER, "Fleet", "ShardActor"):
        assert all(json.loads(line)["message"] for line in processes[actor]), actor
    assert {json.loads(line)["logger"] for line in processes["ShardActor"]} == {
        "experts.fabric.tcp.shard_end"
    }


def test_keys_change_without_a_restart(guarded: Server, keys: Path) -> None:
    def status() -> int:
        return httpx.get(f"{guarded.url}/v1/models", headers=ALICE).status_code

    assert status() == 200
    keys.write_text("bob abracadabra\n")
    eventually(lambda: status() == 401, what="alice is out", timeout_s=10)
