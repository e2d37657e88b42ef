"""`vmfs gdb`: a pipe between a gdb and a machine, for `target remote | vmfs gdb MACHINE`.

It speaks through the machine's files, so it needs no port and no more rights than those to write them.
"""

import argparse
import errno
import os
import signal
import sys
import threading

from vmfs.errors import EngineFailed, Invalid, NotPermitted, VmfsError

_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", metavar="MACHINE", help="its directory, as /vmfs/demo")
    parser.add_argument("words", nargs="*", metavar="x86-64|i386|i8086|linear",
                        help="how registers are described to gdb (docs/debugging.md)")


def run(arguments: argparse.Namespace) -> int:
    machine = arguments.machine
    # A terminal's ^C is for gdb, which says by a byte that the guest is to be stopped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = _open(machine)
    if arguments.words:
        _set_layout(machine, stream, arguments.words)
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
    return 0


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


def _set_layout(machine: str, stream: int, words: list[str]) -> None:
    """By vmfs's own packet, before gdb says anything."""
    payload = b"Qvmfs.Layout:" + ",".join(words).encode()
    try:
        _write(stream, b"$%b#%02x" % (payload, sum(payload) & 0xFF))
    except OSError as failure:
        raise _reason(machine, failure) from None
    reply = b""
    while b"#" not in reply[:-2]:
        part = os.pread(stream, _CHUNK, 0)
        if not part:
            raise EngineFailed(f"{machine}: the session has ended")
        reply += part
    _write(stream, b"+")
    if b"$OK#" not in reply:
        raise _reason(machine, OSError(errno.EINVAL, "there is no such layout"))


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
