"""Tests of what config.json alone says about a model that we cannot serve, before anything heavy is imported."""

import json
from pathlib import Path
from typing import Any

import pytest

from router.model_config import check_family, read_config
from tests.support.places import DEMO_MODEL

SLIDING = "sliding-window attention (4096 tokens) is not supported"
DYNAMIC = "rope scaling 'dynamic' depends on a request's length and is not supported"
LONGROPE = "rope scaling 'longrope' depends on a request's length and is not supported"
UNKNOWN = "rope scaling 'su' is not supported; supported are default, linear, yarn, llama3"


def written(folder: Path, **changes: Any) -> Path:
    """Return a directory with the demo model's config.json, changed; keys that are changed to `...` are left
    out."""
    config = {**json.loads((DEMO_MODEL / "config.json").read_text()), **changes}
    text = json.dumps({key: value for key, value in config.items() if value is not ...})
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "mixtral", "sliding_window": 4096}, SLIDING),
        ({"model_type": "mixtral", "sliding_window": 4096, "use_sliding_window": False}, SLIDING),
        ({"use_sliding_window": True, "sliding_window": 4096}, SLIDING),
        (
            {"use_sliding_window": True, "sliding_window": ...},
            SLIDING,
        ),  # transformers' default for the family
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu (SwiGLU experts)"),
        ({"hidden_act": None}, "hidden_act None is not supported, only silu (SwiGLU experts)"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, DYNAMIC),
        ({"rope_parameters": {"type": "dynamic", "factor": 2.0}}, DYNAMIC),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, DYNAMIC),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            LONGROPE,
        ),  # stands before rope_parameters
        ({"rope_parameters": ..., "rope_scaling": {"type": "su", "factor": 2.0}}, UNKNOWN),
        (
            {"text_config": {"hidden_size": 64}},
            "a text_config inside config.json is not supported; transformers ignores it",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value, default=str),
)
def test_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = written(tmp_path, **changes)
    for refusing in (check_family, read_config):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 the whole message is compared
            refusing(path)
        assert str(refused.value) == f"{path}: {why}"


@pytest.mark.parametrize(
    ("changes", "rope_type"),
    [
        ({}, "default"),
        ({"sliding_window": 4096}, "default"),  # the switch is off
        ({"hidden_act": ..., "use_sliding_window": ..., "sliding_window": ...}, "default"),
        ({"rope_parameters": ..., "rope_scaling": None, "rope_theta": 1e6}, "default"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0}}, "yarn"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value, default=str),
)
def test_is_served_as_transformers_reads_it(changes: dict[str, Any], rope_type: str, tmp_path: Path) -> None:
    path = written(tmp_path, **changes)
    check_family(path)
    config: Any = read_config(path)
    assert (config.hidden_act, config.sliding_window) == ("silu", None)
    assert config.rope_parameters["rope_type"] == rope_type


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"\xff{}", "not valid JSON: "),
        (b"[1, 2]", "must hold a mapping, not a list"),
        (b"null", "must hold a mapping, not a NoneType"),
    ],
    ids=["cut short", "not text", "list", "null"],
)
def test_a_config_json_that_is_none(text: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        check_family(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: {why}")


def test_a_directory_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json, so this is not a checkpoint directory"):
        check_family(tmp_path)
