"""Compiled kernels outlive the process, the Ray session and the directory for temporary files."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from deploy.config import AppArgs, ModelConfig
from deploy.engine import replica
from deploy.engine.replica import RouterReplica
from deploy.fleet import shard_actor
from deploy.kernel_caches import keep_kernels
from tests.support.fake_ray_shards import fleet_spec
from tests.support.places import DEMO_MODEL, ROOT


def test_they_are_in_the_users_cache(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    keep_kernels(environment)
    assert {
        name: Path(value).parent for name, value in environment.items() if name != "XDG_CACHE_HOME"
    } == dict.fromkeys(
        ("TRITON_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"),
        tmp_path / "cache" / "sparkmoe",
    )


def test_what_the_user_sets_stays(tmp_path: Path) -> None:
    own = {"XDG_CACHE_HOME": str(tmp_path), "TRITON_HOME": "/a", "CUTE_DSL_CACHE_DIR": "/b"}
    environment = dict(own)
    keep_kernels(environment)
    assert environment.items() - own.items() == {
        ("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "sparkmoe" / "flashinfer"))
    }


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    with caplog.at_level(logging.WARNING):
        keep_kernels(environment)
    assert list(environment) == ["XDG_CACHE_HOME"]
    assert "may not be found again" in caplog.text


_ASK = """
import json, sys
from deploy.kernel_caches import keep_kernels
keep_kernels()
import triton.knobs
from cutlass.base_dsl.cache_helpers import get_default_generated_ir_path
from flashinfer.jit.env import FLASHINFER_JIT_DIR
print(json.dumps([triton.knobs.cache.dir, get_default_generated_ir_path(), str(FLASHINFER_JIT_DIR)]))
"""


def test_the_libraries_look_there(tmp_path: Path) -> None:
    for library in ("triton", "cutlass", "flashinfer"):
        pytest.importorskip(library, reason="of the extra gpu")
    ours = ("TRITON_HOME", "TRITON_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    asked = subprocess.run(
        [sys.executable, "-c", _ASK],
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(asked.stdout.splitlines()[-1])
    assert [Path(path).relative_to(tmp_path / "sparkmoe").parts[0] for path in found] == [
        "triton",
        "cute_dsl",
        "flashinfer",
    ]


@pytest.mark.parametrize(
    ("module", "start"),
    [
        (shard_actor, lambda: shard_actor.ShardActor(fleet_spec(), 0, "name")),
        (replica, lambda: RouterReplica(AppArgs(model=ModelConfig(path=DEMO_MODEL, name="demo")))),
    ],
    ids=["shard", "router"],
)
@pytest.mark.filterwarnings("ignore:coroutine 'RouterReplica.__del__'")  # which Serve awaits
def test_router_and_shards_set_it_when_they_start(
    module: object, start: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else, for their other work imports the libraries."""
    monkeypatch.setattr(module, "keep_kernels", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        start()
