"""The caller: what a process may do, as the kernel checks it, and how a process of ours becomes it.

The writer of a command file is looked up in /proc when the file is opened: its opener waits for the answer
then, so the process is there and is the right one.

Source: proc_pid_status(5), proc_pid_limits(5), capabilities(7), credentials(7), setrlimit(2).
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import resource
import struct
from collections.abc import Callable

import msgspec

from vmfs.words.errors import HostError, NotPermitted, known

_LIBC = ctypes.CDLL(None, use_errno=True)
_CAPABILITY_VERSION_3 = 0x20080522  # Linux include/uapi/linux/capability.h
_SYS_CAPGET, _SYS_CAPSET = 125, 126
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 4, 24, 8, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
ALL_CAPABILITIES = (1 << 64) - 1
ANY_SIZE = (1 << 63) - 1
_FIELD = re.compile(rb"^(Uid|Gid|Groups|CapEff):\t(.*)$", re.MULTILINE)
_UMASK = re.compile(rb"^Umask:\t([0-7]+)$", re.MULTILINE)
_FILE_SIZE = re.compile(rb"^Max file size +([0-9]+|unlimited) ", re.MULTILINE)


class Credentials(msgspec.Struct, frozen=True, array_like=True):
    """Of a process, as the kernel checks paths with them. `elsewhere`: in what its root or mount namespace differs from
    the server's, "" where paths mean the same to both. `file_size`: how long the files may become that it writes
    (RLIMIT_FSIZE)."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: int = ALL_CAPABILITIES
    elsewhere: str = ""
    file_size: int = ANY_SIZE

    def limit_file_size(self) -> None:
        """This process writes no longer files than they may. A limit that it has itself it keeps."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = min(self.file_size, most if most != resource.RLIM_INFINITY else ANY_SIZE)
        if limit != ANY_SIZE:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def credentials_of(pid: int) -> Credentials | None:
    """Of a running process or thread, or None where it is not visible from here. LimitReached without a descriptor."""
    return _of(pid, _elsewhere)


def limits_of(pid: int) -> Credentials | None:
    """`credentials_of`, without a look at where it is."""
    return _of(pid, lambda pid: "")


def _of(pid: int, elsewhere: Callable[[int], str]) -> Credentials | None:
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as status:
            fields = dict(_FIELD.findall(status.read()))
        uid, gid = int(fields[b"Uid"].split()[3]), int(fields[b"Gid"].split()[3])
        groups = tuple(map(int, fields[b"Groups"].split()))
        return Credentials(uid, gid, groups, int(fields[b"CapEff"], 16), elsewhere(pid), _file_size(pid))
    except (OSError, KeyError, ValueError, IndexError) as error:
        if (failure := known(error)) is not error:
            raise failure from None
        return None


def umask_of(pid: int) -> int | None:
    """Of a running process or thread, or None where it is not visible from here."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as status:
            found = _UMASK.search(status.read())
    except OSError as error:
        if (failure := known(error)) is not error:
            raise failure from None
        return None
    return int(found[1], 8) if found else None


def _file_size(pid: int) -> int:
    """The soft limit: what the process may raise it to counts no more than it does for its own writes."""
    with open(f"/proc/{pid}/limits", "rb", buffering=0) as limits:
        soft = _FILE_SIZE.findall(limits.read())[0]
    return ANY_SIZE if soft == b"unlimited" else min(int(soft), ANY_SIZE)


def _elsewhere(pid: int) -> str:
    """A caller that cannot be looked at (EACCES, of another user's server) is elsewhere, too."""
    try:
        if os.stat(f"/proc/{pid}/ns/mnt").st_ino != _own_mounts():
            return "mount namespace"
        root, own = os.stat(f"/proc/{pid}/root"), os.stat("/")
    except PermissionError:
        return "" if os.geteuid() != 0 else "mount namespace"
    return "" if (root.st_dev, root.st_ino) == (own.st_dev, own.st_ino) else "root directory"


@functools.cache
def _own_mounts() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


def become(who: Credentials) -> None:
    """This process, which has one thread, is `who` from now on, and gets no more rights by any exec.

    NotPermitted where it cannot be. HostError EACCES where the caller sees another tree of files.
    """
    if who.elsewhere:
        raise HostError(13, f"the caller has another {who.elsewhere} than the server, so its paths mean other files")
    who.limit_file_size()
    if os.geteuid() == 0:
        try:
            os.setgroups(who.groups)
            os.setresgid(who.gid, who.gid, who.gid)
            if who.uid:
                os.setresuid(who.uid, who.uid, who.uid)
            limit_capabilities(who.capabilities if who.uid == 0 else 0)
        except OSError as error:
            raise NotPermitted(f"the server cannot take the caller's place: {os.strerror(error.errno or 1)}") from None
    elif who.uid != os.geteuid():
        raise NotPermitted("the server is another user: nothing of the host can be opened for the caller")
    no_new_privileges()


def limit_capabilities(mask: int) -> None:
    """Keep no capability that is not in `mask`: permitted, effective, inheritable, ambient."""
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)  # effective, permitted, inheritable of the low 32, then of the high
    if _LIBC.syscall(_SYS_CAPGET, header, held):
        raise OSError(ctypes.get_errno(), "capget")
    low, high = struct.unpack_from("<4xI8xI", held)
    low, high = low & mask, high & mask >> 32
    if _LIBC.syscall(_SYS_CAPSET, header, struct.pack("<6I", low, low, 0, high, high, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def drop_bounding_set() -> None:
    """No exec gives a capability any more. Does what it may."""
    for number in range(64):
        if _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            break


def no_new_privileges() -> None:
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
