"""What the server of a mount and the process of a machine say to each other: the closed set of messages, and the
channel.

A message is a msgspec struct, packed as an array with its tag, in one packet of a SOCK_SEQPACKET pair; descriptors
go along by SCM_RIGHTS, from the server to the machine. The server takes none: to close what it got might wait for a
file system of its user's; memory it opens by the number that the descriptor has in the machine's process.

The server calls, and each call has a number and one answer (`Done`, `Opened`, `Listed`, `Measured`, or `Failed`); the
machine asks the server for what only the server may do, and each question has a number and one answer (`Granted` or
`Refused`). `Interrupt`, `Close`, `Share`, `Clients`, `Woken` and `Complaint` have none.

First of all the server says whose machine it is (`Become`), and the machine answers that it is there (`Born`), or that
it cannot be (`Failed`).

Both sides decode strictly: what is no message of the set ends the channel (`ChannelBroken`). Neither side trusts the
other: the server because a machine process is its user's, the machine because everything that it gets is bounded.
"""

from __future__ import annotations

import array
import contextlib
import functools
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import trio

VERSION = 1

PACKET_MOST = 192 << 10  # bytes of a packet: what Linux lets through with its default net.core.wmem_max
DATA_MOST = 128 << 10  # bytes of a file's contents in one message
FDS_MOST = 32
ASKED_MOST = 16  # questions of a machine at a time

_SO_PASSRIGHTS = 83  # Linux include/uapi/asm-generic/socket.h

ANY_FLAGS = -1  # of a read or a write: its file's flags are not known


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """One packet."""


class Become(Message, frozen=True):
    """First, and once: the process is a machine of that user's from now on, whose files may become `file_size` bytes
    long, and which may have `memory_most` bytes of memory (0: there is no limit).
    `multiplies`: it is never run, and makes more of itself (`Multiply`)."""

    uid: int
    gid: int
    groups: list[int]
    file_size: int
    memory_most: int
    multiplies: bool = False


# ---- the server's calls. `file` is a path in the machine's directory, "regs" or "reg/rax"


class Open(Message, frozen=True):
    call: int
    file: str
    writing: bool  # not O_RDONLY
    nonblocking: bool
    appending: bool
    walking: bool  # for reading, by a reader of all files of a directory
    uid: int  # whose it is


class Read(Message, frozen=True):
    call: int
    handle: int
    offset: int
    size: int
    flags: int  # the file's, as they are now (O_NONBLOCK), or ANY_FLAGS


class Write(Message, frozen=True):
    call: int
    handle: int
    offset: int
    data: bytes
    flags: int


class Flush(Message, frozen=True):
    """A close(2), of one of the descriptors."""

    call: int
    handle: int


class Close(Message, frozen=True):
    """The last descriptor and the last mapping are gone."""

    handle: int


class Poll(Message, frozen=True):
    """`watch`: tell by `Woken`, once, when the answer may be another. `seen`: the news that a read by the lane
    has seen, or 0."""

    call: int
    handle: int
    watch: bool
    seen: int = 0


class Measure(Message, frozen=True):
    """st_size and st_blocks of files."""

    call: int
    files: list[str]


class Truncate(Message, frozen=True):
    call: int
    file: str
    size: int
    opened: bool  # ftruncate(2), and not truncate(2) or O_TRUNC


class List(Message, frozen=True):
    """The names in a directory that the machine makes: `reg`, `dev`, `cpus`, `snap`, `snap/NAME` and what is in it."""

    call: int
    directory: str


class Find(Message, frozen=True):
    """Whether there is such a file or directory: `Done` with FOUND_ values."""

    call: int
    path: str


class Take(Message, frozen=True):
    """mkdir(2) of `snap/NAME`: a snapshot. `live`: clients have RAM itself, which has to stay what it is."""

    call: int
    name: str
    live: bool


class Remove(Message, frozen=True):
    """rmdir(2) of a directory that the machine has made."""

    call: int
    path: str


