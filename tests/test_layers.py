"""The rule between the folders: an import never points right, and heavy packages stay where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["cluster", "optimizer", "model", "actors", "deploy"]
ONLY_IN = {
    "ray": {"actors", "deploy"},
    "pyomo": {"optimizer"},
    "highspy": {"optimizer"},
    "gurobipy": {"optimizer"},
    "torch": {"model", "actors"},
    "transformers": {"model", "deploy"},
    "fastapi": {"deploy"},
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_left(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            if name in ORDER:
                assert ORDER.index(name) <= ORDER.index(folder), f"{path} imports {name}"
            assert folder in ONLY_IN.get(name, {folder}), f"{path} imports {name}"
