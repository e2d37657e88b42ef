"""The process in which the cases of a worker run: `python -m vmfs.fleet.runner IN OUT ALIVE`, descriptors of pipes.

It reads a Job, then cases, and writes a Raw for each. Whatever a case does to it, the worker kills it and starts
another one. Frames are 4 bytes of length and msgpack.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import io
import os
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vmfs.fleet.results import Raw
from vmfs.fleet.values import Refused, pack_value
from vmfs.words.errors import VmfsError

FRAME_MOST = 1 << 30
TEXTS_MOST = 1 << 20  # of a Raw, beside its value, its machine and its coverage
CONSOLE_MOST = 1 << 16
OUTPUT_MOST = 1 << 16
ERROR_MOST = 1 << 14
_PR_SET_PDEATHSIG = 1


class Job(msgspec.Struct):
    """What the cases of a `map` have in common."""

    function: bytes
    """Pickled by cloudpickle."""
    kind: str = ""
    """Of the template: "", library, saved or files."""
    path: str = ""
    """Of the template: of a saved one the machine, in a mount, that has the snapshot `start`; of files the tar."""
    head: bytes = b""
    """Of a machine of the library (vmfs/fleet/unpacked.py)."""
    memory: list[int] = msgspec.field(default_factory=list)
    """The descriptors of its memory, one a region."""
    engine: str = ""
    coverage: int = 0
    keep_most: int = 0
    """Bytes that the machine of a case that fails may have as a file; 0: it is not kept."""
    history: int = 0
    """Bytes that the past of a machine of a mount may have; 0: it is not recorded."""
    file_most: int = 1 << 32
    prefix: str = "case"
    """What the names of machines begin with that it makes."""


class Case(msgspec.Struct):
    number: int
    input: bytes


def frame(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


class Frames:
    """Takes a stream of frames apart."""

    def __init__(self, most: int = FRAME_MOST) -> None:
        self._data, self._most = bytearray(), most

    def feed(self, data: bytes) -> None:
        self._data += data

    def take(self) -> bytes | None:
        if len(self._data) < 4:
            return None
        (size,) = struct.unpack_from("<I", self._data)
        if size > self._most:
            raise ValueError("a frame is too long")
        if len(self._data) < 4 + size:
            return None
        found = bytes(self._data[4 : 4 + size])
        del self._data[: 4 + size]
        return found


# ---- where machines come from


class NoMachines:
    """Cases without a template: the function makes what it needs."""

    machine: Any = None

    def __init__(self, job: Job) -> None:
        self.machine = job.path or None

    def begin(self) -> Any:
        return self.machine

    def describe(self, raw: Raw, failed: bool) -> None:
        pass

    def end(self) -> None:
        pass


class LibraryMachines:
    """One machine, which is set back for each case."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._load()

    def _load(self) -> None:
        from vmfs import Machine
        from vmfs.library.saved import Saved, load_over

        head = msgspec.msgpack.decode(self._job.head, type=Saved)
        self.machine = load_over(Machine, head, self._job.memory, self._job.engine or None)
        self._start = self.machine.snapshot()
        self._coverage = self.machine.coverage(self._job.coverage) if self._job.coverage else None

    def begin(self) -> Any:
        self.machine.exit = None
        if self._coverage is not None:
            ctypes.memset((ctypes.c_char * len(self._coverage)).from_buffer(self._coverage), 0, len(self._coverage))
        return self.machine

    def describe(self, raw: Raw, failed: bool) -> None:
        if self.machine.exit is not None:
            raw.exit = self.machine.exit.line()
        if self._coverage is not None:
            raw.coverage = bytes(self._coverage)
        if failed and self._job.keep_most:
            from vmfs.library.saved import write

            keep(raw, self._job.keep_most, lambda out: write(self.machine, out))

    def end(self) -> None:
        try:
            self.machine.unhook()
            self.machine.restore(self._start)
        except Exception:  # the function has closed it, or has it run in a thread
            with contextlib.suppress(Exception):
                self.machine.close()
            self._load()


