"""The users that may come in: the gate in front of all routes.

It looks at three things. The Host, since a name that somebody else's DNS resolves to this address makes another page's
requests look like this page's own (DNS rebinding): it has to be an IP address, or a name that was told at the start.
The Origin, where there is one: it has to be the page's own. The token, for all that shows or does something:
`Authorization: Bearer TOKEN`, or of a WebSocket, which can send no such header, the subprotocol `token.TOKEN` beside
`vmfs`.

The token is no cookie: a browser sends cookies of 127.0.0.1 to every port of it, so to servers of other users as well.
The page has it from the fragment of its address, which is sent to no server, and keeps it for its tab.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Collection, Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROTOCOL = "vmfs"
_PROTOCOL_TOKEN = "token."
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    # The page has another one, with its nonce.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Gate:
    """ASGI middleware. `names`: host names that are this server's, beside IP addresses and localhost. `public`: the
    paths that are for everyone, of which `/` is only itself and `/static/` all that begins so."""

    def __init__(self, app: ASGIApp, token: str, names: Collection[str] = (), public: Collection[str] = ()) -> None:
        self._app = app
        self._token = token.encode()
        self._names = {"localhost", *(name.lower() for name in names)}
        self._public = tuple(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        reason = self.reason_against(scope)
        if scope["type"] == "websocket":
            if reason:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": reason})
            else:
                await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if reason:
            await PlainTextResponse(f"{reason}\n", 403)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def reason_against(self, scope: Scope) -> str:
        """Why a request does not come in; empty where it does."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_ours(host):
            return "this server has no such name: use its address, or start it with --host NAME"
        origin = headers.get("origin")
        if origin is not None and not _same(origin, host):
            return "another page may not use this server"
        if scope["type"] == "http" and self._is_public(scope["path"]):
            return ""
        if not any(secrets.compare_digest(given.encode(), self._token) for given in _tokens(headers)):
            return "the token is missing or wrong: open the address that `vmfs web` has printed"
        return ""

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._names
        return True

    def _is_public(self, path: str) -> bool:
        return any(path == one or (len(one) > 1 and one.endswith("/") and path.startswith(one)) for one in self._public)


def _same(origin: str, host: str) -> bool:
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and rest.lower() == host.lower()


def _tokens(headers: Headers) -> Iterator[str]:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield value.strip()
    for word in headers.get("sec-websocket-protocol", "").split(","):
        if word.strip().startswith(_PROTOCOL_TOKEN):
            yield word.strip().removeprefix(_PROTOCOL_TOKEN)
