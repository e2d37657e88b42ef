"""`vmfs umount`: take a mount away, dead or alive."""

import argparse

from vmfs.host import mounts
from vmfs.words.errors import Invalid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="where it is mounted")
    parser.add_argument("-l", "--lazy", action="store_true",
                        help="take it out of sight at once, though it is in use; it ends with its last user")


def run(arguments: argparse.Namespace) -> int:
    mounted = mounts.at(arguments.directory)
    if mounted is None or not mounted.is_vmfs:
        raise Invalid(f"{arguments.directory} is not a vmfs mount")
    mounts.unmount(arguments.directory, lazy=arguments.lazy)
    return 0
