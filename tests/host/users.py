"""Two ordinary users of one mount, A and B, as processes of theirs that a test forks, and the processes of a mount."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mounting import SOON, Machine, Server, has_news


class Child:
    """A forked process that does one thing. `result` is what that returned; an exception of it is raised there."""

    def __init__(self, uid: int, act: Callable[[], Any], prepare: Callable[[], None] | None = None) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            answer: tuple[bool, Any]
            try:
                os.close(self._read)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                os.umask(0o022)
                if prepare is not None:
                    prepare()
                if uid:
                    os.setgroups(())
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                answer = True, act()
            except BaseException as error:
                answer = False, error
            with contextlib.suppress(BaseException):
                os.write(write, pickle.dumps(answer))
            os._exit(0)
        os.close(write)

    def result(self, seconds: float = SOON) -> Any:
        try:
            assert has_news(self._read, seconds=seconds), "it did not come to an end"
            packed = b""
            while more := os.read(self._read, 1 << 16):
                packed += more
        finally:
            self.kill()
        assert packed, "it was killed"
        done, answer = pickle.loads(packed)
        if not done:
            raise answer
        return answer

    def kill(self) -> None:
        """SIGKILL, and it is gone."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._read)
            self.pid = 0


class User:
    """The user of that uid, with a gid of the same number."""

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def does(self, act: Callable[..., Any], *arguments: Any, seconds: float = SOON) -> Any:
        return self.begins(act, *arguments).result(seconds)

    def begins(self, act: Callable[..., Any], *arguments: Any) -> Child:
        return Child(self.uid, lambda: act(*arguments))

    def makes(self, path: Path) -> Machine:
        self.does(path.mkdir)
        return Machine(path)


A, B = User(54321), User(54322)


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def word_of(pid: int, name: str) -> str:
    """A line of its status; "" of a process that has gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return status(pid).get(name, "").strip()
    return ""


def zygote_of(server: Server) -> int:
    return next(pid for pid in children(server.server.pid) if word_of(pid, "Name") == "vmfs-zygote")


def children(pid: int) -> Iterator[int]:
    """Of a process, and theirs."""
    with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread has
                for child in (task / "children").read_text().split():
                    yield int(child)
                    yield from children(int(child))


def may_signal(pids: list[int]) -> list[int]:
    """Which of these processes and threads the caller may send a signal to."""
    found = []
    for pid in pids:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.kill(pid, 0)
            found.append(pid)
    return found


def threads(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def pid_of(vm: Machine) -> int:
    """Of a machine's process, which it has from now on."""
    return int(dict(line.split(" ", 1) for line in vm.read("stat").splitlines())["pid"])


def is_there(pid: int) -> bool:
    """Whether the process goes on; a dead one that nobody has waited for does not."""
    try:
        return status(pid)["State"][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
