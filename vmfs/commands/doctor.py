"""`vmfs doctor`: what of the host vmfs can use, what is missing, what that means and how to get it.

CHECKS is the list, a function each, from what no mount works without to what only some features want.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import grp
import gzip
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vmfs import __version__
from vmfs.host import mounts

OK, WARN, MISSING = "ok", "warn", "missing"

CAP_SYS_ADMIN = 21                          # <linux/capability.h>
PASSTHROUGH_SINCE = (6, 9)                  # FUSE_PASSTHROUGH, Documentation/filesystems/fuse-passthrough.rst


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """OK; WARN: mounts work, with less; MISSING: no mount works before it is there."""
    meaning: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.name:<18} {self.meaning}"
        return line if not self.remedy else f"{line}\n{'':<27} -> {self.remedy}"


def packages() -> Iterator[Finding]:
    for name in ("trio", "pyfuse3"):
        try:
            yield Finding(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, MISSING, f"is not installed for {sys.executable}", "pip install 'vmfs[mount]'")


def dev_fuse() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        yield Finding("/dev/fuse", MISSING, "does not exist: no FUSE file system can be mounted",
                      "modprobe fuse; for a container: --device /dev/fuse")
    except PermissionError:
        yield Finding("/dev/fuse", MISSING, "may not be opened by this user", "chmod 666 /dev/fuse, as root")
    except OSError as failure:
        yield Finding("/dev/fuse", MISSING, os.strerror(failure.errno),
                      "for a container: --device /dev/fuse (its device cgroup must allow it)")
    else:
        yield Finding("/dev/fuse", OK, "opens for reading and writing")


def fusermount() -> Iterator[Finding]:
    path = shutil.which("fusermount3")
    if path is None:
        yield Finding("fusermount3", MISSING, "is not installed: it mounts, and unmounts when a server dies",
                      "apt-get install fuse3")
    elif os.geteuid() and not os.stat(path).st_mode & stat.S_ISUID:
        yield Finding("fusermount3", MISSING, f"{path} is not setuid root: only root can mount",
                      f"chmod u+s {path}")
    else:
        yield Finding("fusermount3", OK, path)


def sys_admin() -> Iterator[Finding]:
    if capabilities() >> CAP_SYS_ADMIN & 1:
        yield Finding("CAP_SYS_ADMIN", OK, "held")
    else:
        yield Finding("CAP_SYS_ADMIN", WARN, "not held: mem goes through the page cache, coherent at each"
                      " start and stop of a run; fusermount3 mounts", "run as root to have mem shared live")


def capabilities() -> int:
    """The effective capabilities of this process, a bit each."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def allow_other() -> Iterator[Finding]:
    if mounts.user_allow_other():
        yield Finding("user_allow_other", OK, "set in /etc/fuse.conf: any user may give --allow-other")
    elif os.geteuid() == 0:
        yield Finding("user_allow_other", OK, "not set, and root needs it not: --allow-other works")
    else:
        yield Finding("user_allow_other", WARN, "not set: --allow-other is refused, and other users, root"
                      " among them, cannot look into a mount of yours",
                      "the line user_allow_other in /etc/fuse.conf")


def hooks() -> Iterator[Finding]:
    try:
        from vmfs.fs import hooks
        status = hooks.status()
    except ImportError as failure:
        yield Finding("request hooks", MISSING, f"cannot be loaded: {failure}", "make setup builds them")
        return
    yield Finding("request hooks", OK if status.interrupts else WARN, status.interrupts_reason)


def passthrough() -> Iterator[Finding]:
    release = platform.release()
    numbers = tuple(int(each) for each in release.split("-")[0].split(".")[:2] if each.isdigit())
    if numbers < PASSTHROUGH_SINCE:
        yield Finding("passthrough", WARN, f"Linux {release} has none: mem goes through the page cache",
                      "Linux 6.9 or later")
    elif not capabilities() >> CAP_SYS_ADMIN & 1:
        yield Finding("passthrough", WARN, f"Linux {release} has it, for CAP_SYS_ADMIN only", "run as root")
    elif kernel_option("CONFIG_FUSE_PASSTHROUGH") is False:
        yield Finding("passthrough", WARN, f"not in this Linux {release}: mem goes through the page cache",
                      "a kernel with CONFIG_FUSE_PASSTHROUGH=y")
    else:
        yield Finding("passthrough", OK, f"Linux {release} has it: mem can be the guest's memory itself")


