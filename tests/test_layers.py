"""The rule between the rooms: ARCHITECTURE.md's table says which room imports from which; no import points down it."""

import re
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.rooms import FOLDERS, PACKAGE, imports_of, rooms, sources, table

ONLY_IN = {
    "ray": {"actors", "deploy"},
    "pyomo": {"optimizer"},
    "highspy": {"optimizer"},
    "gurobipy": {"optimizer"},
    "torch": {"model", "actors"},
    "transformers": {"model", "deploy"},
    "fastapi": {"deploy"},
}
MOST_FILES = 12
"""Of a room, beside its __init__.py."""
FEWEST_OF_A_LIST = 3
"""A docstring that begins so many lines with names of files is a list of files."""


def documented() -> list[str]:
    """The rows of the table in ARCHITECTURE.md."""
    lines = (ROOT / "ARCHITECTURE.md").read_text().splitlines()
    start = lines.index("| room | imports from |")
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return lines[start:end]


def test_imports_are_those_of_the_table() -> None:
    rows = documented()
    order = [row.split("|")[1].strip().rstrip("/") for row in rows[2:]]
    assert sorted(order) == sorted(rooms())
    assert rows == table(order), "`python -m tests.rooms` prints the table of today's code"


def test_every_room_imports_from_rooms_above_it() -> None:
    order = [row.split("|")[1].strip().rstrip("/") for row in documented()[2:]]
    for room, others in rooms().items():
        assert all(order.index(other) < order.index(room) for other in others), room


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_from_the_left(folder: str) -> None:
    for source in sources():
        if source.parts[0] != folder:
            continue
        for name in imports_of(source):
            first, _, rest = name.partition(".")
            if first == PACKAGE:
                other = rest.split(".")[0]
                assert FOLDERS.index(other) <= FOLDERS.index(folder), f"{source} imports {name}"
            assert first not in FOLDERS, f"{source} imports {name}: say {PACKAGE}.{name}"
            assert folder in ONLY_IN.get(first, {folder}), f"{source} imports {name}"


@pytest.mark.parametrize("room", sorted(rooms()))
def test_rooms_are_small(room: str) -> None:
    files = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, room


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_list_of_a_rooms_files_has_them_all(room: str) -> None:
    """The docstring of a room's __init__.py has such a list, or says in a sentence what the room is."""
    files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__", "__main__"}
    init = ROOT / room / "__init__.py"
    text = init.read_text() if init.exists() else ""
    listed = re.findall(r"^ *([a-z][a-z0-9_]*) {2,}\S", text, re.MULTILINE)
    listed = [name for name in listed if not (ROOT / room / name).is_dir()]
    if len(files.intersection(listed)) >= FEWEST_OF_A_LIST:
        assert sorted(listed) == sorted(files), room


def test_every_test_folder_stands_for_a_room() -> None:
    apart = {"bench", "chaos", "e2e", "examples", "hosts"}
    for path in ROOT.joinpath("tests").rglob("test_*.py"):
        parts = path.relative_to(ROOT / "tests").parent.parts
        if parts and parts[0] not in apart:
            assert Path(ROOT, *parts).is_dir(), path
