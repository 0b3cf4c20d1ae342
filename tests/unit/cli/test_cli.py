"""Tests of what a person reads on the terminal when something is wrong: one sentence, exit code 2, nothing
started."""

import contextlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli.launch import check
from deploy.cli.main import app
from deploy.config import load
from tests.support.places import DEMO_CONFIG, DEMO_MODEL

DEMO = str(DEMO_CONFIG)


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("sparkmoe: ")
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr.removeprefix("sparkmoe: ").removesuffix("\n")


def served(model: Path) -> str:
    return refusal("serve", DEMO, "--set", f"model.path={model}")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the demo model to damage."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def test_more_shards_than_experts() -> None:
    assert refusal("serve", DEMO, "--set", "experts.shards=33") == (
        "experts.shards=33 is more than the model's 32 experts per layer: "
        "a shard without an expert would do nothing"
    )


def test_a_typo_in_the_config() -> None:
    assert refusal("serve", DEMO, "--set", "experts.shrads=3") == (
        f"{DEMO}: applications.0.deployments.0.user_config.experts.shrads: unknown key; did you mean `shards`?"
    )


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal("serve", DEMO, "--set", f"http_options.port={port}") == (
            f"http_options.port={port}: Address already in use on 127.0.0.1; is another server running? "
            "Choose one with --set http_options.port=NUMBER"
        )


def test_a_port_is_not_tried_on_a_cluster_whose_serve_may_hold_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        checked, _ = load(Path(DEMO), [f"http_options.port={port}"])
        check(checked, address="auto")


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    why = "No such file or directory"
    assert refusal("serve", DEMO, "--set", f"api.keys_file={file}") == f"api.keys_file: {file}: {why}"
    file.touch()
    assert refusal("serve", DEMO, "--set", f"api.keys_file={file}") == f"api.keys_file: {file} has no key"


def test_a_cluster_that_is_not_there() -> None:
    assert refusal("serve", DEMO, "--address", "127.0.0.1:9") == (
        "no Ray cluster answers at 127.0.0.1:9: Connection refused"
    )


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert served(path) == f"{path}: no config.json, so this is not a checkpoint directory"


def test_a_truncated_file(broken: Path) -> None:
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100_000])
    assert served(broken).startswith(f"{file}: broken or cut short (")
    assert served(broken).endswith("); download the checkpoint again")


def test_a_missing_file(broken: Path) -> None:
    next(broken.glob("*.safetensors")).unlink()
    assert served(broken) == f"{broken}: holds no *.safetensors files"


def test_a_kind_of_checkpoint_that_is_not_supported(broken: Path) -> None:
    file = broken / "hf_quant_config.json"
    config = json.loads(file.read_text())
    config["quantization"]["quant_algo"] = "NVFP4_AWQ"
    file.write_text(json.dumps(config))
    assert served(broken) == (
        f"{broken}: experts quantised as NVFP4_AWQ are not supported; NVFP4 and W4A16_NVFP4 are"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model_type": "deepseek_v3"},
            "model_type 'deepseek_v3' is not supported; supported are "
            "qwen3_moe, minimax_m2, glm4_moe, mixtral, ernie4_5_moe, hy_v3",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic' depends on a request's length and is not supported",
        ),
    ],
    ids=["family", "trunk"],
)
def test_a_model_that_is_not_supported(broken: Path, changes: dict[str, Any], says: str) -> None:
    file = broken / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert served(broken) == f"{broken}: {says}"


def test_a_config_json_that_is_a_list(broken: Path) -> None:
    (broken / "config.json").write_text("[]")
    assert served(broken) == f"{broken / 'config.json'}: must hold a mapping, not a list"


def test_what_only_serve_refuses_is_a_sentence() -> None:
    said = refusal("serve", DEMO, "--set", "logging_config={log_level: LOUD}")
    assert said.startswith("logging_config.")


def test_status_of_nothing() -> None:
    assert (
        refusal("status", "127.0.0.1:9")
        == "nothing answers at http://127.0.0.1:9: [Errno 111] Connection refused"
    )
    assert refusal("status", "http://[").startswith("nothing answers at http://[: ")


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"ready": 1, "reason": "", "detail": 3}'], ids=repr
)
@pytest.mark.parametrize("code", [200, 404])
def test_status_of_something_else(code: int, body: bytes) -> None:
    with answering(code, body) as url:
        assert refusal("status", url) == f"{url}/ready answered {code}, but not as a sparkmoe server does"


def test_status_tells_all_that_is_not_empty() -> None:
    detail = {
        "router_pid": 1,
        "hopeless": "",
        "refused": "experts.shards=33 is too many",
        "shards": [
            {"rank": 0, "pid": 2, "layer_s": 0.123, "loading": None},
            {"rank": 1, "loading": {"done": 3, "total": 9, "work": "experts", "now": ""}},
        ],
    }
    report = {"ready": False, "reason": "shard 1 is being replaced", "detail": detail}
    with answering(503, json.dumps(report).encode()) as url:
        result = CliRunner().invoke(app, ["status", url])
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "not ready: shard 1 is being replaced",
        "  router_pid: 1",
        "  refused: experts.shards=33 is too many",
        "  shard rank 0, pid 2, layer_s 0.1",
        "  shard rank 1, loading experts 3/9",
    ]


@contextlib.contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    """Yield the URL of a server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
