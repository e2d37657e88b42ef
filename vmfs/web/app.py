"""The routes of the page, and what they need."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from vmfs import __version__
from vmfs.commands.machines import read
from vmfs.web.actions import ACTIONS
from vmfs.web.gate import Gate
from vmfs.web.live import EXPECTED, Live, sentence
from vmfs.web.place import Place, told
from vmfs.web.streams import PORTS, Streams
from vmfs.web.threads import Refused, Threads
from vmfs.web.uploads import Uploads

STATIC = Path(__file__).parent / "static"
VENDOR = STATIC / "vendor"
PAGES_MOST = 32
_BODY_MOST = 64 << 10
# Scripts and styles of this server alone. The nonce is for the style elements that xterm.js makes.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' blob: data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Web:
    """The server of one mount."""

    def __init__(self, place: Place, uploads: Uploads, sockets: Path) -> None:
        """`sockets`: a directory of this user's alone."""
        self.place, self.uploads = place, uploads
        self.threads = Threads()
        self.streams = Streams(place, self.threads, sockets)
        self._pages = 0

    def app(self, token: str, names: Collection[str] = ()) -> ASGIApp:
        routes = [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/api/server", self.server),
            Route("/api/uploads", self.upload, methods=["PUT"]),
            Route("/api/machines", self.make, methods=["POST"]),
            Route("/api/machines/{name}/screen.png", self.screen),
            Route("/api/machines/{name}/symbols", self.symbols, methods=["POST"]),
            Route("/api/machines/{name}/do/{action}", self.act, methods=["POST"]),
            WebSocketRoute("/live", self.live),
            WebSocketRoute("/api/machines/{name}/streams/{port}", self.stream),
            WebSocketRoute("/api/machines/{name}/vnc", self.viewer),
        ]
        return Gate(Starlette(routes=routes), token, names, public=("/", "/static/"))

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = (STATIC / "index.html").read_text().replace("NONCE", nonce)
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY.format(nonce=nonce)})

    async def server(self, request: Request) -> Response:
        """What the page has to know once."""
        def facts() -> dict[str, Any]:
            engines = [line.split()[0] for line in read(self.place.path, "engines").splitlines() if "=yes" in line]
            return {
                "mount": str(self.place.path), "version": __version__, "engines": engines,
                "upload_most": self.uploads.most, "ports": PORTS,
            }  # fmt: skip

        return await self._answer("", facts)

    async def upload(self, request: Request) -> Response:
        length = request.headers.get("content-length", "")
        try:
            key = await self.uploads.take(
                request.query_params.get("name", ""), int(length) if length.isdecimal() else None, request.stream(),
                self.threads,
            )  # fmt: skip
        except ClientDisconnect:
            return Response(status_code=499)
        except EXPECTED as failure:
            return _failed(failure)
        return JSONResponse({"result": key})

    async def make(self, request: Request) -> Response:
        return await self._with_body(request, "make", lambda said: self.uploads.make(self.place, said))

    async def symbols(self, request: Request) -> Response:
        name = request.path_params["name"]

        def load(said: dict[str, Any]) -> None:
            with self.place.open(name) as vm:
                self.uploads.load_symbols(vm, said.get("upload"))

        return await self._with_body(request, ("do", name), load)

    async def act(self, request: Request) -> Response:
        name, function = request.path_params["name"], ACTIONS.get(request.path_params["action"])
        if function is None:
            return JSONResponse({"error": "there is no such action"}, 404)

        def do(said: dict[str, Any]) -> Any:
            cpu = said.get("cpu", 0)
            if not isinstance(cpu, int) or not 0 <= cpu < 64:
                raise ValueError("a CPU is a number")
            with self.place.open(name) as vm:
                return function(vm, cpu, said)

        return await self._with_body(request, ("do", name), do)

    async def screen(self, request: Request) -> Response:
        name = request.path_params["name"]

        def look() -> bytes:
            path = self.place.machine(name)
            try:
                return (path / "screen.png").read_bytes()
            except OSError as failure:
                raise told(path, failure) from None

        try:
            picture = await self.threads.call(name, look)
        except EXPECTED as failure:
            return _failed(failure)
        tag = f'"{hashlib.blake2b(picture, digest_size=16).hexdigest()}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return Response(picture, media_type="image/png", headers={"ETag": tag, "Cache-Control": "no-store"})

    async def live(self, socket: WebSocket) -> None:
        if self._pages >= PAGES_MOST:
            await socket.close(1008, f"{PAGES_MOST} pages look already")
            return
        self._pages += 1
        try:
            await Live(socket, self.place, self.threads).serve()
        finally:
            self._pages -= 1

    async def stream(self, socket: WebSocket) -> None:
        await self.streams.console(socket, socket.path_params["name"], socket.path_params["port"])

    async def viewer(self, socket: WebSocket) -> None:
        await self.streams.screen(socket, socket.path_params["name"])

    # ---- what they share

    async def _with_body(self, request: Request, key: Any, do: Any) -> Response:
        """What `do` returns of the object that is the request's body."""
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > _BODY_MOST:
                    return JSONResponse({"error": "that is too long"}, 413)
        except ClientDisconnect:
            return Response(status_code=499)
        try:
            said = json.loads(body or b"{}")
            if not isinstance(said, dict):
                raise ValueError("it is an object that is wanted")
        except (ValueError, RecursionError):
            return JSONResponse({"error": "the body is no JSON object"}, 400)
        return await self._answer(key, do, said)

    async def _answer(self, key: Any, function: Any, *arguments: Any) -> Response:
        try:
            return JSONResponse({"result": await self.threads.call(key, function, *arguments)})
        except EXPECTED as failure:
            return _failed(failure)


def _failed(failure: BaseException) -> Response:
    return JSONResponse({"error": sentence(failure)}, 503 if isinstance(failure, Refused) else 409)


