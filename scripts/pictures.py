"""pictures.py [DIRECTORY]: the pictures of docs/web.md (docs/web): `vmfs web` on real guests, in headless Chromium."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from pc.initramfs import build
from pc.kernels import CLOUD
from PIL import Image
from playwright.sync_api import sync_playwright

from vmfs.client import Vm, private_mount

COLOURS = 128
SCRIPT = """
mount -t tmpfs tmp /tmp
echo 'the machine is a directory' > /dev/tty0
exec setsid cttyhack sh
"""
COUNTS = "48ffc0 48ffc3 e802000000 ebf3 48c1e103 c3"
CHROMIUM = {
    "executable_path": "/usr/bin/chromium",
    "args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
}


def main() -> None:
    to = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "web")
    to.mkdir(exist_ok=True)
    with private_mount(["--engine", "emulator"]) as mount:
        linux, bare = make_linux(mount), make_bare(mount)
        command = [sys.executable, "-m", "vmfs.cli", "web", "--listen", "127.0.0.1:0", str(mount)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as web, sync_playwright() as driver:
            assert web.stdout
            url = web.stdout.readline().strip()
            browser = driver.chromium.launch(**CHROMIUM)
            try:
                page = browser.new_page(viewport={"width": 1500, "height": 900})
                page.goto(url)
                page.wait_for_selector(".machines a")
                rest(page)
                take(page, to / "machines.png", height=260)
                show(page, linux)
                page.wait_for_selector('.screen[data-by="vnc"]')
                rest(page)
                take(page, to / "linux.png")
                page.emulate_media(color_scheme="dark")
                page.set_viewport_size({"width": 1100, "height": 900})
                show(page, bare)
                for _ in range(3):
                    page.keyboard.press("s")
                    page.wait_for_timeout(700)
                rest(page)
                take(page, to / "bare.png")
            finally:
                browser.close()
                web.terminate()
        for vm in (linux, bare):
            vm.remove()


def make_linux(mount: Path) -> Vm:
    """One that stands where it makes a directory, as its shell was told."""
    vm = Vm.create(mount / "debian", mem_size="256M")
    vm.boot(CLOUD.image, initrd=build(SCRIPT), cmdline="console=tty0 console=ttyS0 nokaslr")
    vm.console.expect("guest# ", timeout=100)
    vm.console.command("uname -a", "guest# ", timeout=60)
    vm.pause()
    vm.find_symbols()
    vm.breakpoint("__x64_sys_mkdir")
    vm.start()
    vm.console.send_line("mkdir /tmp/new")
    assert vm.wait(60)
    return vm


def make_bare(mount: Path) -> Vm:
    vm = Vm.create(mount / "bare", mem_size="4M", mode="long")
    vm.write_virt(0x1000, bytes.fromhex(COUNTS))
    vm.regs.update(rip=0x1000, rsp=0x9000)
    vm.record()
    vm.run(insns=5000)
    vm.step(2)
    return vm


def show(page: Any, vm: Vm) -> None:
    page.evaluate("name => { location.hash = `#/m/${name}`; }", Path(vm.path).name)
    page.wait_for_selector(".lines .here")


def rest(page: Any) -> None:
    """All that is in sight has come."""
    page.wait_for_timeout(4000)


def take(page: Any, path: Path, height: int | None = None) -> None:
    """A PNG of few colours, which is small."""
    size = page.viewport_size
    clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"]}
    with Image.open(io.BytesIO(page.screenshot(clip=clip))) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size >> 10, "KiB")


if __name__ == "__main__":
    main()
