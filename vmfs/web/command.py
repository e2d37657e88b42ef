"""`vmfs web`: serve the page until ^C."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vmfs.commands import machines
from vmfs.commands.boot import ended_by_signals
from vmfs.commands.options import argument, size
from vmfs.words.errors import EngineFailed, Invalid

if TYPE_CHECKING:
    from vmfs.web.app import Web

PACKAGES = ("starlette", "uvicorn", "websockets")
LISTEN = "127.0.0.1:8000"
WARNING = (
    "can be reached from other hosts, and nothing is encrypted: a listener on the way reads the token, and has the "
    "machines then, with this user's rights. `ssh -L` brings a page on 127.0.0.1 to another host"
)
_UPLOADS = 16 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MOUNT", nargs="?", help="a mount (default: the first one of yours)")
    parser.add_argument("--listen", metavar="HOST:PORT", type=argument(address), default=address(LISTEN),
                        help=f"where (default: {LISTEN}; port 0: a free one)")
    parser.add_argument("--host", metavar="NAME", action="append", default=[],
                        help="a name that browsers call this server by, beside its addresses; several times, too")
    parser.add_argument("--uploads", metavar="DIR",
                        help="where files go that are dropped on the page (default: a directory for this time)")
    parser.add_argument("--max-upload", metavar="SIZE", type=argument(size), default=_UPLOADS,
                        help="bytes of all such files (default: 16G)")


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, [::1]:PORT, :PORT or PORT."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise Invalid(f"{text[:40]!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Invalid(f"the page needs {', '.join(missing)}, which are not installed here: pip install 'vmfs[web]'")
    from vmfs.web.app import VENDOR, Web
    from vmfs.web.place import Place
    from vmfs.web.uploads import Uploads

    if not (VENDOR / "xterm" / "xterm.mjs").exists():
        raise Invalid("the page's own packages (xterm.js, noVNC) are not here: scripts/vendor.sh gets them")
    mount = Path(os.path.abspath(machines.mount(arguments.mount)))
    host, port = arguments.listen
    token = secrets.token_urlsafe(32)
    with ended_by_signals(), bound(host, port) as listening, directories(arguments.uploads) as (sockets, files):
        shown = socket_name(listening)
        if not is_loopback(listening):
            print(f"vmfs web: warning: {shown} {WARNING}", file=sys.stderr)
        print(f"http://{shown}/#token={token}", flush=True)
        serve(Web(Place(mount), Uploads(files, arguments.max_upload), sockets), arguments, token, listening)
    return 0


def serve(web: Web, arguments: argparse.Namespace, token: str, listening: socket.socket) -> None:
    """Until SIGINT or SIGTERM."""
    import uvicorn

    config = uvicorn.Config(
        web.app(token, [arguments.listen[0], *arguments.host]),
        log_level="warning", access_log=False, server_header=False, lifespan="off", ws="websockets-sansio",
        ws_max_size=1 << 20, ws_ping_interval=20, ws_ping_timeout=20, ws_per_message_deflate=False,
        limit_concurrency=256, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=16 << 10,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(found[0], socket.SOCK_STREAM)
    except OSError as failure:
        raise EngineFailed(f"{host}: {failure.strerror}") from None
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(found[4])
        except OSError as failure:
            raise EngineFailed(f"{host}:{port}: {failure.strerror}") from None
        listening.listen(64)
        yield listening


def socket_name(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


@contextlib.contextmanager
def directories(given: str | None) -> Iterator[tuple[Path, Path]]:
    """One for sockets, of this user's alone and for this time; and that of `--uploads`, or another such one."""
    if given is not None and not (os.path.isdir(given) and os.access(given, os.W_OK | os.X_OK)):
        raise Invalid(f"{given} is no directory that this user may write")
    own = Path(tempfile.mkdtemp(prefix="vmfs-web-"))
    try:
        sockets, files = own / "s", Path(os.path.abspath(given)) if given is not None else own / "files"
        sockets.mkdir(0o700)
        files.mkdir(0o700, exist_ok=True)
        yield sockets, files
    finally:
        shutil.rmtree(own, ignore_errors=True)
