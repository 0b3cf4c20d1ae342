"""Every pin has a Linux aarch64 wheel for Python 3.12: a DGX Spark can install what we ask for."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.places import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_pin_resolves_for_a_spark(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tools = [need for need in extras["dev"] if not need.startswith("sparkmoe")]
    wanted = [*project["dependencies"], *extras["demo"], *tools]
    wanted += [need.partition(";")[0] for need in extras["gpu"]]
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 40)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += [
        "--target",
        str(tmp_path),
        "--only-binary=:all:",
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
    ]
    command += [
        part for platform in (*platforms, "manylinux2014_aarch64", "any") for part in ("--platform", platform)
    ]
    command += ["-c", str(ROOT / "constraints.txt"), *wanted]
    resolved = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert resolved.returncode == 0, resolved.stderr[-2000:]
