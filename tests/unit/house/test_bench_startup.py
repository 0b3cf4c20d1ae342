"""The benchmark of a start, as far as it needs no server."""

import json
import sys

import pytest

from tests.bench import startup
from tests.support.places import DEMO_MODEL


def test_experts_alone_and_the_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["startup", "--checkpoint", str(DEMO_MODEL), "--alone"])
    startup.main()
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    experts = [row for row in found["results"] if row["work"] == "shard 0: experts"]
    assert [row["start"] for row in experts] == [1, 2]
    assert all(row["gb"] > 0 and row["gb_per_s"] > 0 for row in experts)
    assert found["config"]["disk"].keys() >= {"reader_gb_per_s", "warm_gb_per_s"}
    assert table[-1].startswith("disk: ")
