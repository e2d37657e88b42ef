"""`vmfs mount`: check what can be checked, then serve in the background or the foreground."""

import argparse
import dataclasses
import importlib.util
import os
import shutil
from pathlib import Path

from vmfs.commands import daemon
from vmfs.commands.options import argument, count, engine, parse_options, size
from vmfs.host import mounts
from vmfs.host.settings import MountSettings
from vmfs.words.errors import EngineFailed, Invalid, NotPermitted, Unsupported

NEEDED = ("pyfuse3", "trio", "pyseccomp")  # of the extra `mount` in pyproject.toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="an existing directory")
    parser.add_argument("-f", "--foreground", action="store_true",
                        help="stay in the foreground until it is unmounted; the log goes to stderr")
    parser.add_argument("--engine", type=argument(engine), metavar="auto|kvm|emulator",
                        help="what new machines run on (auto: the faster one here)")
    parser.add_argument("--allow-other", action="store_true", help="let other users see the mount")
    parser.add_argument("--max-vms", type=argument(count), metavar="N",
                        help="at most so many machines at a time (0: any number)")
    parser.add_argument("--max-mem", type=argument(size), metavar="SIZE",
                        help="at most so much memory for all of them together, as 512M or 2G (0: no limit)")
    parser.add_argument("--max-vms-user", type=argument(count), metavar="N", help="at most so many of one user")
    parser.add_argument("--max-mem-user", type=argument(size), metavar="SIZE",
                        help="at most so much memory for those of one user")
    parser.add_argument("--max-waiting-user", type=argument(count), metavar="N",
                        help="at most so many calls of one user wait at a time (2000)")
    parser.add_argument("--log", type=Path, metavar="FILE",
                        help="log there (else: syslog, where there is one)")
    parser.add_argument("--debug", action="store_true", help="log each request")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...",
                        type=argument(lambda text: parse_options([text]) and text),
                        help="the same as engine=, allow_other, max_vms=, max_mem= and so on; and those of FUSE")


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    directory = mountpoint(arguments.directory)
    log = arguments.log.absolute() if arguments.log else None
    if log:
        try:
            log.open("a").close()
        except OSError as failure:
            raise Invalid(f"cannot write the log {arguments.log}: {os.strerror(failure.errno)}") from None
    check_fuse(settings)
    serve = daemon.foreground if arguments.foreground else daemon.background
    return serve(directory, settings, log)


def settings_of(arguments: argparse.Namespace) -> MountSettings:
    """What the options say; a long option wins over the same one in `-o`."""
    settings = parse_options(arguments.options)
    given = {
        "engine": arguments.engine,
        "max_vms": arguments.max_vms,
        "max_memory": arguments.max_mem,
        "max_vms_user": arguments.max_vms_user,
        "max_memory_user": arguments.max_mem_user,
        "max_waiting_user": arguments.max_waiting_user,
        "allow_other": arguments.allow_other or None,
        "debug": arguments.debug or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(settings, **given)


def mountpoint(text: str) -> Path:
    """The absolute path of a directory that can be mounted on. Raises Invalid, saying why it cannot.

    What a killed server left there (every access answers ENOTCONN) is unmounted first.
    """
    try:
        if mounts.is_dead(text):
            mounts.unmount(text, lazy=True)
        path = Path(os.path.realpath(text, strict=True))
        is_directory = path.is_dir()
    except FileNotFoundError:
        raise Invalid(f"{text} does not exist") from None
    except OSError as failure:
        raise Invalid(f"{text}: {os.strerror(failure.errno)}") from None
    if not is_directory:
        raise Invalid(f"{text} is not a directory")
    mounted = mounts.at(path)
    if mounted and mounted.is_vmfs:
        raise Invalid(f"{text} is a vmfs mount already")
    if not os.access(path, os.W_OK | os.X_OK):
        raise NotPermitted(f"{text} is not yours to mount on: it must be writable")
    return path


def check_fuse(settings: MountSettings) -> None:
    """Raise, with the way out, for what would keep any FUSE file system from being mounted."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise Unsupported(f"a mount needs {' and '.join(missing)}, which a client does not: pip install 'vmfs[mount]'")
    if not os.path.exists("/dev/fuse"):
        raise EngineFailed("/dev/fuse does not exist: load the fuse module (modprobe fuse), or give the"
                           " container the device (--device /dev/fuse)")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise NotPermitted("/dev/fuse may not be opened by this user: chmod 666 /dev/fuse")
    if not shutil.which("fusermount3"):
        raise EngineFailed("fusermount3 is not installed: apt-get install fuse3")
    if os.geteuid() and (settings.allow_other or "allow_root" in settings.fuse_options):
        if not mounts.user_allow_other():
            raise NotPermitted("allow_other needs the line user_allow_other in /etc/fuse.conf, or root")


