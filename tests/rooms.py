"""Which room (folder of the sources) imports from which, read from the code. `python -m tests.rooms` prints the table.

The table stands in ARCHITECTURE.md; tests/test_layers.py holds the code to it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.paths import ROOT

FOLDERS = ["cluster", "optimizer", "model", "actors", "deploy"]
PACKAGE = "elastic_moe"


def sources() -> list[Path]:
    """Every Python file of the five folders, relative to the checkout."""
    return sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@cache
def imports_of(source: Path) -> tuple[str, ...]:
    """Dotted names that `source` imports; for `from a import b` both `a` and `a.b`, of which either may be a module."""
    return tuple(_imports(ast.parse((ROOT / source).read_text())))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(source: Path) -> str:
    return source.parent.as_posix()


def rooms() -> dict[str, set[str]]:
    """Every room, and the other rooms that its files import from."""
    modules = {".".join((PACKAGE, *source.with_suffix("").parts)): source for source in sources()}
    found: dict[str, set[str]] = {room_of(source): set() for source in sources()}
    for source in sources():
        for name in imports_of(source):
            target = modules.get(name) or modules.get(f"{name}.__init__") if name.startswith(PACKAGE) else None
            if target is not None and room_of(target) != room_of(source) and not _only_leads_to(name, source):
                found[room_of(source)].add(room_of(target))
    return found


def _only_leads_to(name: str, source: Path) -> bool:
    """Whether `name` is a folder that the import passes through on its way to a module below it."""
    return any(other.startswith(f"{name}.") and _is_module(other) for other in imports_of(source))


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def table(order: list[str]) -> list[str]:
    """Lines of Markdown: a row for each room, in `order`."""
    found = rooms()
    lines = ["| room | imports from |", "|---|---|"]
    for room in order:
        names = sorted(found[room], key=order.index)
        lines.append(f"| {room}/ | {', '.join(f'{name}/' for name in names) or 'nothing'} |")
    return lines


def downward(found: dict[str, set[str]]) -> list[str]:
    """An order in which every room comes after all that it imports from. Raises ValueError where there is none."""
    order: list[str] = []
    left = sorted(found, key=lambda room: (FOLDERS.index(room.split("/")[0]), room))
    while left:
        ready = next((room for room in left if found[room] <= set(order)), None)
        if ready is None:
            raise ValueError(f"these rooms import one another in a circle: {', '.join(left)}")
        order.append(ready)
        left.remove(ready)
    return order


if __name__ == "__main__":
    sys.stdout.write("\n".join(table(downward(rooms()))) + "\n")
