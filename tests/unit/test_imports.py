"""What imports what: no circle, nothing from a floor above, and the walls of docs/architecture.md.

Every import counts, wherever it stands. One in a function closes a circle when the function is called; one that is for
types alone (TYPE_CHECKING) closes none at run time, and still neither module can be understood without the other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The rooms, from the ground up. Those of one floor do not know each other.
FLOORS = (
    ("words",),
    ("memory",),
    ("engine", "client"),
    ("devices", "debug"),
    ("boot",),
    ("machine", "library", "traces"),
    ("host",),
    ("fs",),
    ("commands",),
    ("web", "fleet"),
    ("cli", "pytest_plugin"),
)

# Imports that there are not, though a floor would let them be. The first part names modules, `/` what is not meant.
WALLS = (
    ("vmfs.fs", ("vmfs.machine", "vmfs.boot", "vmfs.debug", "vmfs.devices")),  # names, and no contents
    ("vmfs.devices / board ram machine", ("vmfs.engine", "vmfs.devices.board")),  # a device has a Port
    ("vmfs.engine.kvm", ("vmfs.engine.emulator",)),
    ("vmfs.engine.emulator", ("vmfs.engine.kvm",)),
    ("vmfs.engine", ("vmfs.memory",)),  # a slot is a file descriptor
    ("vmfs.boot", ("vmfs.engine",)),
    ("vmfs.client", ("vmfs.memory",)),  # it runs on another host, perhaps
)

Imports = Mapping[str, frozenset[str]]


def modules_of(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(root.glob("vmfs/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path) -> Imports:
    """The modules of vmfs, and those that each imports."""
    modules = modules_of(root)
    return {name: frozenset(_imported(name, path, modules)) - {name} for name, path in modules.items()}


def _imported(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for one in wanted:
            if one in modules:
                yield one
            elif (owner := one.rpartition(".")[0]) in modules:  # a name in a module
                yield owner


def circles(imports: Imports) -> list[tuple[str, ...]]:
    """Each set of modules that import one another (Tarjan's strongly connected components)."""
    found: list[tuple[str, ...]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        open_.append(name)
        for other in imports[name]:
            if other not in order:
                visit(other)
            if other in open_:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            ring = open_[open_.index(name) :]
            del open_[open_.index(name) :]
            if len(ring) > 1:
                found.append(tuple(sorted(ring)))

    for name in imports:
        if name not in order:
            visit(name)
    return sorted(found)


def upward(imports: Imports) -> list[tuple[str, str]]:
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

    def floor(module: str) -> tuple[int, str]:
        room = module.split(".")[1] if "." in module else ""  # the package itself: its version
        return floor_of[room] if room else -1, room

    wrong = []
    for module, others in imports.items():
        if module == "vmfs":  # it has `Machine`, which is loaded when it is used
            continue
        for other in sorted(others):
            (here, room), (there, its) = floor(module), floor(other)
            if room != its and there >= here:
                wrong.append((module, other))
    return wrong


def through_walls(imports: Imports) -> list[tuple[str, str]]:
    wrong = []
    for who, barred in WALLS:
        place, _, exceptions = who.partition(" / ")
        for module, others in imports.items():
            if not _is_in(module, place) or module in {f"{place}.{one}" for one in exceptions.split()}:
                continue
            wrong += [(module, other) for other in sorted(others) if any(_is_in(other, one) for one in barred)]
    return wrong


def _is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


@pytest.fixture(scope="module")
def imports() -> Imports:
    return imports_of(ROOT)


def test_no_circle(imports: Imports) -> None:
    assert circles(imports) == []


def test_nothing_comes_from_a_floor_above(imports: Imports) -> None:
    assert upward(imports) == []


def test_the_walls_hold(imports: Imports) -> None:
    assert through_walls(imports) == []


def test_the_core_knows_no_python() -> None:
    core = ROOT / "vmfs/engine/emulator/core"
    sources = [path for path in core.rglob("*.[ch]") if re.search(r"#include .*(Python|module)\.h", path.read_text())]
    assert {str(path.parent.relative_to(core)) for path in sources} == {"python"}


def test_devices_ask_for_nothing_but_what_a_port_has() -> None:
    from vmfs.devices.board import Board
    from vmfs.devices.device import Port

    has = {name for name in (*vars(Port), *Port.__annotations__) if not name.startswith("_")}
    for path in (ROOT / "vmfs/devices").rglob("*.py"):
        if path.name not in ("board.py", "machine.py"):
            asked = {
                node.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("board", "self.board")
            }
            assert asked <= has, f"{path.name}: {asked - has}"
    made = {node.attr for name in ("board", "ram")
            for node in ast.walk(ast.parse(Path(ROOT / f"vmfs/devices/{name}.py").read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}  # fmt: skip
    assert has <= {*dir(Board), *made}


@pytest.mark.parametrize(
    ("files", "ring", "up", "walls"),
    [
        ({"words/a.py": "import vmfs.words.b", "words/b.py": "def f():\n    from vmfs.words.a import x"},
         ["words.a", "words.b"], [], []),
        ({"words/a.py": "from vmfs.words import b", "words/b.py": "if TYPE_CHECKING:\n    from .a import x"},
         ["words.a", "words.b"], [], []),
        ({"fs/__init__.py": "from .b import x", "fs/b.py": "from .. import fs"}, ["fs", "fs.b"], [], []),
        ({"words/a.py": "from vmfs.memory import ram", "memory/ram.py": ""}, [], [("words.a", "memory.ram")], []),
        ({"debug/a.py": "try:\n    import vmfs.devices.b\nfinally:\n    pass", "devices/b.py": ""},
         [], [("debug.a", "devices.b")], []),
        ({"fs/a.py": "from vmfs.machine.b import x", "machine/b.py": ""}, [], [], [("fs.a", "machine.b")]),
        ({"devices/rtc.py": "from vmfs.devices.board import Board", "devices/board.py": "import vmfs.engine.base",
          "engine/base.py": ""}, [], [], [("devices.rtc", "devices.board")]),
        ({"host/a.py": "import vmfs.words.b, os", "words/b.py": "import sys"}, [], [], []),
    ],
)  # fmt: skip
def test_planted_ones_are_found(tmp_path: Path, files: dict[str, str], ring: list[str], up: list, walls: list) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "vmfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    found = imports_of(tmp_path)

    def full(pairs: list) -> list:
        return [tuple(f"vmfs.{name}" for name in pair) for pair in pairs]

    assert circles(found) == full([ring] if ring else [])
    assert upward(found) == full(up)
    assert through_walls(found) == full(walls)