class Arrive(Message, frozen=True):
    """In `snap/NAME` a saved machine comes in: into a new directory, or in the place of the snapshot that was taken.
    `live`: as in `Take`."""

    call: int
    name: str
    is_new: bool
    live: bool


class Make(Message, frozen=True):
    """A new, empty file of one that comes in."""

    call: int
    path: str


class Fill(Message, frozen=True):
    """A file of one that comes in has what the sealed memfd has that the host's path `source` names."""

    call: int
    path: str
    source: str


class Rename(Message, frozen=True):
    """A file of one that comes in, by another name, in the place of the one that has it."""

    call: int
    path: str
    new: str


class Fork(Message, frozen=True):
    """A copy of what the machine is now, or of that snapshot. `live`: as in `Take`."""

    call: int
    snapshot: str
    live: bool


class Hand(Message, frozen=True):
    """Send the files of that copy to the socket that goes along, one after another."""

    call: int
    copy: int


class Inherit(Message, frozen=True):
    """First, of a machine that is a fork: be that copy, whose memory goes along, and last the socket that has its files
    (`files`: there are some)."""

    call: int
    files: bool


class Multiply(Message, frozen=True):
    """Of a machine that multiplies: have one more process that is the same machine. Its end of its own channel goes
    along, on which it says `Born`. After the first of them nothing else is said to this process."""


class Begin(Message, frozen=True):
    """Of a process that came by `Multiply`: what it was asked until now was a rehearsal. Be the copy, of which nobody
    has asked anything."""

    call: int


class Interrupt(Message, frozen=True):
    """A signal came for the caller: end the call soon. It is answered all the same."""

    call: int


class Extents(Message, frozen=True):
    """Where an open file has data: `Done` with native 64-bit numbers, the start and the end of each piece, in order.
    Between them are zeros."""

    call: int
    handle: int


class Lane(Message, frozen=True):
    """The page that C threads of both sides answer hot files by (vmfs/words/lane.h): its descriptor goes along."""

    call: int


class Share(Message, frozen=True):
    """Hand on what the file gives by a ring (vmfs/words/ring.h): the descriptor of its memory goes along. Reads of it
    may be answered by `Placed` from then on."""

    handle: int


class Clients(Message, frozen=True):
    """What clients have open: RAM in the kernel's page cache, so that it must be dropped around runs; any memory of the
    guest for writing, so that it may change unseen."""

    cached: bool
    writing: bool


class Granted(Message, frozen=True):
    """The answer to a question: `text` and the descriptors are what was asked for."""

    ask: int
    text: str = ""


class Refused(Message, frozen=True):
    ask: int
    errno: int
    sentence: str


Call = (
    Open | Read | Write | Flush | Poll | Measure | Truncate | List | Find | Take | Remove
    | Arrive | Make | Fill | Rename | Extents | Fork | Hand | Inherit | Begin | Lane
)
ToMachine = Become | Call | Close | Interrupt | Share | Clients | Multiply | Granted | Refused

FOUND_NOTHING, FOUND_FILE, FOUND_READ_ONLY, FOUND_DIRECTORY = range(4)
FOUND_DRIVE = 4  # a device's directory, with `media` and `image`
FOUND_DISK = 6  # a device's directory, with `image`
FOUND_ARRIVING = 5  # a directory in snap/ into which a saved machine comes
FOUND_CARD = 10  # a device's directory, with `pcap`
FOUND_PORT, FOUND_PRINTER, FOUND_SPEAKER = 7, 8, 9  # of devices, too: with a stream both ways, one of the guest, a tone


# ---- the machine's answers


class Done(Message, frozen=True):
    """Of a write, `unsaved`: the close of the file has something to do; `waits`: it has not been understood yet. Of a
    read, `number` 1: there is nothing after that, until one reads from the beginning again."""

    call: int
    data: bytes = b""
    number: int = 0
    unsaved: bool = False
    waits: bool = False


class Placed(Message, frozen=True):
    """Of a read: what it asks for, some of it at least, is in the ring of its file."""

    call: int


