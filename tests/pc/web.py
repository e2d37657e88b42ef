"""A web server on the host's loopback, which guests reach by passt."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def served(answer: Callable[[str], bytes]) -> Iterator[int]:
    """Its port; `answer` gives the content of a path. Skips where there is no passt."""
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (package passt)")

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answer(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    try:
        yield one.server_address[1]
    finally:
        one.shutdown()
        one.server_close()
