"""An opener as the zygote forks one, and what it answers."""

from __future__ import annotations

import functools
import os
import signal
import socket

import msgspec
from mounting import has_news

from vmfs.host import opener
from vmfs.host.credentials import Credentials, HostError
from vmfs.host.sandbox import Sandbox
from vmfs.words.commands import Result

SECONDS = 60


@functools.cache
def sandbox() -> Sandbox:
    return Sandbox()


class Opened:
    """`text` and `fds` are the answer; `pid` is the opener's process, which goes on where a device needs it."""

    def __init__(self, work: opener.Work, who: Credentials) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        box = sandbox()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            opener.run(work, who, its, box)
        its.close()
        with ours:
            assert has_news(ours.fileno(), seconds=SECONDS), "the opener does not answer"
            packet, self.fds, _, _ = socket.recv_fds(ours, 4096, 4)
        result = msgspec.msgpack.decode(packet, type=Result)
        self.text = result.text
        if result.errno:
            os.waitpid(self.pid, 0)
            raise HostError(result.errno, result.text)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def me() -> Credentials:
    return Credentials(os.geteuid(), os.getegid(), tuple(os.getgroups()))


NOBODY = Credentials(65534, 65534, (), 0)
