"""How the hooks load, each way in a process of its own, and what they answer without a mount."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from vmfs.fs.hooks import _fuse, status
from vmfs.fs.passthrough import Backing

TELL = "import json; from vmfs.fs.hooks import _fuse, status; print(json.dumps(vars(status())))"


def loaded(program, **environment):
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True,
                          text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_loaded_first_they_take():
    told = loaded(TELL)
    assert told["interrupts"] is True
    assert (told["passthrough"], told["passthrough_reason"]) == (False, "nothing is mounted yet")


@pytest.mark.parametrize("program, environment, reason", [
    (f"import pyfuse3; {TELL}", {}, "pyfuse3 was imported before vmfs.fs.hooks"),
    (TELL, {"VMFS_NO_FUSE_HOOKS": "1"}, "switched off by VMFS_NO_FUSE_HOOKS"),
])
def test_where_they_do_not_take_the_reason_is_told(program, environment, reason):
    told = loaded(program, **environment)
    assert (told["interrupts"], told["passthrough"], told["passthrough_reason"]) == (False, False, reason)
    assert told["interrupts_reason"].startswith(f"{reason}; ")


def test_passthrough_can_be_switched_off_alone():
    told = loaded(TELL, VMFS_NO_PASSTHROUGH="1")
    assert told["interrupts"] is True
    assert told["passthrough_reason"] == "switched off by VMFS_NO_PASSTHROUGH"


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed (binutils)")
def test_other_libraries_do_not_see_its_symbols_any_more_than_needed():
    """Global are only the functions of libfuse and the module's initialization."""
    listed = subprocess.run(["nm", "-D", "--defined-only", _fuse.__file__], capture_output=True, text=True,
                            check=True)
    names = {line.split()[2].partition("@")[0] for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith("__odr_asan")} == {
        "PyInit__fuse", "fuse_reply_open", "fuse_session_fd", "fuse_session_process_buf", "fuse_session_receive_buf"}


def test_without_a_mount_nothing_is_served(tmp_path):
    assert _fuse.current_request() is None
    assert _fuse.current_unique() == 0
    assert _fuse.request(2) is None
    assert not status().passthrough
    assert not _fuse.lane_serves()
    for call in (lambda: _fuse.backing_open(0), lambda: _fuse.backing_close(1),
                 lambda: _fuse.passthrough_next_open(1), lambda: _fuse.passthrough_open(2, 1)):
        with pytest.raises(OSError) as refused:
            call()
        assert refused.value.errno == errno.EOPNOTSUPP
    with open(tmp_path / "file", "w+b") as file:
        backing = Backing(file.fileno())
        assert backing.answer_open() is False
        assert backing.answer_open(2) is False
        backing.close()


def test_a_request_is_made_by_the_kernel_only():
    with pytest.raises(TypeError):
        _fuse.Request()
    with pytest.raises(OverflowError):
        _fuse.request(-1)


def test_a_library_that_is_no_libfuse_is_refused():
    with pytest.raises(OSError, match="libfuse3"):
        _fuse.bind("libc.so.6")
    with pytest.raises(OSError, match="not loaded"):
        _fuse.bind("/nowhere/libfuse3.so.3")
