"""The mount table, as far as the commands need it."""

import dataclasses
import errno
import os
import re
import subprocess
from pathlib import Path

from vmfs.words.errors import Busy, EngineFailed, NotPermitted


@dataclasses.dataclass(frozen=True)
class Mount:
    path: str
    kind: str
    """The file system type, e.g. "fuse.vmfs"."""
    source: str
    device: int
    """As st_dev of its root; its minor number names /sys/fs/fuse/connections/N."""
    user: int | None = None
    """The user that has mounted it, where the file system says so: FUSE does (fuse(4), user_id)."""

    @property
    def is_vmfs(self) -> bool:
        return self.kind == "fuse.vmfs"


def table() -> list[Mount]:
    """Every mount of this namespace, in the order they were made (proc_pid_mountinfo(5))."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source, *options) = before.split(" "), after.split(" ")
        major, _, minor = fields[2].partition(":")
        user = re.search(r"(?:^|,)user_id=([0-9]+)", options[-1] if options else "")
        device = os.makedev(int(major), int(minor))
        found.append(Mount(unescape(fields[4]), kind, unescape(source), device, int(user[1]) if user else None))
    return found


def unescape(text: str) -> str:
    """A field of mountinfo: blanks, tabs, newlines and backslashes are octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def at(path: str | Path) -> Mount | None:
    """The uppermost mount whose root is `path`, if one is. A dead one counts: nothing of it is looked at."""
    where = os.path.realpath(path)      # what cannot be looked at counts as no link
    matching = [each for each in table() if each.path == where]
    return matching[-1] if matching else None


def is_dead(path: str | Path) -> bool:
    """Whether `path` is a vmfs mount whose server has gone without unmounting it.

    statfs(2) asks the server; stat(2) is answered from the kernel's cache once somebody has looked.
    """
    try:
        os.statvfs(path)
    except OSError as failure:
        if failure.errno == errno.ENOTCONN:
            mounted = at(path)
            return mounted is not None and mounted.is_vmfs
    return False


def has_room(path: str | Path) -> bool:
    """Whether machines can be made in a mount: not over its limit, nor where the process that makes them is gone."""
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    return found.f_files == 0 or found.f_favail > 0


def unmount(path: str | Path, lazy: bool = False) -> None:
    """Unmount `path`, through fusermount3(1), which works for root and for the user whose mount it is.

    Raises Busy if it is in use (unless `lazy`), NotPermitted if it is another user's, else EngineFailed.
    """
    target = os.path.realpath(path)  # fusermount3 follows no link
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", target]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        raise EngineFailed("fusermount3 is not installed: apt-get install fuse3") from None
    if done.returncode == 0:
        return
    reason = done.stderr.strip().removeprefix("fusermount3: ")
    if os.strerror(errno.EBUSY) in reason:
        raise Busy(f"{path} is in use: a file of it is open or a shell stands in it (--lazy does not wait)")
    if os.strerror(errno.EPERM) in reason or "not found in /etc/mtab" in reason:
        raise NotPermitted(f"{path} is not yours to unmount")
    raise EngineFailed(reason or f"fusermount3 failed with code {done.returncode}")


def user_allow_other() -> bool:
    """Whether /etc/fuse.conf lets users other than root give allow_other."""
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.split("#")[0].strip() == "user_allow_other" for line in lines)
