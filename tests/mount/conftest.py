"""Real mounts for tests that are clients of one."""

import os
import shutil
import subprocess
import sys

import pytest

from vmfs.engine import ENGINES
from vmfs.errors import VmfsError


def reason_against(engine):
    """Why there can be no mount with that engine here, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is not accessible"
    if not shutil.which("fusermount3"):
        return "fusermount3 is not installed"
    try:
        availability = engine.load().probe()
    except VmfsError as error:
        return str(error)
    return None if availability.available else f"{engine.name}: {availability.reason}"


@pytest.fixture(scope="session", params=ENGINES, ids=lambda engine: engine.name)
def mount(request, tmp_path_factory):
    """The directory of a mount, one for each engine; behind all tests, its log shows no traceback."""
    reason = reason_against(request.param)
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("mount")
    log = tmp_path_factory.mktemp("log") / "log"
    vmfs = [sys.executable, "-m", "vmfs.cli"]
    subprocess.run([*vmfs, "mount", "--engine", request.param.name, "--log", log, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run([*vmfs, "umount", directory], check=True)
    assert "Traceback" not in log.read_text()
