"""A mount on the emulator, `vmfs web` in front of it, and a browser."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import SANITIZED, Server, reason_against, serving
from pc.initramfs import SHELL, build
from pc.kernels import CLOUD
from web.site import Site

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