class Opened(Message, frozen=True):
    """`memory`: of `mem` and `framebuffer`, the number of the memory's descriptor in the machine's process."""

    call: int
    handle: int
    tells_closing: bool
    memory: int = -1


class Listed(Message, frozen=True):
    """The names, and of each what `Find` would say."""

    call: int
    names: list[tuple[str, int]]


class Measured(Message, frozen=True):
    """(st_size, st_blocks) of each file, and when what they show last changed, in nanoseconds."""

    call: int
    sizes: list[tuple[int, int]]
    modified_ns: int


class Copied(Message, frozen=True):
    """Of `Fork`: by `copy`, which `Close` lets go, it is kept. `memory`: the numbers of its memory's descriptors in the
    machine's process; the same memory again has the same `same`. `files`: it has files, too, which `Hand` sends."""

    call: int
    copy: int
    same: int
    engine: str
    size: int
    memory: list[int]
    files: bool


class Failed(Message, frozen=True):
    """`logged`: the failure is a bug or the engine's, and its traceback is in the machine's log. `quiet`: it is no
    reason for a sentence in `error` (EAGAIN, EINTR)."""

    call: int
    errno: int
    sentence: str
    logged: bool = False
    quiet: bool = False
    unsaved: bool = False


# ---- what the machine says by itself


class Born(Message, frozen=True):
    """First, after `Become`: the machine is there. `memory`: the number of its RAM's descriptor in its process."""

    version: int
    engine: str
    memory: int


class Woken(Message, frozen=True):
    handle: int


class Complaint(Message, frozen=True):
    """What went wrong where no call failed with it: a gdb's."""

    sentence: str


class OpenPath(Message, frozen=True):
    """open(2) of an absolute host path, with the rights of the opener of the file that call `call` is on.

    What is granted is a socket, on which the opener itself answers by a `Result`: what comes of a user's path never is
    a descriptor of the server's, for to close one may take as long as its file system likes.
    """

    ask: int
    call: int
    path: str
    flags: int


class OpenTap(Message, frozen=True):
    """The tap interface of that name: a descriptor of /dev/net/tun."""

    ask: int
    call: int
    name: str


class JoinWire(Message, frozen=True):
    """A port of the wire of that name between machines of the mount: a socket of packets."""

    ask: int
    call: int
    name: str


class Listen(Message, frozen=True):
    """A listening socket: at a host path, or at a numerical address and port. `text` of the answer is the port it
    got."""

    ask: int
    call: int
    path: str
    host: str
    port: int


class Unlink(Message, frozen=True):
    """Remove the socket that `Listen` made at that path, if it is still that one."""

    ask: int
    path: str


class StartPasst(Message, frozen=True):
    """A passt, and the socket to it; `text` of the answer is its process id."""

    ask: int
    call: int
    options: list[str]


class StartShare(Message, frozen=True):
    """A process that serves a folder by 9P with the rights of the asker, and the socket to it."""

    ask: int
    call: int
    path: str
    read_only: bool


class StartUnpack(Message, frozen=True):
    """A process that unpacks a disk image (vmfs.host.unpack) with the rights of the asker, and the socket to it."""

    ask: int
    call: int
    path: str
    format: str


class Reserve(Message, frozen=True):
    """More (or, below zero, less) of what counts against the limits: Refused with ENOSPC over them."""

    ask: int
    what: str
    size: int


class Invalidate(Message, frozen=True):
    """Write back and drop pages of RAM from the kernel's cache: (offset, length); (0, 0) is all of it."""

    ask: int
    ranges: list[tuple[int, int]]


# What answers a call, if not `Failed`; Done, if it is not here.
ANSWERS = {Open: Opened, Fork: Copied, Read: Done | Placed, List: Listed, Measure: Measured}

