"""Protects: no circle among the project's own imports, wherever they stand in a file; no module imports a command."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

FILES = [path for place in (".", "scripts", "scripts/lib") for path in ROOT.glob(f"{place}/*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
COMMANDS = {name for name in MODULES if name.startswith("scripts.") and not name.startswith("scripts.lib.")}


def imported(name: str) -> set[str]:
    """The project's modules that a module imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return found & MODULES.keys()


def test_imports_make_no_circle():
    assert len(MODULES) > 30 and "generate" in imported("scripts.lib.bench")
    list(
        TopologicalSorter({name: imported(name) for name in MODULES}).static_order()
    )  # else CycleError names it


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_a_command(name):
    assert not imported(name) & COMMANDS
