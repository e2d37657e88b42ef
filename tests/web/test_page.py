"""The page in headless Chromium: each button on a real guest, keys, narrow windows, and text that guests choose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mounting import wait_until

from vmfs.client import Vm

HOSTILE = "<img src=x onerror=window.pwned=1><script>window.pwned=1</script>"


def opened(page, vm, *panes):
    """The page of a machine, with these panes open."""
    page.evaluate("name => { location.hash = `#/m/${name}`; }", Path(vm.path).name)
    page.wait_for_selector(".machine .state:not(:empty)")
    for name in panes:
        section = page.locator(f".pane.{name}")
        if "closed" in section.get_attribute("class").split():
            section.locator(".title").click()
        section.scroll_into_view_if_needed()
    return page


def shows(page, selector, text):
    """Wait until it has this text, a part or a pattern."""
    pattern = text if isinstance(text, re.Pattern) else re.compile(re.escape(text))
    page.locator(selector).filter(has_text=pattern).first.wait_for(state="visible")


def value_of(page, name):
    return page.locator(f'.register[data-name="{name}"] .value')


# ---- a bare machine


def test_buttons_run_step_and_go_back(page, bare):
    opened(page, bare)
    shows(page, ".registers .tag", "long")
    page.get_by_role("button", name="Step one instruction (s)").click()
    shows(page, ".exit", "debug cause=step rip=0x1003")
    shows(page, ".register.changed", "rax")
    assert bare.regs.rax == 1
    page.get_by_role("button", name="Step one instruction (s)").click()
    shows(page, ".lines .here", "call")
    page.get_by_role("button", name="Step over a call (o)").click()
    shows(page, ".exit", "rip=0x100b")
    assert page.get_by_role("button", name="Go back one instruction (b)").is_disabled()
    page.get_by_role("button", name="Keep the past of this machine from now on").click()
    shows(page, ".past", "0 checkpoints")
    for _ in range(3):
        page.get_by_role("button", name="Step one instruction (s)").click()
    shows(page, ".exit", "rip=0x1006")
    page.get_by_role("button", name="Go back one instruction (b)").click()
    shows(page, ".exit", "rip=0x1003")
    shows(page, ".past", "in the past")
    assert page.locator(".mark.checkpoint").count() == 1 and page.locator(".mark.stop").count() >= 1
    page.get_by_label("Go to instruction").fill(str(bare.stat["instructions"] + 1))
    page.get_by_label("Go to instruction").press("Enter")
    shows(page, ".lines .here", "call")
    page.get_by_label("Breakpoint at 0x1006").click()
    shows(page, ".points", "break 0x1006")
    page.get_by_role("button", name="Run (r)").click()
    shows(page, ".exit", "debug cause=breakpoint id=1 rip=0x1006")
    rax = bare.regs.rax
    page.get_by_role("button", name="Run (r)").click()
    wait_until(lambda: bare.regs.rax == rax + 1 and bare.state == "paused")
    page.get_by_role("button", name="Go back to the stop before (p)").click()
    wait_until(lambda: bare.regs.rax == rax, "it is at the stop before")
    page.get_by_label("Breakpoint at 0x1006").click()
    wait_until(lambda: not bare.points())
    page.get_by_role("button", name="Stop recording, and forget the past").click()
    shows(page, ".past", "It is not recorded")
    page.get_by_role("button", name="Run (r)").click()
    shows(page, ".head .state", "running")
    shows(page, ".counts", "MIPS")
    assert page.get_by_role("button", name="Step one instruction (s)").is_disabled()
    page.get_by_role("button", name="Pause (r)").click()
    shows(page, ".head .state", "paused")


def test_registers_and_memory_are_set(page, bare):
    opened(page, bare)
    value_of(page, "rbx").click()
    page.get_by_label("New value of rbx").fill("0x1234")
    page.get_by_label("New value of rbx").press("Enter")
    wait_until(lambda: bare.regs.rbx == 0x1234)
    shows(page, ".register.changed", "rbx")
    value_of(page, "rcx").click()
    page.get_by_label("New value of rcx").fill("no number")
    page.get_by_label("New value of rcx").press("Enter")
    shows(page, "#said", "is not a number")
    value_of(page, "rdx").click()
    page.get_by_label("New value of rdx").press("Escape")
    assert page.get_by_label("New value of rdx").count() == 0
    page.get_by_label("Find a register").fill("efer")
    shows(page, ".registers", "efer")
    assert page.locator(".register").count() == 1
    page.get_by_label("Address, register or symbol").fill("rsp+8")
    page.get_by_label("Address, register or symbol").press("Enter")
    shows(page, ".hex", "0000000000009008")
    page.locator('.hex .byte[data-index="2"]').click()
    page.keyboard.type("deadBE")
    wait_until(lambda: bare.read_virt(0x900A, 3) == b"\xde\xad\xbe", "three bytes are stored")
    shows(page, ".hex .mark", "00")
    page.keyboard.press("PageDown")
    shows(page, ".hex", "0000000000009108")
    page.get_by_label("Addresses").select_option("mem")
    shows(page, ".hex", re.compile("^0000009108"))
    page.get_by_label("Address, register or symbol").fill("0x400000")  # RAM ends there
    page.get_by_label("Address, register or symbol").press("Enter")
    shows(page, '.hex .byte[data-index="0"]', "··")


def test_points_page_tables_trace_and_code(page, bare):
    opened(page, bare, "pages", "trace", "code", "points")
    page.get_by_label("A point: break, watch, iobreak, catch or on").fill("watch 0x8ff8 8 w")
    page.get_by_label("A point: break, watch, iobreak, catch or on").press("Enter")
    shows(page, ".points .lines", "watch 0x8ff8 8 w")
    page.get_by_role("button", name="Run (r)").click()
    shows(page, ".exit", "debug cause=watchpoint id=1")
    page.get_by_role("button", name="Disable 1").click()
    shows(page, ".points .lines", "disabled")
    page.get_by_role("button", name="Delete 1").click()
    wait_until(lambda: not bare.points())
    page.get_by_role("button", name="Run to 0x1000").click()
    shows(page, ".lines .here", "inc rax")
    shows(page, ".pages pre", "0000000000000000-")
    page.get_by_label("Walk to an address").fill("0x1000")
    page.get_by_label("Walk to an address").press("Enter")
    shows(page, ".walk", "512G")
    shows(page, ".walk", "page")
    page.get_by_label("Trace mem").check()
    page.get_by_role("button", name="Trace what is ticked").click()
    wait_until(lambda: bare.stat["trace"].startswith("insn,mem"), "it traces")
    bare.step(3)
    shows(page, ".trace pre", "write 0x8ff8 size=8 value=0x100b at=0x1006")
    page.get_by_role("button", name="Trace what is ticked").click()
    wait_until(lambda: bare.stat["trace"].startswith("off"))
    page.get_by_label("Address, symbol or FILE:LINE (empty: rip)").fill("0x100d")
    page.get_by_label("Address, symbol or FILE:LINE (empty: rip)").press("Enter")
    shows(page, ".code .lines li:first-child", "ret")
    page.get_by_role("button", name="Go on at rip").click()
    shows(page, ".lines .here", "ret")
    shows(page, ".stack .lines", "100d")


def test_snapshots_forks_why_and_removal(page, site, bare):
    name = Path(bare.path).name
    opened(page, bare, "snapshots", "why")
    page.get_by_role("button", name="Keep a snapshot (n)").click()
    page.get_by_role("dialog").get_by_role("textbox").fill("one")
    page.get_by_role("button", name="Keep", exact=True).click()
    shows(page, ".snapshots tbody", "one")
    bare.write_virt(0x1000, b"\xcc")
    bare.regs["idtr.limit"] = 0
    page.get_by_role("button", name="Step one instruction (s)").click()
    shows(page, ".head .state", "shutdown")
    shows(page, ".why pre", "shutdown cause=triple-fault")
    page.get_by_role("button", name="Be one again").click()
    shows(page, ".head .state", "paused")
    assert bare.regs.rip == 0x1000
    page.get_by_role("button", name="Reset the CPUs").click()
    wait_until(lambda: bare.regs.rip == 0xFFF0)
    page.get_by_role("button", name="Fork one", exact=True).click()
    page.get_by_role("dialog").get_by_role("textbox").fill(f"{name}-f")
    page.get_by_role("dialog").get_by_role("button", name="Fork").click()
    shows(page, "h1", f"{name}-f")
    page.get_by_role("button", name="Remove the machine").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    shows(page, ".machines", name)
    wait_until(lambda: not Path(f"{bare.path}-f").exists())
    opened(page, bare, "snapshots")
    page.get_by_role("button", name="Drop one").click()
    shows(page, ".snapshots", "None is kept")


def test_the_list_and_a_machine_that_is_made_of_a_dropped_file(page, site, bare, tmp_path):
    name = Path(bare.path).name
    shows(page, ".machines", name)
    page.get_by_role("button", name=f"Run {name}").click()
    page.get_by_role("button", name=f"Pause {name}").click()
    wait_until(lambda: bare.state == "paused")
    sector = bytearray(bytes.fromhex("b40e b058 cd10 f4ebfd")).ljust(512, b"\0")  # int 10h: X; hlt
    sector[510:] = b"\x55\xaa"
    (tmp_path / "boots.img").write_bytes(bytes(sector))
    page.evaluate(
        """bytes => { const files = new DataTransfer();
           files.items.add(new File([new Uint8Array(bytes)], "boots here.img"));
           const drop = new DragEvent("drop", { dataTransfer: files, bubbles: true });
           document.querySelector(".list").dispatchEvent(drop); }""",
        list(sector),
    )
    assert page.get_by_role("dialog").get_by_label("Name").input_value() == "boots-here"
    page.get_by_role("dialog").get_by_label("Name").fill("../no")
    page.get_by_role("button", name="Make", exact=True).click()
    assert page.get_by_role("dialog").is_visible()  # the form says that it is no name
    page.get_by_role("dialog").get_by_label("Name").fill(f"{name}-boots")
    page.get_by_role("dialog").get_by_label("RAM").fill("16M")
    page.get_by_role("button", name="Make", exact=True).click()
    try:
        shows(page, "h1", f"{name}-boots")
        with Vm(f"{bare.path}-boots") as vm:
            wait_until(lambda: "X" in vm.screen, "the BIOS has booted it")
            assert vm.mem_size == 16 << 20
            page.wait_for_selector('.screen[data-by="vnc"]')
            page.locator("#screen-text").filter(has_text="X").wait_for(state="attached")
    finally:
        site.do(f"{name}-boots", "remove")
    shows(page, "#said", re.compile("removed|no machine"))
    page.get_by_role("button", name="Make a machine (n)").click()
    page.get_by_label("Kind").select_option("bare")
    page.get_by_role("dialog").get_by_label("Name").fill(f"{name}-flat")
    page.get_by_label("Flat binary").set_input_files({"name": "f", "mimeType": "a/b", "buffer": b"\x90\x90\xf4"})
    page.get_by_role("button", name="Make", exact=True).click()
    try:
        shows(page, ".lines .here", "nop")
    finally:
        site.do(f"{name}-flat", "remove")


def test_text_that_a_guest_or_a_file_chooses_is_text(page, site, web_server):
    sector = bytearray(bytes.fromhex("bef07b be207c baf803 fc ac 84c0 7403 ee ebf8 f4ebfd")).ljust(0x20, b"\x90")
    sector += HOSTILE.encode() + b"\0"
    sector = sector.ljust(510, b"\0") + b"\x55\xaa"
    with Vm.temporary(web_server.path, mem_size="8M") as vm:
        vm.boot(bytes(sector), cmdline=None, start=False)
        vm.write("symbols", f"0000000000007c00 T {HOSTILE.replace(' ', '_')}\n")
        vm.run(timeout=1)
        vm.console.expect("script>")
        opened(page, vm, "consoles", "code", "stack")
        shows(page, ".xterm-rows", "<img src=x")
        shows(page, ".stack", "<img_src")
        shows(page, ".lines .symbol", "<script>")
        page.evaluate("(text) => { location.hash = `#/m/${text}`; }", HOSTILE)  # no name of a machine: all machines
        page.wait_for_selector(".list")
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("[...document.images].every((image) => !image.src.endsWith('/x'))")
        assert page.evaluate("document.scripts.length") == 1


# ---- a Linux


def test_linux_is_talked_to_seen_and_debugged(page, linux):
    opened(page, linux, "snapshots", "devices", "consoles", "screen", "code")
    page.wait_for_selector('.screen[data-by="vnc"]')
    shows(page, ".xterm-rows", "guest#")  # what it had said before
    page.get_by_role("button", name="Run (r)").click()
    shows(page, ".head .state", "running")
    page.locator(".stage").click()
    page.keyboard.type("echo =$((6*7))=\n")
    shows(page, ".xterm-rows", "=42=")
    page.keyboard.press("Control+]")
    assert page.evaluate("document.activeElement.textContent") == "Console"
    page.keyboard.press("r")
    shows(page, ".head .state", "paused")
    page.get_by_role("button", name="Find the symbols of the Linux that runs").click()
    page.get_by_label("A point: break, watch, iobreak, catch or on").fill("break __x64_sys_mkdir")
    page.get_by_label("A point: break, watch, iobreak, catch or on").press("Enter")
    shows(page, ".points .lines", "__x64_sys_mkdir")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Run (r)").click()
    shows(page, ".head .state", "running")
    page.locator(".stage").click()
    page.keyboard.type("mkdir /tmp/other\n")
    shows(page, ".exit", "debug cause=breakpoint")
    shows(page, ".lines .symbol", "__x64_sys_mkdir:")
    shows(page, ".stack .lines", "do_syscall_64")
    page.get_by_role("button", name=re.compile("^Delete ")).first.click()
    wait_until(lambda: not linux.points())
    shows(page, ".devices", "com1")
    page.get_by_role("tab", name="Port hvc").click()
    shows(page, ".xterm-rows", "there is no")
    page.get_by_role("tab", name="Port console").click()
    page.get_by_role("button", name="Press ctrl-alt-del").click()


# ---- keys, and narrow windows


def test_keys_do_what_buttons_do(page, bare):
    opened(page, bare)
    shows(page, ".registers .tag", "long")
    page.keyboard.press("s")
    shows(page, ".exit", "rip=0x1003")
    page.keyboard.press("?")
    shows(page, "dialog", "step over a call")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    page.keyboard.press("g")
    assert page.evaluate("document.activeElement.placeholder").startswith("Address, symbol")
    page.keyboard.type("s")  # is text there
    assert bare.regs.rip == 0x1003
    page.keyboard.press("Tab")
    page.keyboard.press("l")
    page.wait_for_selector(".list")


def test_all_controls_have_names_and_are_reached_by_tab(page, bare):
    opened(page, bare, "pages", "trace", "snapshots", "why")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex='0']")]
           .filter((each) => each.checkVisibility())
           .filter((each) => !(each.getAttribute("aria-label") || each.textContent.trim() || each.labels?.length))
           .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    page.evaluate("document.querySelector('.skip').focus()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        where = "(({ activeElement: it }) => it.id || it.closest('.pane')?.className || '')(document)"
        reached.add(page.evaluate(where))
    assert {"b-run", "b-step", "b-snapshot", "b-remove"} <= reached
    assert any("code" in each for each in reached)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_s_width_needs_no_sideways_scrolling(page, bare, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 375, "height": 800})
    for prepare in (lambda: page.wait_for_selector(".machines"), lambda: opened(page, bare, "pages", "trace", "why")):
        prepare()
        shows(page, "body", Path(bare.path).name)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground))) < 64) == (scheme == "dark"), ground


def test_without_its_token_the_page_says_what_it_needs(browser, site):
    context = browser.new_context()
    try:
        one = context.new_page()
        one.goto(site.url.partition("#")[0])
        one.get_by_text("This page needs its token").wait_for()
        one.goto(f"{site.url.partition('#')[0]}#token=wrong")
        one.get_by_text("This page needs its token").wait_for()
        one.goto(site.url)
        one.wait_for_selector(".list")
        assert one.url.endswith("#/") and site.token not in one.content()
    finally:
        context.close()
