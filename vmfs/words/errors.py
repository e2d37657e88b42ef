"""What can go wrong, each with its errno: the one place where the two are tied together.

Every layer raises these; `vmfs.fs.operations` turns them into the errno of a system call and leaves
the sentence in the VM's `error` file. A sentence names the field, file or ioctl, says what was wrong
with it, and ends without a full stop.
"""

import errno


class VmfsError(Exception):
    """An expected failure. `errno` is the number a system call answers with, `str()` the reason, and `line` the line
    of a text that it is about, from 1."""

    errno: int = errno.EIO

    def __init__(self, reason: str = "", *, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line

    def __str__(self) -> str:
        reason = super().__str__()
        return reason if self.line is None else f"line {self.line}: {reason}"


class Invalid(VmfsError):
    """EINVAL: it does not parse, or names something that cannot be."""

    errno = errno.EINVAL


class Busy(VmfsError):
    """EBUSY: it cannot be done while the machine runs."""

    errno = errno.EBUSY


class Gone(VmfsError):
    """ENODEV: the machine was removed."""

    errno = errno.ENODEV


class PastEnd(VmfsError):
    """EFBIG: a write past the end of a file of fixed size."""

    errno = errno.EFBIG


class BadAddress(VmfsError):
    """EFAULT: no memory is mapped at a guest address."""

    errno = errno.EFAULT


class NotThere(VmfsError):
    """ENOENT: a name that nothing has."""

    errno = errno.ENOENT


class AlreadyThere(VmfsError):
    """EEXIST: a name that something has."""

    errno = errno.EEXIST


class NotPermitted(VmfsError):
    """EPERM: not the caller's to make, change or remove."""

    errno = errno.EPERM


class Unsupported(VmfsError):
    """EOPNOTSUPP: this engine cannot do it."""

    errno = errno.EOPNOTSUPP


class WouldBlock(VmfsError):
    """EAGAIN: it would have to wait, and the caller asked not to."""

    errno = errno.EAGAIN


class Interrupted(VmfsError):
    """EINTR: a signal came for the caller."""

    errno = errno.EINTR


class LimitReached(VmfsError):
    """ENOSPC: over a limit of the mount (`--max-vms`, `--max-mem`), of the server, or of a machine."""

    errno = errno.ENOSPC


class EngineFailed(VmfsError):
    """EIO: the engine or the host failed; the log says how."""

    errno = errno.EIO


class ProcessFailed(EngineFailed):
    """EIO: a machine's process is gone, or did not begin, or is not what it should be. It is no bug of the server's."""


class HostError(VmfsError):
    """The host refused what a user's line asked of it: the errno that the user would have got."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.errno = number


_OUT_OF = {
    errno.EMFILE: "file descriptor left (ulimit -n)",
    errno.ENFILE: "file descriptor left: the host's limit is reached",
    errno.ENOMEM: "memory left",
    errno.EFBIG: "room for so long a file (RLIMIT_FSIZE of the machine's maker)",
}


def known(error: BaseException) -> BaseException:
    """`error`, or LimitReached where it comes of it that the server has no descriptor, thread or memory left.

    Any call may fail so, in any layer: what it was raised from is looked at, too. A VmfsError with an errno of its own
    stays as it is.
    """
    if isinstance(error, VmfsError) and error.errno != errno.EIO:
        return error
    cause: BaseException | None = error
    while cause is not None:
        missing = None
        if isinstance(cause, OSError):
            missing = _OUT_OF.get(cause.errno or 0)
        elif isinstance(cause, MemoryError):
            missing = _OUT_OF[errno.ENOMEM]
        elif isinstance(cause, RuntimeError) and "can't start new thread" in str(cause):
            missing = "thread left"
        if missing is not None:
            return LimitReached(f"the server has no {missing}")
        cause = cause.__cause__ or cause.__context__
    return error
