"""The words of a `net` line: where a card's frames go, and options `NAME=VALUE`.

Words that are none of ours are passt's own options, as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vmfs.words.errors import Invalid

USAGE = (
    "net user [tcp=[ADDRESS/]PORT:PORT] [udp=...] [OPTION...]|tap NAME|wire NAME [model=MODEL] [mac=MAC] [pcap=PATH]"
)
PCAP = "pcap="
MAX_FRAME = 65_535 + 14  # passt's packets have up to 65520 bytes
LEAST_FRAME = 14  # addresses and a type
_FORWARD = re.compile(r"(?:(?P<address>[0-9a-fA-F.:]{2,39})/)?(?P<host>[0-9]{1,5}):(?P<guest>[0-9]{1,5})", re.ASCII)
_MAC = re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}", re.ASCII)
_WIRE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
_HOME = "127.0.0.1"
_PASST = {"tcp=": "-t", "udp=": "-u"}


@dataclass(frozen=True, slots=True)
class NetLine:
    """`rest`: passt's words, an interface's name, or a wire's. `mac`: empty, or six bytes."""

    kind: str
    rest: tuple[str, ...]
    model: str
    mac: bytes
    pcap: str


def parse(words: Sequence[str], models: Sequence[str]) -> NetLine:
    """The words after `net`; the first of `models` is what a card is without `model=`."""
    kind, model, mac, pcap, rest = words[0], models[0], b"", "", []
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name == "model":
            if value not in models:
                raise Invalid(f"dev/add: a network card is {', '.join(models)}, not {value[:20]!r}")
            model = value
        elif name == "mac":
            if not _MAC.fullmatch(value) or int(value[:2], 16) & 1:
                raise Invalid(f"dev/add: {value[:20]!r} is no card's address, as 52:54:00:12:34:56, first byte even")
            mac = bytes.fromhex(value.replace(":", ""))
        elif name == "pcap" and word != "pcap":
            pcap = value
        else:
            rest.append(word)
    if kind == "user":
        passt_options(rest)
    elif kind not in ("tap", "wire") or len(rest) != 1:
        raise Invalid(f"dev/add: it is `{USAGE}`")
    elif kind == "wire":
        check_wire(rest[0])
    return NetLine(kind, tuple(rest), model, mac, pcap)


def passt_options(words: Sequence[str]) -> list[str]:
    """What passt is started with. `tcp=2222:22` is the host's port 2222, of its loopback where no address is named."""
    options = []
    for word in words:
        option = _PASST.get(word[:4])
        if option is None:
            options.append(word)
            continue
        found = _FORWARD.fullmatch(word[4:])
        if found is None or not all(0 < int(found[name]) < 1 << 16 for name in ("host", "guest")):
            raise Invalid(f"dev/add: {word[:60]!r}: a forward is [ADDRESS/]PORT:PORT, the host's and the guest's")
        options += [option, f"{found['address'] or _HOME}/{int(found['host'])}:{int(found['guest'])}"]
    return options


def check_wire(name: str) -> None:
    if not _WIRE.fullmatch(name):
        raise Invalid(f"{name[:40]!r} is no wire's name, which has up to 64 letters, digits and ._-, and no dot first")
