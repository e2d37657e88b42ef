"""`vmfs web` as a process, for tests of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mounting import SOON, has_news


class Site:
    """`vmfs web`, and requests to it with its token."""

    def __init__(self, mount: Path, *options: str) -> None:
        command = [sys.executable, "-m", "vmfs.cli", "web", "--listen", "127.0.0.1:0", *options, str(mount)]
        self.mount = mount
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout
        assert has_news(self.process.stdout.fileno(), seconds=SOON), "vmfs web says nothing"
        self.url = self.process.stdout.readline().decode().strip()
        assert self.url, self.process.stderr and self.process.stderr.read().decode()
        self.host = urlsplit(self.url).netloc
        self.token = self.url.partition("#token=")[2]

    def end(self) -> str:
        """What it has said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr and self.process.stdout
        try:
            return self.process.communicate(timeout=SOON)[1].decode()
        finally:
            self.process.kill()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and body: of JSON the value, else bytes."""
        given = {"Authorization": f"Bearer {self.token}", **headers}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=SOON)) as line:
            line.request(method, path, data, {name: text for name, text in given.items() if text})
            answer = line.getresponse()
            content = answer.read()
            is_json = answer.headers.get("content-type") == "application/json"
            return answer.status, json.loads(content) if is_json else content

    def do(self, machine: str, action: str, **said: Any) -> Any:
        """An action's result."""
        status, answer = self.ask("POST", f"/api/machines/{machine}/do/{action}", said)
        assert status == 200, answer
        return answer["result"]

    def socket(self, path: str, **options: Any) -> Any:
        from websockets.sync.client import connect

        return connect(f"ws://{self.host}{path}", subprotocols=["vmfs", f"token.{self.token}"], max_size=None,
                       open_timeout=SOON, **options)  # fmt: skip

    def descriptors(self) -> set[str]:
        """The files of the mount that it has open."""
        found = set()
        for each in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(each))
        return {path for path in found if path.startswith(f"{self.mount}/")}
