"""`vnc`, by which viewers may connect to a socket."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass
from typing import Any

import trio

from vmfs.machine.files.listening import ListeningFile, Place, Where, is_loopback, parse_address
from vmfs.machine.vnc import des
from vmfs.machine.vnc.server import Vnc
from vmfs.words.errors import Invalid, Unsupported

_USAGE = "nothing or `off`, or HOST:PORT or a socket's path, and then `password=WORD` or `nopassword`"
_LETTERS = "abcdefghijkmnopqrstuvwxyz23456789"  # no two look alike


@dataclass(frozen=True, slots=True)
class Asked:
    """What the `vnc` file is told: where to listen (None: nowhere), and the password, if there is to be one."""

    where: Where | None
    password: str | None = None


def parse_vnc(text: str) -> Asked:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Invalid(f"vnc: {error}") from None
    if words in ([], ["off"]):
        return Asked(None)
    address, *rest = (word for word in words if not word.startswith("clients="))  # as it is read
    where = parse_address(address, "vnc", _USAGE)
    if len(rest) > 1:
        raise Invalid(f"vnc: it is {_USAGE}")
    if not rest:
        return Asked(where, None if isinstance(where, str) else "".join(secrets.choice(_LETTERS) for _ in range(8)))
    if rest == ["nopassword"]:
        if not is_loopback(where):
            raise Invalid(f"vnc: {address} can be reached by other hosts: it needs a password")
        return Asked(where)
    key, equals, password = rest[0].partition("=")
    if (key, equals) != ("password", "="):
        raise Invalid(f"vnc: {rest[0][:40]!r} is nothing of it: it is {_USAGE}")
    if not 0 < len(password.encode()) <= des.PASSWORD_MOST:
        raise Invalid(f"vnc: a password has 1 to {des.PASSWORD_MOST} bytes, for no more count")
    return Asked(where, password)


class VncPort:
    """A machine's viewers, and where they connect."""

    def __init__(self, scope: Any) -> None:
        self._vnc = Vnc(scope)
        self._place = Place(scope, "vnc", self._vnc.serve)
        self._changing = trio.Lock()

    def text(self) -> str:
        """The `vnc` file."""
        if self._place.address is None:
            return "off\n"
        password = self._vnc.password
        secret = "nopassword" if password is None else f"password={shlex.quote(password)}"
        return f"{self._place.address} {secret} clients={self._vnc.count}\n"

    async def set(self, asked: Asked) -> None:
        """What was written to it. When it fails, what was before stays."""
        async with self._changing:
            if asked.where is None:
                await self._place.leave()
                return
            if asked.password is not None and not des.is_there():
                raise Unsupported("vnc: a password needs DES, which the OpenSSL of this Python has not")
            self._vnc.screen.board  # noqa: B018 - a bare machine is refused
            await self._place.listen(asked.where)
            self._vnc.password = asked.password


def vnc_file() -> ListeningFile:
    """`vnc`."""
    return ListeningFile("vnc", parse_vnc)
