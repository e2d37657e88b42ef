"""Processes of this host."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import psutil

TOKEN = "VMFS_FLEET_RUNNER"  # in the environment of a runner, and of all that it starts
_THREADS_MOST = 256  # of a process; with more of them it is faster to look at all processes
_HAS_CHILDREN = os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children")  # CONFIG_PROC_CHILDREN


def descendants(pid: int) -> list[int]:
    """By what the kernel lists of each of their threads: this is asked ten times a second of each case, and a look at
    all processes of the host takes 50 times as long. One that ends at that moment may hide another."""
    found = [pid]
    for each in found:
        try:
            threads = os.listdir(f"/proc/{each}/task")
            if len(threads) > _THREADS_MOST:
                return _descendants_of_all(pid)
            for thread in threads:
                found += map(int, _read(f"/proc/{each}/task/{thread}/children").split())
        except FileNotFoundError:
            if not _HAS_CHILDREN:
                return _descendants_of_all(pid)
        except OSError:
            continue
    return found[1:]


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def _descendants_of_all(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def end_marked(token: str) -> None:
    """What has a token that begins so: also what has left its session and its parent, or does not answer."""
    mark = f"{TOKEN}={token}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                if any(variable.startswith(mark) for variable in variables):
                    os.kill(int(entry), signal.SIGKILL)