class MountedMachines:
    """A fork of a machine of the worker's mount for each case."""

    def __init__(self, job: Job) -> None:
        from vmfs.client import Vm

        self._job = job
        self._template = Vm(job.path)
        self._count = 0
        self.machine: Any = None

    def begin(self) -> Any:
        self._count += 1
        self.machine = self._template.fork(f"{self._job.prefix}-{self._count}", "start")
        if self._job.coverage:
            self.machine.write("trace", f"coverage {self._job.coverage}\n")
        if self._job.history:
            self.machine.record(memory=self._job.history)
        with contextlib.suppress(OSError):  # a bare machine has none
            _ = self.machine.console
        return self.machine

    def describe(self, raw: Raw, failed: bool) -> None:
        describe_mounted(self.machine, raw, self._job.coverage)
        if failed and self._job.keep_most:
            keep_mounted(self.machine.path, raw, self._job.keep_most, bool(self._job.history))

    def end(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.machine.remove()


def describe_mounted(vm: Any, raw: Raw, coverage: int) -> None:
    with contextlib.suppress(OSError):
        raw.exit = vm.read_text("exit").strip()
    with contextlib.suppress(OSError, EOFError):
        vm.console.tail(1)
        raw.console = vm.console.said[-CONSOLE_MOST:]
    if raw.exit.startswith(("shutdown", "error")):
        with contextlib.suppress(OSError):
            raw.why = vm.why
    if coverage:
        with contextlib.suppress(OSError):
            raw.coverage = vm.read("coverage")


class _TooLong(Exception):
    pass


class _Bounded(io.BytesIO):
    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._most:
            raise _TooLong
        return super().write(data)


def keep(raw: Raw, most: int, *ways: Callable[[Any], object]) -> None:
    """The machine as a file, by the first of the ways that does not come to too much; else the sentence."""
    for write in ways:
        out = _Bounded(most)
        try:
            write(out)
        except _TooLong:
            raw.note = f"its machine was not kept: it comes to more than {most} bytes"
        except (OSError, VmfsError) as failure:
            raw.note = f"its machine was not kept: {failure}"
        else:
            raw.saved = out.getvalue()
            raw.note = raw.note and f"its machine was kept without its past, with which it has more than {most} bytes"
            return


def keep_mounted(path: str, raw: Raw, most: int, has_past: bool) -> None:
    """The machine as a file of `vmfs save`, with its past where that is short enough. It is paused by it."""
    from vmfs.commands import archive

    machine = Path(path)
    folder = machine / "snap/kept"
    with contextlib.suppress(OSError):
        (machine / "state").write_text("pause\n")
    try:
        folder.mkdir()
    except OSError as failure:
        raw.note = f"its machine was not kept: {failure}"
        return
    has_some = has_past and (folder / archive.PAST).is_dir()
    whole = [functools.partial(archive.write, folder, what="", with_past=True)] if has_some else []
    keep(raw, most, *whole, functools.partial(archive.write, folder, what=""))
    if has_past and not has_some:
        raw.note = raw.note or "its machine was kept without a past: it has none"


MACHINES: dict[str, Callable[[Job], Any]] = {
    "": NoMachines,
    "files": NoMachines,
    "library": LibraryMachines,
    "saved": MountedMachines,
}


# ---- cases


class Runner:
    def __init__(self, job: Job, out: int) -> None:
        import cloudpickle

        self._pid, self._out, self._job = os.getpid(), out, job
        self._function = cloudpickle.loads(job.function)
        self._loads = cloudpickle.loads
        self._machines = MACHINES[job.kind](job)
        self._folder = os.getcwd()

    def run(self, case: Case) -> None:
        raw = Raw(case.number)
        began = time.monotonic()
        try:
            given = self._loads(case.input)
            machine = self._machines.begin()
            try:
                value = self._function(machine, given)
            except BaseException as failure:
                if os.getpid() != self._pid:
                    os._exit(1)
                raw.kind, raw.error = "raised", told(failure)
            else:
                if os.getpid() != self._pid:  # the function has forked, and this is not who was asked
                    os._exit(0)
                try:
                    raw.value = pack_value(value)
                except Refused as failure:
                    raw.kind, raw.error = "value", str(failure)
            raw.seconds = time.monotonic() - began
            self._machines.describe(raw, bool(raw.kind))
            self._machines.end()
        except Exception as failure:
            raw.kind, raw.error, raw.value = raw.kind or "template", raw.error or told(failure), b""
        raw.output = self._tidy()
        self._say(raw)

    def _tidy(self) -> str:
        """End what the case left: processes, files, output."""
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pass
        else:
            self._end_children()
        for name in os.listdir(self._folder):
            remove(os.path.join(self._folder, name))
        os.chdir(self._folder)
        sys.stdout.flush()
        sys.stderr.flush()
        size = os.fstat(1).st_size
        if not size:
            return ""
        said = os.pread(1, OUTPUT_MOST, max(size - OUTPUT_MOST, 0))
        os.ftruncate(1, 0)  # it is open for appending
        return said.decode(errors="replace")

    def _end_children(self) -> None:
        if self._pid == 1:  # in a namespace of its own: all others in it
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                if self._pid != 1:
                    self._kill_descendants()
                os.waitpid(-1, 0)

    def _kill_descendants(self) -> None:
        from vmfs.fleet.processes import descendants

        for child in descendants(self._pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def _say(self, raw: Raw) -> None:
        data = memoryview(frame(msgspec.msgpack.encode(raw)))
        while data:
            data = data[os.write(self._out, data) :]


def told(failure: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(failure)).strip()
    except Exception:
        text = type(failure).__name__
    return text[-ERROR_MOST:]


def remove(path: str) -> None:
    import shutil

    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def frames_of(fd: int) -> Any:
    frames = Frames()
    while data := os.read(fd, 1 << 20):
        frames.feed(data)
        while (found := frames.take()) is not None:
            yield found


def end_with(alive: int) -> None:
    """Die with the worker, whatever the case does at that moment."""
    os.read(alive, 1)
    if os.getpid() != 1:
        with contextlib.suppress(OSError):
            os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(arguments: list[str]) -> int:
    inward, outward, alive = map(int, arguments)
    threading.Thread(target=end_with, args=(alive,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for fd in (inward, outward, alive):
        os.set_inheritable(fd, False)
    incoming = frames_of(inward)
    job = msgspec.msgpack.decode(next(incoming), type=Job)
    for fd in job.memory:
        os.set_inheritable(fd, False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_most, job.file_most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tempfile.tempdir = os.getcwd()
    try:
        runner = Runner(job, outward)
    except BaseException as failure:
        os.write(outward, frame(msgspec.msgpack.encode(Raw(-1, kind="template", error=told(failure)))))
        return 1
    gc.freeze()
    os.write(outward, frame(msgspec.msgpack.encode(Raw(-1))))
    decoder = msgspec.msgpack.Decoder(Case)
    for data in incoming:
        runner.run(decoder.decode(data))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