def kernel_option(name: str) -> bool | None:
    """Whether this kernel was built with an option; None if its configuration is not to be found."""
    for path, read in (("/proc/config.gz", gzip.open), (f"/boot/config-{platform.release()}", open)):
        try:
            with read(path, "rt") as lines:
                return any(line.rstrip() == f"{name}=y" for line in lines)
        except OSError:
            continue
    return None


KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE00, 0xAE01, 0xAE41    # <linux/kvm.h>
KVM_API_VERSION = 12


def may_open(device: os.stat_result) -> str:
    """How a user comes to open a device that its group may open, or none but its owner."""
    if device.st_gid and stat.S_IMODE(device.st_mode) & 0o060 == 0o060:
        try:
            group = grp.getgrgid(device.st_gid).gr_name
        except KeyError:
            group = str(device.st_gid)
        return f"usermod -aG {group} USER, and log in anew"
    return "chgrp kvm /dev/kvm; chmod 660 /dev/kvm; usermod -aG kvm USER, as root, and log in anew"


def dev_kvm() -> Iterator[Finding]:
    without = "new machines run on the emulator"
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield Finding("/dev/kvm", WARN, f"does not exist: {without}",
                      "modprobe kvm_intel or kvm_amd, with virtualization on in the firmware or the host")
        return
    except PermissionError:
        yield Finding("/dev/kvm", WARN, f"may not be opened by this user: {without}",
                      may_open(os.stat("/dev/kvm")))
        return
    except OSError as failure:
        yield Finding("/dev/kvm", WARN, f"{os.strerror(failure.errno)}: {without}")
        return
    opened = [device]
    try:
        version = fcntl.ioctl(device, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            yield Finding("/dev/kvm", WARN, f"speaks version {version} of its interface, not 12: {without}")
            return
        opened.append(fcntl.ioctl(device, KVM_CREATE_VM))
        opened.append(fcntl.ioctl(opened[-1], KVM_CREATE_VCPU))
        yield Finding("/dev/kvm", OK, "makes machines and CPUs")
    except OSError as failure:
        reason = os.strerror(failure.errno)
        yield Finding("/dev/kvm", WARN, f"opens but makes no machine ({reason}): {without}",
                      "another hypervisor may hold the CPU's virtualization; dmesg says more")
    finally:
        for fd in reversed(opened):
            os.close(fd)


def engines() -> Iterator[Finding]:
    try:
        from vmfs.engine import describe
    except ImportError as failure:
        yield Finding("engines", MISSING, f"cannot be loaded: {failure}", "make setup")
        return
    for each in describe():
        speed = f"{each.speed:.1f} million instructions a second of kernel code" if each.speed else ""
        said = (each.reason, speed, "preferred" if each.preferred else "")
        yield Finding(f"engine {each.name}", OK if each.available else WARN, ", ".join(filter(None, said)))


# What each layer keeps a machine's process from, and how to have it.
_LAYERS = {
    "seccomp": ("system calls beyond computing are refused", "apt-get install libseccomp2; pip install pyseccomp"),
    "no_new_privs": ("no program gives it rights", ""),
    "limits": (
        "the kernel bounds its descriptors, the length of its files (RLIMIT_FSIZE of the maker) and, where there is a"
        " limit on memory, its heap; memory files (RAM, images) it counts itself",
        "",
    ),
    "user": ("a machine's process is its maker's", "run the server as root"),
    "namespaces": ("it sees no file, network or process of the host", "run the server as root (CAP_SYS_ADMIN)"),
}


def sandbox() -> Iterator[Finding]:
    """Of a machine's process: a layer a line."""
    try:
        from vmfs.host.sandbox import Sandbox
    except ImportError as failure:
        yield Finding("sandbox", MISSING, f"cannot be loaded: {failure}", "make setup")
        return
    for name, why in Sandbox().layers.items():
        meaning, remedy = _LAYERS[name]
        if why:
            yield Finding(f"sandbox {name}", WARN, f"does not hold: {why}", remedy)
        else:
            yield Finding(f"sandbox {name}", OK, meaning)


def cgroup() -> Iterator[Finding]:
    """What bounds the memory of all processes of a mount together, memory files too."""
    most = cgroup_memory()
    if most is None:
        yield Finding("memory cgroup", OK, "none bounds a mount's processes together; MemoryMax= of systemd would, also"
                      " those that were taken over")
    else:
        yield Finding("memory cgroup", OK, f"all processes of a mount have at most {most >> 20} MiB together")


def cgroup_memory(proc: str = "/proc/self", root: str = "") -> int | None:
    """The smallest limit on memory of the cgroups that a process is in; None where there is none. cgroups(7)."""
    def limits(mount: str, at: str, name: str) -> Iterator[int]:
        while True:
            with contextlib.suppress(OSError, ValueError):      # "max", and what a container does not see
                yield int(Path(f"{root}{mount}{at}/{name}").read_text())
            if at in ("", "/"):
                return
            at = at.rpartition("/")[0]

    try:
        mounts_there = [line.split() for line in Path(f"{proc}/mountinfo").read_text().splitlines()]
        memberships = [line.split(":", 2) for line in Path(f"{proc}/cgroup").read_text().splitlines()]
    except OSError:
        return None
    found: list[int] = []
    for _, controllers, path in memberships:
        for words in mounts_there:
            where, kind, options = words[4], words[words.index("-") + 1], words[-1].split(",")
            if not controllers and kind == "cgroup2":
                found += limits(where, path, "memory.max")
            elif "memory" in controllers.split(",") and kind == "cgroup" and "memory" in options:
                found += limits(where, path, "memory.limit_in_bytes")
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min((most for most in found if most < there), default=None)


F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 2, 4        # <linux/fcntl.h>


def memory() -> Iterator[Finding]:
    try:
        fd = os.memfd_create("vmfs-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as failure:
        yield Finding("memfd", MISSING, f"{os.strerror(failure.errno)}: RAM cannot be made", "")
        return
    try:
        os.ftruncate(fd, 1 << 20)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    except OSError as failure:
        yield Finding("memfd", MISSING, f"cannot be sized or sealed: {os.strerror(failure.errno)}", "")
        return
    finally:
        os.close(fd)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY:
        yield Finding("memfd", WARN, f"files, and so a machine's RAM, end at {largest >> 20} MiB",
                      "ulimit -f unlimited")
    else:
        yield Finding("memfd", OK, f"sealed; {available() >> 20} MiB of memory are available")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files < 4096:
        yield Finding("open files", WARN, f"at most {files}: enough for about {files // 16} machines",
                      "ulimit -Hn 65536")


def available() -> int:
    """Bytes of memory that the kernel estimates can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def trial_mount() -> Iterator[Finding]:
    """The proof: mount, make a machine, remove it, unmount, as a user would."""
    name = "trial mount"
    command = [sys.executable, "-P", "-m", "vmfs.cli"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vmfs-doctor-", ignore_cleanup_errors=True) as directory:
        try:
            done = subprocess.run([*command, "mount", directory], capture_output=True, text=True)
        except OSError as failure:
            yield Finding(name, MISSING, f"{sys.executable} cannot be started: {os.strerror(failure.errno)}",
                          "every directory above it must let this user through")
            return
        if done.returncode:
            yield Finding(name, MISSING, f"failed: {done.stderr.strip()}", "see above")
            return
        try:
            os.mkdir(f"{directory}/trial")
            engine = Path(directory, "trial/engine").read_text().strip()
            counters = dict(line.split() for line in Path(directory, "trial/stat").read_text().splitlines())
            os.rmdir(f"{directory}/trial")
        except OSError as failure:
            yield Finding(name, MISSING, f"mounted, but a machine cannot be made: {failure}",
                          "vmfs mount --log FILE DIR, and then see FILE")
            return
        finally:
            mounts.unmount(directory, lazy=True)
    took = time.monotonic() - started
    mem, signals = counters["memory_served_by"], counters["signals_noticed_by"]
    yield Finding(name, OK, f"a machine on {engine}, its mem by {mem}, signals by {signals}, in {took:.1f} s")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    packages, dev_fuse, fusermount, memory, sys_admin, allow_other, hooks, passthrough, dev_kvm, engines,
    sandbox, cgroup,
)


def examine() -> list[Finding]:
    """All findings. The trial mount comes last, and only if nothing that it needs is missing."""
    found = [each for check in CHECKS for each in check()]
    if all(each.status != MISSING for each in found):
        found += trial_mount()
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same, for programs")


def run(arguments: argparse.Namespace) -> int:
    found = examine()
    works = all(each.status != MISSING for each in found)
    if arguments.json:
        findings = [dataclasses.asdict(each) for each in found]
        print(json.dumps({"version": __version__, "works": works, "findings": findings}, indent=2))
    else:
        for each in found:
            print(each)
    return 0 if works else 1