Question = (
    OpenPath | OpenTap | JoinWire | Listen | Unlink | StartPasst | StartShare | StartUnpack | Reserve | Invalidate
)
Answer = Done | Placed | Opened | Listed | Measured | Copied | Failed
ToServer = Answer | Question | Born | Woken | Complaint


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What an opener says. `errno` 0: it is done, and `text` says what there is to say. Else `text` is a sentence. The
    descriptor goes along."""

    errno: int
    text: str


# ---- the channel


class ChannelBroken(Exception):
    """The other side is gone, or has said what is no message."""


class ChannelEnded(ChannelBroken):
    """The other side is gone."""


M = TypeVar("M")


_encode = msgspec.msgpack.Encoder().encode


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """To make one takes longer than a message."""
    return msgspec.msgpack.Decoder(kind)


class Channel(Generic[M]):
    """One end of the pair. `kind` is the union of what may come. Used on one trio loop; it owns the socket. Where not
    `takes_fds`, the kernel drops what comes along. Without a socket it is one as soon as it gets one (`attach`)."""

    _socket: socket.socket

    def __init__(self, sock: socket.socket | None, kind: Any, *, takes_fds: bool = True) -> None:
        self._encode = _encode
        self._decode = _decoder(kind).decode
        # Its pages cost nothing until there is a long packet. Private: a process that is forked has its own.
        self._room = mmap.mmap(-1, PACKET_MOST + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._sending = trio.Lock()
        self._fd_room = socket.CMSG_SPACE(4 * FDS_MOST) if takes_fds else 0
        if sock is not None:
            self.attach(sock)

    def attach(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._socket = sock
        if not self._fd_room:
            with contextlib.suppress(OSError):  # since Linux 6.16: then the sender is refused (EPERM)
                sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)

    async def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """ChannelBroken when nobody is there to get it. Descriptors remain the caller's."""
        packet = self._encode(message)
        if len(packet) > PACKET_MOST:
            raise ValueError(f"a message of {len(packet)} bytes")
        if not self._sending.locked() and self._try(packet, fds):
            return
        async with self._sending:
            await self._send(packet, fds)

    async def send_all(self, messages: Sequence[tuple[Message, tuple[int, ...]]]) -> None:
        """`send` each, before whatever is sent later."""
        async with self._sending:
            for message, fds in messages:
                await self._send(self._encode(message), fds)

    async def _send(self, packet: bytes, fds: tuple[int, ...]) -> None:
        while not self._try(packet, fds):
            await trio.lowlevel.wait_writable(self._socket)

    def post(self, message: Message, fds: tuple[int, ...] = ()) -> bool:
        """`send` it now, before whatever is sent later. False where that would have to wait. ChannelBroken as there."""
        return not self._sending.locked() and self._try(self._encode(message), fds)

    def _try(self, packet: bytes, fds: tuple[int, ...]) -> bool:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelEnded(f"sending failed: {os.strerror(error.errno or 0)}") from None
        return True

    async def receive(self) -> tuple[M, list[int] | None]:
        """The next message, and the descriptors that came with it, which are the caller's now.

        None: this process had no room for them (EMFILE), and they are lost; the message is whole.
        """
        while True:
            try:
                size, ancillary, flags, _ = self._socket.recvmsg_into(
                    [self._room], self._fd_room, socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
            except ConnectionResetError:
                pass  # it has ended, and not heard all; what it had said comes next
            except OSError as error:
                raise ChannelEnded(f"receiving failed: {os.strerror(error.errno or 0)}") from None
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
        if size == 0:
            close_all(fds)
            raise ChannelEnded("the other side has gone")
        try:
            if size > PACKET_MOST or flags & socket.MSG_TRUNC:
                raise ChannelBroken("a packet that is too long")
            message = self._decode(memoryview(self._room)[:size])
            if flags & socket.MSG_CTRUNC and self._fd_room:
                close_all(fds)
                return message, None
            return message, list(fds)
        except msgspec.MsgspecError as error:  # ValidationError and DecodeError
            close_all(fds)
            raise ChannelBroken(f"what came is no message: {error}") from None
        except ChannelBroken:
            close_all(fds)
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def close_all(fds: Any) -> None:
    for fd in fds or ():
        with contextlib.suppress(OSError):  # of a flush: the descriptor is closed all the same
            os.close(fd)
