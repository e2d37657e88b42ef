"""Processes of this host."""

import contextlib
import os
import signal
from pathlib import Path

import psutil

TOKEN = "VMFS_FLEET_RUNNER"  # in the environment of a runner, and of all that it starts


def descendants(pid: int) -> list[int]:
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
