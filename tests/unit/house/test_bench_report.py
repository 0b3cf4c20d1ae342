"""A committed result names the commit that was measured."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.bench import report


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository with one commit and one result of it."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    (tmp_path / "code.py").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    report.emit("speed", [], config={}, output="speed.json")
    return tmp_path


def test_a_result_of_a_commit_is_written_and_may_be_written_again(repository: Path) -> None:
    report.emit("speed", [], config={"again": True}, output="speed.json")
    written = json.loads((repository / "results" / "speed.json").read_text())
    assert (len(written["commit"]), written["dirty"], written["config"]) == (40, False, {"again": True})


@pytest.mark.parametrize("name", ["code.py", "new file.py"])
def test_what_no_commit_holds_is_printed_but_not_written(
    repository: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / name).write_text("2")
    capsys.readouterr()
    with pytest.raises(SystemExit, match=f"--output speed.json is not written: commit {name} first"):
        report.emit("speed", [], config={"again": True}, output="speed.json")
    assert json.loads(capsys.readouterr().out)["dirty"] is True
    assert json.loads((repository / "results" / "speed.json").read_text())["config"] == {}
