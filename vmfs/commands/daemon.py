"""Serving a mount in the background, or in the foreground: which process waits for what, and where messages go.

In the background, the parent waits on a pipe until the child says that the mount is ready, or why it is not,
so that the command after `vmfs mount DIR` finds the mount there.

While a mount starts, stderr is a memory file. libfuse and fusermount3 write their reasons to stderr, in
several lines; what serve() raises then ends with them, in one sentence.

Beside a server runs a small watcher that unmounts what a killed server leaves. libfuse's own for that,
auto_unmount, left the mounts of users other than root (measured with 3.14).
"""

import contextlib
import gc
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from vmfs.host.settings import MountSettings
from vmfs.words.errors import EngineFailed, VmfsError

READY = b"\0"


def foreground(directory: Path, settings: MountSettings, log: Path | None) -> int:
    """Serve `directory` until it is unmounted, or until SIGINT or SIGTERM; the exit code."""
    stderr = os.dup(2)
    start_log(settings, log, logging.StreamHandler(os.fdopen(stderr, "w", closefd=False)))
    with startup_messages() as messages:
        def ready() -> None:
            os.dup2(stderr, 2)
        try:
            serve(directory, settings, ready)
        except VmfsError as failure:
            raise EngineFailed(sentence(failure, messages)) from failure
        finally:
            os.dup2(stderr, 2)
    return 0


def background(directory: Path, settings: MountSettings, log: Path | None) -> int:
    """Return 0 once a child serves `directory`. Raises EngineFailed with the reason if none comes to that."""
    told, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(told)
        _child(directory, settings, log, tell)
    os.close(tell)
    try:
        answer = b""
        while answer != READY and (more := os.read(told, 4096)):
            answer += more
    except BaseException:       # ^C: take back what was begun
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if answer == READY:
        return 0
    _, status = os.waitpid(child, 0)
    if answer:
        raise EngineFailed(answer.decode(errors="replace"))
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise EngineFailed(f"the server {how} before the mount was ready")


def _child(directory: Path, settings: MountSettings, log: Path | None, tell: int) -> NoReturn:
    """The server's process. Never returns: the parent's frames above are not this process's to run."""
    code = 1
    try:
        os.setsid()             # no terminal, and no signals from one
        os.chdir("/")           # keep no directory busy
        close_all_but(tell)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        start_log(settings, log, syslog())
        with startup_messages() as messages:
            def ready() -> None:
                os.dup2(null, 2)
                os.write(tell, READY)
                os.close(tell)
            try:
                serve(directory, settings, ready)
                code = 0
            except VmfsError as failure:
                logging.getLogger("vmfs").error("%s", failure)
                with contextlib.suppress(OSError):      # after ready(), nobody listens
                    os.write(tell, sentence(failure, messages).encode())
    except BaseException as failure:
        logging.getLogger("vmfs").exception("the server failed")
        with contextlib.suppress(OSError):
            os.write(tell, "".join(traceback.format_exception(failure)).encode())
    finally:
        logging.shutdown()
        os._exit(code)


def serve(directory: Path, settings: MountSettings, ready: Callable[[], None]) -> None:
    """vmfs.fs.serve, watched. It is loaded this late since the parent of a server needs none of it."""
    try:
        from vmfs import fs
    except ImportError as failure:
        if failure.name and failure.name.partition(".")[0] == "vmfs":
            raise
        raise EngineFailed(f"{sys.executable} cannot load {failure.name}: {failure} (make setup fills .venv"
                           " with what it needs)") from failure
    def begun() -> None:
        # What is loaded by now stays. A full collection would look at it again, for 30 ms in which no file answers.
        gc.freeze()
        ready()

    with unmounted_if_killed(directory):
        fs.serve(str(directory), settings, begun)


# A line says that the server is done. At the end of the pipe without one it was killed: if then a statfs fails (a stat
# may be answered from the kernel's cache), what it had mounted is still there, and nothing else is.
WATCH = 'read -r done || stat -f -- "$1" || fusermount3 -u -z -- "$1"'


@contextlib.contextmanager
def unmounted_if_killed(directory: Path) -> Iterator[None]:
    """If this process ends within the block, however it does, `directory` is unmounted after it."""
    null = subprocess.DEVNULL
    # A session of its own: what is sent to the server's group, as ^C, is not for the watcher.
    with subprocess.Popen(["sh", "-c", WATCH, "vmfs-watch", directory], cwd="/", start_new_session=True,
                          stdin=subprocess.PIPE, stdout=null, stderr=null) as watcher:
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):      # it may have been killed
                os.write(watcher.stdin.fileno(), b"done\n")


@contextlib.contextmanager
def startup_messages():
    """stderr as a memory file, open for reading; the caller puts stderr back."""
    sys.stderr.flush()
    with os.fdopen(os.memfd_create("vmfs-stderr"), "r+", errors="replace") as messages:
        os.dup2(messages.fileno(), 2)
        yield messages


def sentence(failure: VmfsError, messages) -> str:
    """What `failure` says, and after it what libfuse and fusermount3 said."""
    sys.stderr.flush()
    messages.seek(0)
    said = dict.fromkeys(line.removeprefix("fuse: ").strip() for line in messages if line.strip())
    return f"{failure} ({'; '.join(said)})" if said else str(failure)


def close_all_but(kept: int) -> None:
    """Close what the caller had open: a pipe that a daemon keeps open keeps its reader waiting."""
    os.closerange(3, kept)
    os.closerange(kept + 1, max(kept + 1, os.sysconf("SC_OPEN_MAX")))


def syslog() -> logging.Handler:
    if os.path.exists("/dev/log"):
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
            handler.ident = f"vmfs[{os.getpid()}]: "
            return handler
    return logging.NullHandler()


def start_log(settings: MountSettings, log: Path | None, otherwise: logging.Handler) -> None:
    """Send the log to the file `log`, or else to `otherwise`."""
    handler = logging.FileHandler(log) if log else otherwise
    if log:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        if not settings.debug:      # a terminal or the system's log is not told that all is well
            handler.setLevel(logging.WARNING)
    level = logging.DEBUG if settings.debug else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
