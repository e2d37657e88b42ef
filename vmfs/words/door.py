"""Door: the one way from a machine to what of the host it may not touch itself.

A machine has no rights to open paths, sockets or interfaces. What a user's line names (`dev/add`, `gdb`) is got through
the door, which has it done with that user's rights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Listening:
    """A socket that listens: `fd` is the caller's, `port` is what it got (0: at a path)."""

    fd: int
    port: int


class Door(Protocol):
    """Every method blocks, raises VmfsError with the errno that the user would have got, and gives descriptors that are
    the caller's. None may be called on the event loop."""

    def open(self, path: str, flags: int) -> int:
        """open(2) of an absolute path of the host."""
        ...

    def tap(self, name: str) -> int:
        """/dev/net/tun, as the tap interface of that name."""
        ...

    def wire(self, name: str) -> int:
        """A port of the wire of that name (vmfs.host.wires): a socket of packets, each a frame."""
        ...

    def listen(self, where: str | tuple[str, int]) -> Listening:
        """A listening socket at a path, or at a numerical address and port."""
        ...

    def unlink(self, path: str) -> None:
        """Remove the socket that `listen` has made there, if it is still that one."""
        ...

    def passt(self, options: tuple[str, ...]) -> tuple[int, int]:
        """A passt of its own, with the words of a line (vmfs.words.nets): a stream socket to it, and its process id. It
        ends when the socket is closed."""
        ...

    def share(self, path: str, read_only: bool) -> int:
        """A process that serves a folder by 9P (vmfs.devices.virtio.share): a stream socket to it."""
        ...

    def unpack(self, path: str, format: str, take: Callable[[int], None]) -> tuple[int, int]:
        """The contents of a disk image of that format ("": as its first bytes say), in a file without a name, and its
        size. `take` is called before so many more bytes of the host's disk are taken."""
        ...

    def reserve(self, what: str, size: int) -> None:
        """Count `size` more bytes for this machine (fewer, if negative). LimitReached where there is no room."""
        ...

    def release(self, what: str, size: int) -> None:
        """Count `size` bytes fewer, soon. Does not block: for a holder of a lock."""
        ...

    def invalidate(self, ranges: list[tuple[int, int]]) -> None:
        """Have pages of RAM, (offset, length), written back and dropped from the kernel's cache; (0, 0) is all."""
        ...
