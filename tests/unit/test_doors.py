"""What a machine gets of the host's time and chance comes in by known places, which stand here with their reasons."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmfs

ROOT = Path(vmfs.__file__).parent
FOLDERS = "machine", "devices", "memory", "boot"
NAMES = {
    *(f"time.{name}" for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns")),
    *("os.urandom", "os.getrandom", "threading.Timer", "random", "secrets", "uuid.uuid1", "uuid.uuid4"),
}
# Where, and what for. What a guest can see of them is in the board's state, or of the host by its nature.
DOORS = {
    ("devices/board.py", "time.time_ns"): "the date of birth",
    ("devices/board.py", "os.urandom"): "the seed at birth; random numbers, where time is the host's",
    ("devices/board.py", "time.monotonic_ns"): "the guest's time for other threads, where the engine does not tell it",
    ("devices/virtio/ninep.py", "time.time_ns"): "a folder of the host: its files' times are the host's",
    ("machine/control.py", "time.perf_counter"): "how long runs took, in `stat`",
    ("machine/machine.py", "time.perf_counter"): "how long runs took, in `stat`",
    ("machine/files/kinds.py", "time.perf_counter"): "whether a text takes long to make",
    ("machine/arrivals.py", "time.time_ns"): "when files of a saved machine were brought in",
    ("machine/history.py", "time.monotonic_ns"): "how far the host's time has gone on: an input, and so recorded",
    ("machine/past.py", "time.time_ns"): "when a snapshot was taken, in `info`",
    ("machine/past.py", "time.perf_counter_ns"): "for how long a machine stood still for a snapshot, in `info`",
    ("machine/gdb/handover.py", "secrets"): "the name of a gdb's socket, and what its caller has to say",
    ("machine/vnc/screen.py", "time.monotonic"): "how often a viewer's screen is looked at",
    ("machine/vnc/server.py", "secrets"): "what a viewer has to encrypt with the password",
    ("machine/files/vnc.py", "secrets"): "a password for viewers",
    ("machine/control.py", "threading.Timer"): "a run that was bounded by seconds of the host",
    ("machine/files/contents.py", "time.time_ns"): "when a file of the mount was changed",
    ("machine/files/lines.py", "time.monotonic"): "how long a text that failed is not made again",
    ("machine/warmup.py", "time.monotonic"): "how long threads of a life that nobody has asked for may be there",
}


def used(source: str) -> Iterator[str]:
    """The names of NAMES that a module uses, by whatever name it has imported them."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{known.get(node.value.id, '')}.{node.attr}"
        elif isinstance(node, ast.Name):
            name = known.get(node.id, "")
        if name in NAMES:
            yield name
        elif name.partition(".")[0] in NAMES:
            yield name.partition(".")[0]


def test_time_and_chance_come_in_by_known_doors() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in used(path.read_text())
    }
    assert found == DOORS.keys()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import time\ntime.time()", "time.time"),
        ("import time as t\nt.monotonic_ns()", "time.monotonic_ns"),
        ("from os import urandom\nurandom(3)", "os.urandom"),
        ("from threading import Timer as Later\nLater(1, print)", "threading.Timer"),
        ("import random\nrandom.random()", "random"),
        ("from secrets import token_bytes\ntoken_bytes(3)", "secrets"),
    ],
)
def test_a_planted_one_is_found(source: str, name: str) -> None:
    assert name in used(source)
    assert not set(used("def random(time):\n    return time.time()\n"))


# Code that takes the board's lock outside of a guest's access comes from outside, and so by `board.inputs`. Not these:
LOCKERS = {
    "board.py": "it is its own",
    "inputs.py": "the door",
    "display.py": "what is shown is looked at",
    "virtio/gpu.py": "what is shown is looked at; it is closed",
    "i8042.py": "whether there is room for keys, before they come in",
    "virtio/block.py": "what a worker counts or has found wrong; where time follows the instructions there is none",
    "medium.py": "another medium, which is refused while inputs are recorded",
    "worker.py": "what a worker has done; where time follows the instructions there is none",
    "network/card.py": "a thread that carries frames, which come by inputs while these have times",
}


def test_who_comes_from_outside_comes_by_inputs() -> None:
    folder = ROOT / "devices"
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.With)
        for item in node.items
        if ast.unparse(item.context_expr).endswith((".board.lock", "_board.lock", "self.lock"))
    }
    assert found == LOCKERS.keys()
