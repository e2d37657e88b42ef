"""The worker's side of a runner: cases go in one ahead, results come out, and what takes too much is killed."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from vmfs.fleet.processes import TOKEN, descendants, end_marked
from vmfs.fleet.results import Raw
from vmfs.fleet.runner import TEXTS_MOST, Case, Frames, Job, frame
from vmfs.fleet.values import VALUE_MOST
from vmfs.memory.mapping import PAGE

START_SECONDS = 120.0
_WATCH_SECONDS = 0.1
_GRACE_SECONDS = 0.2  # for what a case that ends in time has to say


class Limits(msgspec.Struct, frozen=True):
    seconds: float = 60.0
    memory: int = 0
    """Bytes that the processes of a case may have in memory; 0: what the worker has."""
    disk: int = 1 << 30
    """Bytes of the files in its folder."""
    processes: int = 64


class TooMuch(Exception):
    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


@functools.cache
def isolation() -> tuple[str, ...]:
    """A command in front of a runner that puts it into a process namespace of its own, so that all of its processes go
    with it; nothing where this host has none for this user."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    for words in (command, [*command, "--user", "--map-current-user"]):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([*words, "true"], check=True, capture_output=True, timeout=10)
            return tuple(words)
    return ()


class Supervisor:
    """A runner of a job, started when it is needed, and again after each case that has ended it."""

    def __init__(
        self,
        job: Job,
        limits: Limits,
        work: Path,
        *,
        token: str = "",
        memory: Sequence[int] = (),
        clean: Callable[[Raw], None] = lambda raw: None,
    ) -> None:
        """`work`: a folder for files of its cases. `token`: of the worker, for `end_marked`. `memory`: the descriptors
        that the job names, of memory that others have, too. `clean(raw)` is called after a runner was killed, with what
        is known of the case that it had."""
        self._memory = tuple(memory)
        self._shared = sum(os.fstat(fd).st_size for fd in self._memory)
        self.job, self._limits, self._clean = job, limits, clean
        self._folder = work / f"run-{secrets.token_hex(6)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._token = f"{token}-{secrets.token_hex(8)}"
        self._most = VALUE_MOST + TEXTS_MOST + 2 * job.coverage + job.keep_most
        self._not_its: set[tuple[int, int]] = set()  # files without a name that the runner has for itself

    # ---- a runner

    def _start(self) -> None:
        cases = self._folder / "cases"
        cases.mkdir(parents=True)
        there, self._in = os.pipe()
        self._out, back = os.pipe()
        watched, self._alive = os.pipe()
        ours = (there, back, watched)
        try:
            with open(self._folder / "output", "ab+", buffering=0) as output:
                self._process = subprocess.Popen(
                    [*isolation(), sys.executable, "-m", "vmfs.fleet.runner", *map(str, ours)],
                    cwd=cases,
                    env={
                        **os.environ,
                        "TMPDIR": str(cases),
                        TOKEN: self._token,
                        "PYTHONPATH": os.pathsep.join(sys.path),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(*ours, *self._memory),
                    start_new_session=True,
                )
        finally:
            for fd in ours:
                os.close(fd)
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._frames, self._to_send = Frames(self._most), bytearray()
        self._send(self.job)
        raw = self._receive(time.monotonic() + START_SECONDS, "the runner did not start")
        if raw.kind:
            raise TooMuch("template", raw.error)
        self._not_its = set(self._unnamed(self._processes()))

    def close(self, raw: Raw | None = None) -> None:
        """End the runner and all that it has left."""
        process, self._process = self._process, None
        if process is not None:
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            if not isolation():
                end_marked(self._token)
            for fd in (self._in, self._out, self._alive):
                os.close(fd)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._clean(raw or Raw(-1))

    # ---- cases

    def run(self, cases: Sequence[Case]) -> Iterator[Raw]:
        """A Raw for each, in turn."""
        at = 0
        while at < len(cases):
            try:
                if self._process is None:
                    self._start()
                for raw in self._run_some(cases, at):
                    yield raw
                    at += 1
            except TooMuch as failure:
                raw = Raw(cases[at].number, kind=failure.kind, error=str(failure))
                self.close(raw)
                yield raw
                at += 1

    def _run_some(self, cases: Sequence[Case], at: int) -> Iterator[Raw]:
        self._send(cases[at])
        for number in range(at, len(cases)):
            end = time.monotonic() + self._limits.seconds + _GRACE_SECONDS
            if number + 1 < len(cases):
                self._send(cases[number + 1])
            raw = self._receive(end, f"it was not done after {self._limits.seconds:g} s")
            if raw.number != cases[number].number:
                raise TooMuch("died", "the runner said something of another case")
            if not 0 <= raw.seconds <= self._limits.seconds:  # it may say anything
                raw.seconds = self._limits.seconds
            yield raw

    def _send(self, what: object) -> None:
        self._to_send += frame(msgspec.msgpack.encode(what))
        self._push()

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._to_send:
                done = os.write(self._in, self._to_send[: 1 << 20])
                del self._to_send[:done]

    def _receive(self, end: float, sentence: str) -> Raw:
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        looked = time.monotonic()
        while True:
            try:
                if (data := self._frames.take()) is not None:
                    return msgspec.msgpack.decode(data, type=Raw)
            except (ValueError, msgspec.MsgspecError):
                raise TooMuch("died", "the runner said what is no result") from None
            if self._to_send:
                self._push()
            left = end - time.monotonic()
            if left <= 0:
                raise TooMuch("timeout", sentence)
            if poll.poll(min(left, 0.01 if self._to_send else _WATCH_SECONDS) * 1000):
                if not (data := os.read(self._out, 1 << 20)):
                    raise TooMuch("died", self._end())
                self._frames.feed(data)
            elif time.monotonic() - looked >= _WATCH_SECONDS:
                self._look()
                looked = time.monotonic()

    def _end(self) -> str:
        """How the runner has ended."""
        assert self._process is not None
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "the process of the case does not answer any more"
        with contextlib.suppress(OSError, ValueError):
            said = (self._folder / "output").read_text(errors="replace").strip()[-2000:]
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return f"the process of the case has ended {how}" + (f"; it said at last: {said}" if said else "")
        return "the process of the case has ended"

    def _look(self) -> None:
        """Whether the case takes too much."""
        used, processes = 0, self._processes()
        for pid in processes:
            with contextlib.suppress(OSError, ValueError, IndexError):
                resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
                used += resident * PAGE - min(shared * PAGE, self._shared)
        if len(processes) > self._limits.processes:
            raise TooMuch("processes", f"it has {len(processes)} processes; a case may have {self._limits.processes}")
        if self._limits.memory and used > self._limits.memory:
            raise TooMuch("memory", f"its processes have {used} bytes in memory; a case may have {self._limits.memory}")
        unnamed = self._unnamed(processes)
        used = size_of(self._folder) + sum(size for its, size in unnamed.items() if its not in self._not_its)
        if used > self._limits.disk:
            raise TooMuch("disk", f"its files have {used} bytes; a case may have {self._limits.disk}")

    def _processes(self) -> list[int]:
        """Of the case: the runner, and what it has started."""
        assert self._process is not None
        found = descendants(self._process.pid)
        return found if isolation() else [self._process.pid, *found]

    def _unnamed(self, processes: Sequence[int]) -> dict[tuple[int, int], int]:
        """Bytes of the files without a name that they have open, memfds too: by device and inode."""
        found = {}
        for pid in processes:
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        file = os.stat(f"/proc/{pid}/fd/{fd}")
                        if stat.S_ISREG(file.st_mode) and not file.st_nlink:
                            found[file.st_dev, file.st_ino] = file.st_blocks * 512
        return found


def size_of(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_blocks * 512
    return total
