"""The house rules that a machine can check: rooms, wings and their order, and how far a decode step walks."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.places import ROOT

ROOMS = ("deploy", "experts", "router")

WINGS = (
    # From the top floor down, a wing a line: its modules, or the folder that holds them. Each imports only its own
    # and what stands below it.
    "deploy.app deploy.__main__",
    "deploy.cli",
    "deploy.engine",
    "deploy.config",
    "deploy.api",
    "deploy.api.openai",
    "deploy.api.reading",
    "deploy.api.grammars",
    "deploy.api.http",
    "deploy.fleet",
    "deploy.ray_private",
    "deploy.kernel_caches deploy.logs deploy.paths deploy.version deploy.within",
    "router.engine router.calibrate",
    "router.schedule",
    "router.model",
    "router.kernels",
    "router.sampling",
    "router.cache",
    "router.text",
    "router.dispatch router.request router.model_config router.config",
    "experts.fabric.tcp experts.fabric.mailbox experts.fabric.local experts.fabric.faulty",
    "experts.fabric",
    "experts.selftest",
    "experts.shard",
    "experts.backends.registry experts.backends.pairs",
    "experts.backends.b12x",
    "experts.backends.triton",
    "experts.backends.cpu",
    "experts.backends.reference experts.backends.grouped_mm",
    "experts.backends",
    "experts.checkpoint",
    "experts.placement experts.nvfp4 experts.weights experts.config experts.device experts.progress experts.cpu_math",
    "deploy router experts",
)
FLOOR_OF = {name: floor for floor, wing in enumerate(WINGS) for name in wing.split()}


def module_of(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MODULES = {module_of(path): path for path in FILES}


def wing_of(module: str) -> str:
    """Return the longest name in WINGS that is the module or a folder around it."""
    return max((name for name in FLOOR_OF if f"{module}.".startswith(f"{name}.")), key=len)


@cache
def imports_of(module: str) -> frozenset[str]:
    """Return the modules of ours that a file imports anywhere, inside functions and for type checkers too."""
    return frozenset(_imports(ast.parse(MODULES[module].read_text()))) - {module}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            package = node.module or ""
            names = {f"{package}.{alias.name}" for alias in node.names}
            yield from names & MODULES.keys()
            if package in MODULES and names - MODULES.keys():
                yield package


@pytest.mark.parametrize("room", ROOMS)
def test_our_room_is_the_one_imported(room: str) -> None:
    file = importlib.import_module(room).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT), f"{room} is shadowed by {file}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_idea(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a file says first what it is"
    assert len(text.splitlines()) <= 400, "look for a second idea"


def test_every_module_stands_in_a_wing() -> None:
    assert {wing_of(module) for module in MODULES} == set(FLOOR_OF), "a line of WINGS names what is not there"
    astray = [module for module in MODULES if wing_of(module) in ROOMS and module not in ROOMS]
    assert not astray, "give these a line of WINGS"


@pytest.mark.parametrize("wing", WINGS)
def test_no_import_runs_up(wing: str) -> None:
    upward = [
        f"{module} imports {imported}"
        for module in MODULES
        if wing_of(module) in wing.split()
        for imported in imports_of(module)
        if FLOOR_OF[wing_of(imported)] < FLOOR_OF[wing_of(module)]
    ]
    assert not upward


def test_no_import_runs_in_a_circle() -> None:
    try:
        TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


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
