"""What the benchmarks share: mounts, paired timings, and the form of a result."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Result:
    """One row: what was measured, ours and the peer's figure in `unit`, and the mark that was set for it."""

    name: str
    unit: str
    ours: float
    peer_name: str
    peer: float | None = None
    mark: str = ""

    @property
    def ratio(self) -> float | None:
        return None if not self.peer else self.ours / self.peer

    def row(self) -> tuple[str, ...]:
        return (
            self.name,
            f"{self.ours:.4g} {self.unit}",
            self.peer_name,
            "" if self.peer is None else f"{self.peer:.4g} {self.unit}",
            "" if self.ratio is None else f"{self.ratio:.3f}",
            self.mark,
        )


HEADINGS = ("benchmark", "vmfs", "peer", "peer's", "ratio", "mark")


def table(results: list[Result]) -> str:
    """The results as a Markdown table, the form in which docs/ quotes them."""
    rows = [HEADINGS, *(result.row() for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = [f"| {line} |" for line in lines]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[Path]:
    """A vmfs mount of its own; `arguments` go to `vmfs mount`."""
    with tempfile.TemporaryDirectory(prefix="vmfs-bench-") as where:
        subprocess.run([sys.executable, "-m", "vmfs.cli", "mount", where, *arguments], check=True)
        try:
            yield Path(where)
        finally:
            subprocess.run([sys.executable, "-m", "vmfs.cli", "umount", where], check=True)


@contextlib.contextmanager
def bare_c_file() -> Iterator[Path]:
    """The file of hello_ll.c: what a FUSE file costs at the least."""
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="vmfs-hello-") as where:
        program, mount = Path(where) / "hello_ll", Path(where) / "m"
        mount.mkdir()
        subprocess.run(["gcc", "-O2", "-o", program, HERE / "hello_ll.c", *flags.stdout.split()], check=True)
        server = subprocess.Popen([program, mount], stdout=subprocess.PIPE)
        try:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            yield mount / "least"
        finally:
            subprocess.run(["fusermount3", "-u", mount], check=True)
            server.wait()


@contextlib.contextmanager
def bare_file(module: str, name: str) -> Iterator[Path]:
    """The one file, `name`, of a file system that is a program of its own, `bench.bare_fuse` for one."""
    with tempfile.TemporaryDirectory(prefix="vmfs-bare-") as where:
        server = subprocess.Popen([sys.executable, "-m", module, where], stdout=subprocess.PIPE)
        try:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            yield Path(where) / name
        finally:
            subprocess.run(["fusermount3", "-u", where], check=True)
            server.wait()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What starts within runs on one core, ours and the peer's alike.

    Left to the scheduler, a caller and its server come to share a core or to wake each other across two by chance, and
    waking an idle core costs more than the call: where this was written 35 us each way, so that a read of a bare C file
    took 3.2 or 70 us.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def memfd(size: int) -> Iterator[Path]:
    """A path to a memfd of `size` bytes of this process."""
    fd = os.memfd_create("bench")
    os.ftruncate(fd, size)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


def pairs(kind: str, size: int, ops: int, ours: Path, peer: Path, rounds: int = 15) -> tuple[float, float]:
    """Nanoseconds an operation, ours and the peer's: the medians of `rounds` paired rounds (see pairs.c)."""
    program = Path(tempfile.gettempdir()) / f"vmfs-bench-pairs-{os.getuid()}"
    source = HERE / "pairs.c"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
    command = [program, kind, str(size), str(ops), str(rounds), ours, peer]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    figures = [tuple(map(float, line.split())) for line in lines]
    return statistics.median(a for a, _ in figures), statistics.median(b for _, b in figures)
