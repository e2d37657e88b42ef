"""A mount on the emulator, `vmfs web` in front of it, and a browser."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mounting import SANITIZED, SOON, Server, reason_against, serving
from pc.initramfs import SHELL, build
from pc.kernels import CLOUD

from vmfs.client import Vm
from vmfs.engine import ENGINES

CHROMIUM = Path("/usr/bin/chromium")
VENDOR = Path(__file__).parents[2] / "vmfs" / "web" / "static" / "vendor"
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions",
)  # fmt: skip
BROWSER_SECONDS = 60
BOOT_SECONDS = 200


def reason_against_the_page() -> str | None:
    """Why there is no `vmfs web` here, or None."""
    missing = [name for name in ("starlette", "uvicorn", "websockets") if importlib.util.find_spec(name) is None]
    if missing:
        return f"Python packages are not installed: {', '.join(missing)}"
    return None if VENDOR.exists() else f"{VENDOR} is not there: scripts/vendor.sh could not make it"


class Site:
    """`vmfs web`, and requests to it with its token."""

    def __init__(self, mount: Path, *options: str) -> None:
        command = [sys.executable, "-m", "vmfs.cli", "web", "--listen", "127.0.0.1:0", *options, str(mount)]
        self.mount = mount
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], SOON)[0], "vmfs web says nothing"
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
        given = {"Authorization": f"Bearer {self.token}", **{name.replace("_", "-"): text for name, text in headers.items()}}
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


@pytest.fixture(scope="session")
def web_server(tmp_path_factory) -> Iterator[Server]:
    engine = next(row for row in ENGINES if row.name == "emulator")
    if reason := reason_against_the_page() or reason_against(engine):
        pytest.skip(reason)
    with serving(tmp_path_factory, engine="emulator") as one:
        yield one


@pytest.fixture(scope="session")
def site(web_server) -> Iterator[Site]:
    one = Site(web_server.path)
    try:
        yield one
    finally:
        said = one.end()
    assert "Traceback" not in said, said


LOOP = "48ffc0 48ffc3 e802000000 ebf3 c3"  # inc rax; inc rbx; call f; jmp; f: ret


@pytest.fixture
def bare(web_server) -> Iterator[Vm]:
    """A machine that has LOOP at 0x1000."""
    with Vm.temporary(web_server.path, mem_size="4M", mode="long") as vm:
        vm.write_mem(0x1000, bytes.fromhex(LOOP))
        vm.regs.update(rip=0x1000, rsp=0x9000)
        vm._forget("mem")  # a history needs it closed
        yield vm


@pytest.fixture(scope="session")
def linux(web_server) -> Iterator[Vm]:
    """A Linux with a shell on its console, that stands."""
    if not CLOUD.image.exists() or SANITIZED:
        pytest.skip("Debian's cloud kernel is not here" if not SANITIZED else "`make asan`: a boot takes minutes")
    with Vm.temporary(web_server.path, mem_size="256M") as vm:
        vm.boot(CLOUD.image, initrd=build(SHELL), cmdline="console=ttyS0 quiet")
        vm.console.expect("guest# ", timeout=BOOT_SECONDS)
        vm.pause()
        vm.find_symbols()
        yield vm


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("the Python package playwright is not installed")
    if SANITIZED:
        pytest.skip("`make asan`: Chromium does not start with libasan in front of it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(QUIET), timeout=1000 * BROWSER_SECONDS)
        try:
            yield one
        finally:
            one.close()


@pytest.fixture
def page(browser, site) -> Iterator[Any]:
    """A page of the site, which has no error at the end: neither a script's nor one of its policy."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(1000 * BROWSER_SECONDS)
    one = context.new_page()
    errors: list[str] = []
    one.on("pageerror", lambda error: errors.append(str(error)))
    one.on("console", lambda said: said.type == "error" and errors.append(said.text))
    one.errors = errors
    one.goto(site.url)
    one.wait_for_selector(".list, .machine")
    yield one
    context.close()
    wrong = [text for text in errors if "409 (Conflict)" not in text]  # what a machine refuses is said on the page
    assert wrong == []
