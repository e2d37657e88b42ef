"""Who comes in: the token, the Host and the Origin, of requests and of WebSockets."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette", reason="the Python package starlette is not installed")

from vmfs.web.gate import Gate  # noqa: E402

TOKEN = "t0ken-of-this-server"
BEARER = ("authorization", f"Bearer {TOKEN}")
HOST = ("host", "127.0.0.1:8000")


def enters(kind: str, path: str, *headers: tuple[str, str]) -> bool:
    """Whether a request comes to what is after the gate; what it gets otherwise is a refusal, and nothing else."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def receive():
        return {"type": f"{kind}.connect"}

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "path": path, "headers": raw, "method": "GET"}
    gate = Gate(app, TOKEN, ["box.example"], public=("/", "/static/"))
    asyncio.run(gate(scope, receive, send))
    if reached:
        return True
    if kind == "http":
        assert sent[0]["status"] == 403
        headers = dict(sent[0]["headers"])
        assert headers[b"content-security-policy"].startswith(b"default-src 'none'")
        assert headers[b"cache-control"] == b"no-store" and headers[b"x-content-type-options"] == b"nosniff"
    else:
        assert [message["type"] for message in sent] == ["websocket.close"]
    return False


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ([HOST, BEARER], True),
        ([HOST], False),
        ([HOST, ("authorization", "Bearer ")], False),
        ([HOST, ("authorization", f"Bearer {TOKEN}x")], False),
        ([HOST, ("authorization", f"Basic {TOKEN}")], False),
        ([HOST, ("authorization", "Bearer t\xf6ken")], False),
        ([HOST, ("cookie", f"token={TOKEN}")], False),
        ([HOST, ("sec-websocket-protocol", f"vmfs, token.{TOKEN}")], True),
        ([HOST, ("sec-websocket-protocol", f"vmfs, token.{TOKEN}0")], False),
        ([HOST, ("sec-websocket-protocol", "vmfs")], False),
        # DNS rebinding: the name of another page, which leads here.
        ([("host", "evil.example:8000"), BEARER], False),
        ([("host", "127.0.0.1.evil.example:8000"), BEARER], False),
        ([("host", "localhost.evil.example"), BEARER], False),
        ([("host", ""), BEARER], False),
        ([BEARER], False),
        ([HOST, ("host", "evil.example"), BEARER], False),
        ([("host", "localhost:9000"), BEARER], True),
        ([("host", "[::1]:8000"), BEARER], True),
        ([("host", "[::1"), BEARER], False),
        ([("host", "192.168.1.4:8000"), BEARER], True),
        ([("host", "BOX.example"), BEARER], True),
        # another page
        ([HOST, BEARER, ("origin", "http://127.0.0.1:8000")], True),
        ([HOST, BEARER, ("origin", "https://127.0.0.1:8000")], True),
        ([HOST, BEARER, ("origin", "http://127.0.0.1:8001")], False),
        ([HOST, BEARER, ("origin", "http://evil.example")], False),
        ([HOST, BEARER, ("origin", "null")], False),
        ([HOST, BEARER, ("origin", "")], False),
        ([HOST, BEARER, ("origin", "file://")], False),
    ],
)
def test_what_shows_or_does_something(kind, headers, may):
    assert enters(kind, "/api/server", *headers) is may


@pytest.mark.parametrize(
    ("path", "may"),
    [("/", True), ("/static/main.js", True), ("/static", False), ("/live", False), ("//", False), ("/staticx", False),
     ("/api/machines/demo/screen.png", False)],
)  # fmt: skip
def test_the_page_itself_is_for_everyone_that_names_this_server(path, may):
    assert enters("http", path, HOST) is may
    assert not enters("http", path, ("host", "evil.example"))
    assert not enters("websocket", path, HOST)
