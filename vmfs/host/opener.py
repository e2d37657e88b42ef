"""Openers: short-lived processes that are the caller, and get what a user's line names on the host.

The zygote forks one for each question of a machine (`Work`); it becomes the caller, does it, sends the answer and the
descriptor over a socket of its own, and ends. One that does not come to an end is killed by the server. What a device
needs for longer, passt or a folder's server, goes on as such a process until its socket is closed.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from vmfs.host import hub, unpack
from vmfs.host.credentials import Credentials, HostError, become, limit_capabilities
from vmfs.host.sandbox import Sandbox, die_with_parent
from vmfs.words.commands import Result
from vmfs.words.errors import Invalid, Unsupported, VmfsError
from vmfs.words.nets import passt_options

SOCKET_MODE = 0o600
_FILE_CAPABILITIES = 0b1111  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
BACKLOG = 8

# Linux include/uapi/linux/if_tun.h
TUNSETIFF = 0x4004_54CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
_NAME_LENGTH = 15
_NOBODY = 65_534
_PASST_BUFFER = 8 << 20  # bytes on their way from passt, as far as net.core.wmem_max allows: it loses what is more


class OpenPath(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`mount`: the st_dev of the server's own mount, which no device may have its files on (0: none)."""

    path: str
    flags: int
    mount: int


class OpenTap(msgspec.Struct, frozen=True, array_like=True, tag=True):
    name: str


class Listen(msgspec.Struct, frozen=True, array_like=True, tag=True):
    path: str
    host: str
    port: int
    mount: int = 0


