"""What a person reads on the terminal when something is wrong: one sentence, exit code 2, nothing started."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
MODEL = ROOT / "configs" / "demo-model"


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("sparkmoe: ")
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def served(model: Path) -> str:
    return refusal("serve", DEMO, "--set", f"model.path={model}")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the demo model to damage."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_more_shards_than_experts() -> None:
    assert "experts.shards=33 is more than the model's 32 experts" in refusal(
        "serve", DEMO, "--set", "experts.shards=33"
    )


def test_a_typo_in_the_config() -> None:
    assert "experts.shrads: unknown key" in refusal("serve", DEMO, "--set", "experts.shrads=3")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"http_options.port={port}" in refusal("serve", DEMO, "--set", f"http_options.port={port}")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in served(tmp_path / "nowhere")


def test_a_truncated_file(broken: Path) -> None:
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100_000])
    assert file.name in served(broken)


def test_a_missing_file(broken: Path) -> None:
    next(broken.glob("*.safetensors")).unlink()
    assert "safetensors" in served(broken)


def test_a_kind_of_checkpoint_that_is_not_supported(broken: Path) -> None:
    file = broken / "hf_quant_config.json"
    config = json.loads(file.read_text())
    config["quantization"]["quant_algo"] = "NVFP4_AWQ"
    file.write_text(json.dumps(config))
    assert "NVFP4_AWQ" in served(broken)


def test_a_family_that_is_not_supported(broken: Path) -> None:
    file = broken / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "deepseek_v3"}))
    assert "deepseek_v3" in served(broken)


def test_status_of_nothing() -> None:
    assert "nothing answers" in refusal("status", "http://127.0.0.1:9")
