"""No file of model/ imports, by however many others, itself: so that any of them can be read and moved by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import model

ROOT = Path(model.__file__).parent
PACKAGE = model.__name__


def imports() -> dict[str, set[str]]:
    """File -> files that it imports, by dotted names."""
    files = {path: _name(path) for path in ROOT.rglob("*.py")}
    known = set(files.values())
    found: dict[str, set[str]] = {}
    for path, name in files.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (inner & known) or {node.module}
        found[name] = named & known
    return found


def _name(path: Path) -> str:
    return ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_no_circle_of_files() -> None:
    graph = imports()
    assert f"{PACKAGE}.native.library" in graph[f"{PACKAGE}.native"]
    while leaves := {name for name, wanted in graph.items() if not wanted & graph.keys()}:
        graph = {name: wanted for name, wanted in graph.items() if name not in leaves}
    assert graph == {}
