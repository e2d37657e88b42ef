"""A mount of one's own for a time, which goes even when this process is killed."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


class MountFailed(RuntimeError):
    """Nothing can be mounted here; the text says why."""


@contextlib.contextmanager
def private_mount(
    options: Sequence[str] = (), *, prefix: str = "vmfs-", staying: Callable[[Callable[[], None]], None] | None = None
) -> Iterator[Path]:
    """A new mount in a new folder of TMPDIR, for this user alone. It goes at the end, also when this process is killed.

    `options` are those of `vmfs mount`. `staying` is called with a function that makes the mount stay. MountFailed,
    with the sentence of `vmfs mount`, where nothing can be mounted here.
    """
    directory = os.path.abspath(tempfile.mkdtemp(prefix=prefix))
    quoted = shlex.quote(directory)
    with removed_in_any_case(f"fusermount3 -u -z -- {quoted}; rmdir -- {quoted}") as stay:
        made = subprocess.run(
            [sys.executable, "-P", "-m", "vmfs.cli", "mount", *options, directory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if made.returncode:
            raise MountFailed(made.stderr.strip().removeprefix("vmfs mount: ") or "the mount failed")
        if staying:
            staying(stay)
        yield Path(directory)


@contextlib.contextmanager
def removed_in_any_case(command: str) -> Iterator[Callable[[], None]]:
    """Have a shell run `command` afterwards, in the case that this process is killed, too. Not after a call of what
    this yields.

    The shell sees the end of the pipe. It is in a session of its own, so that no key and no hangup of the terminal
    ends it.
    """
    script = f"trap '' TERM; read -r word; [ \"$word\" = stay ] && exit; exec 2>/dev/null; {command}"
    shell = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert shell.stdin is not None
    stdin = shell.stdin
    stays = False

    def stay() -> None:
        nonlocal stays
        if not stays:
            stays = True
            stdin.write(b"stay\n")

    try:
        yield stay
    finally:
        stdin.close()
        shell.wait()
