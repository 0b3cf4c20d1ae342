"""Tests of who is told how far a work is, and how often."""

import io
import logging
import sys

import pytest

from experts import progress
from experts.progress import LINE_S, Progress, Took, each, show, took
from tests.unit.cli.test_launch import FakeClock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_every_piece_is_reported_before_it_is_done_and_the_end() -> None:
    reported: list[Progress | str] = []
    for piece in each(["a", "b"], "letters", reported.append):
        reported.append(piece)
    assert reported == [
        Progress(0, 2, "letters"),
        "a",
        Progress(1, 2, "letters"),
        "b",
        Progress(2, 2, "letters"),
    ]


def test_bytes_tell_how_much_and_how_fast(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in each(range(3), "experts", show("shard 1"), sizes=[10**9, 2 * 10**9, 10**9]):
        clock.sleep(LINE_S / 2)
    assert caplog.messages == [
        "shard 1: experts 2/3, 3.0 of 4.0 GB, 0.6 GB/s",
        "shard 1: experts 3/3, 4.0 of 4.0 GB, 0.5 GB/s",
    ]


def test_what_a_work_took_is_known_when_it_is_over(clock: FakeClock) -> None:
    report = show("shard 7")
    report(Progress(0, 1, "kernels"))
    for _ in each(range(3), "experts", report, sizes=[4, 5, 6]):
        assert "shard 7: experts" not in took()
        clock.sleep(2)
    assert took()["shard 7: experts"] == Took(6.0, 15)
    assert "shard 7: kernels" not in took()


def test_a_log_has_a_line_now_and_then_and_the_last(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    report = show("shard 1")
    for _ in each(range(13), "experts", report):
        clock.sleep(LINE_S / 5)
    assert caplog.messages == [
        "shard 1: experts 5/13",
        "shard 1: experts 10/13",
        "shard 1: experts 13/13",
    ]


def test_what_is_over_soon_is_not_logged(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = show("shard 1")
    for work in ("experts", "kernels"):
        for _ in each(range(4), work, report):
            clock.sleep(LINE_S / 5)
    assert not caplog.messages


def test_a_terminal_has_a_bar_for_each_work(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_AFTER_S", 0)
    report = show("shard 1")
    for _ in each(range(3), "experts", report):
        report(Progress(0, 3, "experts", "the next one"))
    report(Progress(0, 1, "kernels"))
    assert "shard 1: experts" in terminal.getvalue()
    assert "0/3" in terminal.getvalue()
    assert "shard 1: kernels" in terminal.getvalue()
