"""`vmfs gdb`: a pipe between a gdb and a machine, for `target remote | vmfs gdb MACHINE`.

It speaks through the machine's files, so it needs no port and no more rights than those to write them. gdb starts it
with a socket as its standard input and output, and it hands that over: packets take no way through this process then.
"""

import argparse
import errno
import os
import signal
import socket
import sys
import threading

from vmfs.commands import machines
from vmfs.machine.gdb import handover
from vmfs.machine.gdb.packets import frame
from vmfs.words.errors import EngineFailed, Invalid, NotPermitted, VmfsError

_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    machines.add_machine(parser)
    parser.add_argument("words", nargs="*", default=[], metavar="x86-64|i386|i8086|linear",
                        help="how registers are described to gdb (docs/debugging.md)")


def run(arguments: argparse.Namespace) -> int:
    machine = str(machines.machine(arguments.machine))
    # A terminal's ^C is for gdb, which says by a byte that the guest is to be stopped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = _open(machine)
    connection = _hand_over(machine, stream, arguments.words) if _is_one_socket() else None
    if connection is None:
        _copy(machine, stream, arguments.words)
        return 0
    os.close(stream)
    while connection.recv(_CHUNK):  # nothing is said: it ends with the session
        pass
    return 0


def _is_one_socket() -> bool:
    """Whether standard input and output are one, as a gdb gives it to what it starts."""
    ours, theirs = os.fstat(0), os.fstat(1)
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino) and handover.is_stream(0)


def _hand_over(machine: str, stream: int, words: list[str]) -> socket.socket | None:
    """The connection that lasts as long as the session; None where the server is out of reach but for its files."""
    return handover.send(_ask(machine, stream, handover.QUERY + b":" + ",".join(words).encode()), 0)


def _copy(machine: str, stream: int, words: list[str]) -> None:
    """Between standard input and output and the stream."""
    if words:
        reply = _ask(machine, stream, b"Qvmfs.Layout:" + ",".join(words).encode())
        _write(stream, b"+")
        if reply != b"OK":
            raise _reason(machine, OSError(errno.EINVAL, "there is no such layout"))
    outward = threading.Thread(target=_copy_out, args=(stream,), daemon=True)
    started = False
    while data := os.read(0, _CHUNK):
        try:
            _write(stream, data)
        except OSError as failure:
            if failure.errno == errno.ENODEV:  # the session has ended, or the machine has
                break
            raise _reason(machine, failure) from None
        if not started:
            outward.start()
            started = True
    # What is on its way out when gdb has closed its end is for nobody.
    os.close(stream) if not started else None


def _open(machine: str) -> int:
    path = os.path.join(machine, "gdb.stream")
    try:
        return os.open(path, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        raise Invalid(f"{machine} is no machine: there is no {path}") from None
    except PermissionError:
        raise NotPermitted(f"{path} is not yours to open") from None
    except OSError as failure:
        raise EngineFailed(f"{path}: {os.strerror(failure.errno or errno.EIO)}") from None


def _ask(machine: str, stream: int, payload: bytes) -> bytes:
    """One of vmfs's own packets, before gdb says anything, and its reply."""
    try:
        _write(stream, frame(payload))
    except OSError as failure:
        raise _reason(machine, failure) from None
    said = b""
    while b"#" not in said[:-2]:
        part = os.pread(stream, _CHUNK, 0)
        if not part:
            raise EngineFailed(f"{machine}: the session has ended")
        said += part
    return said[said.index(b"$") + 1 : said.rindex(b"#")]


def _reason(machine: str, failure: OSError) -> VmfsError:
    """The sentence that the machine has for it."""
    try:
        with open(os.path.join(machine, "error")) as file:
            sentence = file.read().strip()
    except OSError:
        sentence = ""
    return EngineFailed(f"{machine}: {sentence or failure.strerror}")


def _write(stream: int, data: bytes) -> None:
    while data:
        data = data[os.pwrite(stream, data, 0) :]


def _copy_out(stream: int) -> None:
    """Until the session ends, and the program with it."""
    try:
        while data := os.pread(stream, _CHUNK, 0):
            while data:
                data = data[os.write(1, data) :]
    except OSError as failure:
        if failure.errno not in (errno.ENODEV, errno.EPIPE):
            print(f"vmfs gdb: {os.strerror(failure.errno or errno.EIO)}", file=sys.stderr)
    os._exit(0)
