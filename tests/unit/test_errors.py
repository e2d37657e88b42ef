"""What a failure is known as: that of a server which has nothing left is the caller's to hear, and no bug."""

import errno

import pytest

from vmfs.words.errors import Busy, EngineFailed, LimitReached, VmfsError, known


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EMFILE, "open"), "the server has no file descriptor left (ulimit -n)"),
        (OSError(errno.ENFILE, "open"), "the server has no file descriptor left: the host's limit is reached"),
        (OSError(errno.ENOMEM, "mmap"), "the server has no memory left"),
        (MemoryError(), "the server has no memory left"),
        (RuntimeError("can't start new thread"), "the server has no thread left"),
        (caused(EngineFailed("KVM_CREATE_VM: Too many open files"), OSError(errno.EMFILE, "")), "file descriptor"),
        (caused(ValueError("odd"), caused(EngineFailed("x"), MemoryError())), "memory"),
    ],
)
def test_having_nothing_left_is_a_limit(error, sentence):
    found = known(error)
    assert isinstance(found, LimitReached) and found.errno == errno.ENOSPC and sentence in str(found)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "open"),
        RuntimeError("a bug"),
        EngineFailed("KVM_RUN: Bad address"),
        caused(EngineFailed("KVM_RUN"), OSError(errno.EFAULT, "")),
        caused(Busy("it has an errno of its own"), OSError(errno.EMFILE, "")),
        VmfsError("plain"),
    ],
)
def test_other_failures_stay_what_they_are(error):
    assert known(error) is error
