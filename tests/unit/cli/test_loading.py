"""Tests of what `sparkmoe serve` shows of shards that load."""

import os
import sys
from dataclasses import asdict
from typing import Any

import pytest

from deploy.cli import loading
from deploy.cli.loading import Loading
from deploy.cli.readiness import status_lines
from experts.progress import LINE_S, Progress
from tests.unit.cli.test_launch import FakeClock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(loading, "time", clock)
    return clock


def shard(rank: int, done: int) -> dict[str, Any]:
    told = {"done": done, "total": 100, "work": "experts", "now": ""} if done < 100 else None
    return {"rank": rank, "pid": 1, "loading": told}


def test_a_line_for_a_tenth_and_not_too_often(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with Loading() as shown:
        for seconds, done in ((0, 1), (LINE_S, 30), (0.1, 50), (LINE_S, 51), (LINE_S, 59), (LINE_S, 60)):
            clock.sleep(seconds)
            shown.show([shard(0, done), shard(1, 0), shard(2, 100)])
        shown.show([shard(rank, 100) for rank in range(3)])
    assert capsys.readouterr().err.splitlines() == [
        "loading: shard 0: experts 30/100; shard 1: experts 0/100",
        "loading: shard 0: experts 51/100; shard 1: experts 0/100",
        "loading: shard 0: experts 60/100; shard 1: experts 0/100",
    ]


def test_gigabytes_and_their_rate_are_shown(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    told = asdict(Progress(120, 516, "experts", done_bytes=31 * 10**8, total_bytes=134 * 10**8, seconds=1.4))
    detail = {"shards": [{"rank": 0, "pid": 1, "loading": told}]}
    with Loading() as shown:
        shown.show(detail["shards"])
        clock.sleep(LINE_S)
        shown.show(detail["shards"])
    assert capsys.readouterr().err == "loading: shard 0: experts 120/516, 3.1 of 13.4 GB, 2.2 GB/s\n"
    assert status_lines(False, "shard 0 loads", detail)[-1] == (
        "  shard rank 0, pid 1, loading experts 120/516, 3.1 of 13.4 GB, 2.2 GB/s"
    )


def test_status_says_what_the_parts_of_a_start_took() -> None:
    parts = {
        "shard 1: experts": {"seconds": 61.24, "num_bytes": 5},
        "shard 1: kernels": {"seconds": 3, "num_bytes": 0},
    }
    detail = {"took": {}, "shards": [{"rank": 1, "loading": None, "took": parts}]}
    assert status_lines(True, "", detail) == [
        "ready",
        "  shard rank 1, took shard 1: experts 61.2 s, shard 1: kernels 3.0 s",
    ]


def test_what_loads_at_once_is_not_told(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with Loading() as shown:
        for done in range(101):
            shown.show([shard(0, done)])
            clock.sleep(LINE_S / 110)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_one_line_is_written_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(loading.shutil, "get_terminal_size", lambda: os.terminal_size((27, 9)))
    with Loading() as shown:
        shown.show([])
        for done in (7, 8):
            shown.show([shard(0, done)])
    assert capsys.readouterr().err == "".join(
        f"\r{line}\x1b[K" for line in ("loading: shard 0: experts ", "loading: shard 0: experts ", "")
    )
