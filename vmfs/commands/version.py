"""`vmfs version`: what is running."""

from vmfs import __version__


def add_arguments(parser):
    """None."""


def run(arguments):
    print(f"vmfs {__version__}")
    return 0
