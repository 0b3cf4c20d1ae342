"""The house rules that a machine can check."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROOMS = ("deploy", "experts", "router")


@pytest.mark.parametrize("room", ROOMS)
def test_our_room_is_the_one_imported(room: str) -> None:
    file = importlib.import_module(room).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT), f"{room} is shadowed by {file}"


@pytest.mark.parametrize("path", sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py")), ids=str)
def test_a_file_is_one_idea(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a file says first what it is"
    assert len(text.splitlines()) <= 400, "look for a second idea"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("deploy.cli.launch", ("torch", "transformers")),
        ("deploy.fleet.fleet", ("torch", "transformers", "fastapi")),
        ("deploy.engine.replica", ("torch", "transformers")),
        ("experts.shard", ("transformers", "fastapi", "ray", "router")),
    ],
)
def test_a_start_does_not_wait_for_heavy_imports(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
