"""The report that every benchmark makes of itself: one JSON line with commit, versions, hardware, samples and
their spread."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.support.places import ROOT

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "ray", "flashinfer-python", "triton", "numpy")


def emit(name: str, results: Sequence[dict[str, Any]], *, config: dict[str, Any], output: str | None) -> None:
    """Print the JSON line; with `output`, a file name, also write it to tests/bench/results/.

    Exits with a sentence instead of writing a file whose commit is not what was measured.
    """
    changed = changed_files()
    line = json.dumps(
        {
            "benchmark": name,
            "config": config,
            "results": list(results),
            "commit": _git("rev-parse", "HEAD").strip() or "unknown",
            "dirty": bool(changed),
            "versions": versions(),
            "hardware": hardware(),
        }
    )
    print(line)
    if output is not None:
        if changed:
            raise SystemExit(f"--output {output} is not written: commit {', '.join(changed[:3])} first")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / output).write_text(line + "\n")


def spread(rounds: Sequence[Sequence[float]], *, unit: str, scale: float) -> dict[str, Any]:
    """Return percentiles of several rounds of samples, times `scale`.

    p50, p99: the median over rounds of each round's percentile. p50_rounds: each round's, ascending, because a machine
    that others use has quiet rounds and loud ones.
    """
    p50s = sorted(percentile(samples, 50) * scale for samples in rounds)
    p99s = sorted(percentile(samples, 99) * scale for samples in rounds)
    return {
        f"p50_{unit}": round(percentile(p50s, 50), 1),
        f"p99_{unit}": round(percentile(p99s, 50), 1),
        f"p50_rounds_{unit}": [round(p50, 1) for p50 in p50s],
        "samples": sum(len(samples) for samples in rounds),
    }


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the smallest sample that `percent` of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def changed_files() -> list[str]:
    """Return the files in which the working tree differs from its commit; results do not count, they change
    nothing."""
    besides_results = ["--", ".", f":!{RESULTS.relative_to(ROOT)}"]
    status = _git("status", "--porcelain", "-z", "--no-renames", *besides_results)
    return [entry[3:] for entry in status.split("\0") if entry]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