class Unlink(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`made`: the device and inode that the path has to be."""

    path: str
    made: tuple[int, int]


class StartPasst(msgspec.Struct, frozen=True, array_like=True, tag=True):
    options: list[str]


class StartHub(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A wire's process; the socket of its answer is the hub's `control`, and nothing is answered."""


class StartShare(msgspec.Struct, frozen=True, array_like=True, tag=True):
    path: str
    read_only: bool
    mount: int


class StartUnpack(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`format`: of the image, or empty."""

    path: str
    format: str
    mount: int


Work = OpenPath | OpenTap | Listen | Unlink | StartPasst | StartHub | StartShare | StartUnpack


def run(work: Work, who: Credentials, line: socket.socket, sandbox: Sandbox) -> NoReturn:
    """In a process of its own: do it as `who`, answer over `line`, and end."""
    code = 0
    try:
        if isinstance(work, Listen) and work.path.startswith("\0"):  # no path: it means the same everywhere
            who = msgspec.structs.replace(who, elsewhere="")
        if isinstance(work, StartUnpack):
            unpack.load()  # which the user need not be able to read
        become(who)
        die_with_parent()
        _WORKS[type(work)](work, who, _Answer(line), sandbox)
    except VmfsError as error:
        _Answer(line)(error.errno, str(error))
    except OSError as error:
        _Answer(line)(error.errno or errno.EIO, os.strerror(error.errno or errno.EIO))
    except BaseException as error:
        _Answer(line)(errno.EIO, f"{type(error).__name__}: {error}")
        code = 1
    os._exit(code)


class _Answer:
    """Sends the one answer."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line

    def __call__(self, number: int, text: str, fd: int | None = None) -> None:
        packet = msgspec.msgpack.encode(Result(number, text[:500]))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        try:
            self.line.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
        except OSError:  # nobody waits any more
            pass
        self.line.close()


def open_path(path: str, flags: int, mount: int = 0) -> int:
    """open(2) of an absolute path; never blocks on a FIFO. HostError with open's errno.

    Invalid for what lies on the device `mount`: a machine whose disk is a file of its own mount would wait for itself.
    """
    if not path.startswith("/") or "\0" in path:
        raise Invalid(f"{path[:200]!r} is not an absolute path")
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    except OSError as error:
        number = error.errno or errno.EIO
        raise HostError(number, f"{path}: {os.strerror(number)}") from None
    if mount and os.fstat(fd).st_dev == mount:
        os.close(fd)
        raise own_path(path)
    return fd


def own_path(path: str) -> Invalid:
    """Why a path on the mount itself is refused."""
    return Invalid(f"{path} is on this mount itself: its machine would wait for its own answers")


def _open_path(work: OpenPath, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    answer(0, "", open_path(work.path, work.flags, work.mount))


def _open_tap(work: OpenTap, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    if not 0 < len(work.name.encode()) <= _NAME_LENGTH or not work.name.isprintable() or "/" in work.name:
        raise Invalid(f"{work.name[:40]!r} is no interface's name")
    fd = open_path("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("<16sH22x", work.name.encode(), IFF_TAP | IFF_NO_PI))
    except OSError as error:
        raise Unsupported(f"tap {work.name}: {os.strerror(error.errno or errno.EIO)} (TUNSETIFF)") from None
    answer(0, "", fd)


def _listen(work: Listen, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    where = work.path or f"{work.host}:{work.port}"
    try:
        made = _bind_path(work.path, work.mount) if work.path else _bind_tcp(work.host, work.port)
    except OSError as error:
        number = error.errno or errno.EIO
        raise HostError(number, f"{where}: {os.strerror(number)}") from None
    if work.path.startswith("\0"):
        text = "0"
    elif work.path:
        there = os.lstat(work.path)
        text = f"0 {there.st_dev} {there.st_ino}"
    else:
        text = str(made.getsockname()[1])
    answer(0, text, made.fileno())


def _bind_path(path: str, mount: int) -> socket.socket:
    if mount and not path.startswith("\0") and os.stat(os.path.dirname(path)).st_dev == mount:
        raise own_path(path)
    made = socket.socket(socket.AF_UNIX)
    if not path.startswith("\0"):
        os.fchmod(made.fileno(), SOCKET_MODE)  # what bind(2) makes has the mode of the socket
    try:
        made.bind(path)
    except OSError:
        if not _is_dead(path):
            raise
        os.unlink(path)
        made.bind(path)
    made.listen(BACKLOG)
    return made


def _bind_tcp(host: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, port))
    made.listen()
    return made


def _is_dead(path: str) -> bool:
    """A socket that nobody listens on any more: of a server that was killed."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def unlink_dead(path: str, who: Credentials) -> None:
    """In a process of its own: remove what a killed server has left, with the rights of the user who listened."""
    become(who)
    if _is_dead(path):
        os.unlink(path)


def _unlink(work: Unlink, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    there = os.lstat(work.path)
    if (there.st_dev, there.st_ino) == work.made:
        os.unlink(work.path)
    answer(0, "")


def _start_share(work: StartShare, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    from vmfs.host import share_server

    root = open_path(work.path, os.O_PATH | os.O_DIRECTORY, work.mount)
    ours, its = socket.socketpair()
    # Not CAP_FSETID: what its guest writes into loses set-user-ID, be it root's.
    limit_capabilities(_FILE_CAPABILITIES)
    sandbox.filter("share")
    answer(0, "", its.fileno())
    its.close()
    share_server.serve(root, ours, read_only=work.read_only, barred=work.mount or None)


def _start_unpack(work: StartUnpack, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer(0, "", its.fileno())
    its.close()
    unpack.serve(
        work.path, work.format, ours,
        lambda path: open_path(path, os.O_RDONLY, work.mount),
        lambda: open_path(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR),
        lambda: sandbox.filter("helper"),
    )  # fmt: skip


def _start_passt(work: StartPasst, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    """It stays until passt ends, so that passt is always somebody's child."""
    options = passt_options(work.options)
    program = shutil.which("passt")
    if program is None:
        raise Unsupported("passt is not installed (package passt)")
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:  # root's passt is nobody's
        identity = {"user": _NOBODY, "group": _NOBODY, "extra_groups": ()}
    mine, its = socket.socketpair()
    its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PASST_BUFFER)
    ready, pid_file = os.pipe()
    if identity:
        os.fchown(pid_file, _NOBODY, _NOBODY)
    with its, open(os.memfd_create("vmfs-passt-says"), "w+b", buffering=0) as said:
        # It writes its number when it is ready; when it fails the pipe ends.
        process = subprocess.Popen(
            [program, "--foreground", "--quiet", "--stderr", "--fd", str(its.fileno()),
             "--pid", f"/proc/self/fd/{pid_file}", *options],
            pass_fds=(its.fileno(), pid_file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            preexec_fn=die_with_parent,
            **identity,
        )  # fmt: skip
        os.close(pid_file)
        with open(ready, "rb") as pipe:
            is_ready = bool(pipe.read(1))
        if not is_ready:
            mine.close()
            process.kill()
            process.wait()
            said.seek(0)
            lines = [line for line in said.read().decode(errors="replace").splitlines() if "syslog" not in line]
            usage = next((at for at, line in enumerate(lines) if line.startswith("Usage:")), len(lines))
            why = " ".join(lines[:usage][-1:])[:200]
            raise Unsupported(f"passt does not start: {why or 'it does not say why'}")
    answer(0, str(process.pid), mine.fileno())
    mine.close()
    process.wait()


def _start_hub(work: StartHub, who: Credentials, answer: _Answer, sandbox: Sandbox) -> None:
    limit_capabilities(0)
    sandbox.filter("helper")
    hub.serve(answer.line)


_WORKS: dict[type, Callable[[Any, Credentials, _Answer, Sandbox], None]] = {
    OpenPath: _open_path,
    OpenTap: _open_tap,
    Listen: _listen,
    Unlink: _unlink,
    StartPasst: _start_passt,
    StartHub: _start_hub,
    StartShare: _start_share,
    StartUnpack: _start_unpack,
}


