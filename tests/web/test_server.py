"""`vmfs web` on a real mount, without a browser: what it answers, refuses, bounds and gives back."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mounting import SOON, has_news, wait_until
from web.site import Site

from vmfs.client import Vm
from vmfs.web.live import Watch
from vmfs.web.panes import PANES
from vmfs.web.place import Place

OUTSIDE = [
    "..", "%2e%2e", "..%2f..", "%2e%2e%2f%2e%2e%2ftmp", ".hidden", "a%2fb", "x" * 65, "a%00b", "a%0ab", "%3Cscript%3E",
]  # fmt: skip


def looked_at(page, *, until, seconds=SOON):
    """The messages of a page until one for which `until` holds; that one."""
    end = time.monotonic() + seconds
    while True:
        message = json.loads(page.recv(timeout=max(end - time.monotonic(), 0)))
        if until(message):
            return message


def panes_of(page, *names):
    """What the page is told of these panes, in any order."""
    told = {}

    def all_are_told(message):
        if message.get("pane") in names:
            told[message["pane"]] = message["data"]
        return told.keys() >= set(names)

    looked_at(page, until=all_are_told)
    return told


def watch(page, machine, **panes):
    page.send(json.dumps({"watch": {"machine": machine, "cpu": 0, "panes": panes}}))


def test_without_the_token_nothing_is_told(site, bare):
    name = Path(bare.path).name
    for method, path in (("GET", "/api/server"), ("POST", f"/api/machines/{name}/do/remove"), ("PUT", "/api/uploads")):
        assert site.ask(method, path, {}, Authorization="")[0] == 403
        assert site.ask(method, path, {}, Origin="http://evil.example")[0] == 403
        assert site.ask(method, path, {}, Host="evil.example")[0] == 403
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    for path in ("/live", f"/api/machines/{name}/streams/console", f"/api/machines/{name}/vnc"):
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"ws://{site.host}{path}", subprotocols=["vmfs", "token.wrong"])
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"ws://{site.host}{path}", subprotocols=["vmfs", f"token.{site.token}"], origin="http://evil.example")
    assert Path(bare.path).is_dir()


def test_the_page_has_no_script_or_style_in_it_and_says_so(site):
    status, text = site.ask("GET", "/", Authorization="")
    assert status == 200 and site.token.encode() not in text
    with contextlib.closing(http.client.HTTPConnection(site.host, timeout=SOON)) as line:
        line.request("GET", "/")
        answer = line.getresponse()
        policy = answer.headers["content-security-policy"]
        body = answer.read().decode()
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert policy.partition("'nonce-")[2].partition("'")[0] in body
    assert "<style" not in body and " style=" not in body and "onclick" not in body
    assert "<script type=\"module\" src=\"static/main.js\"></script>" in body


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py",
                                  "/static//etc/passwd", "/static/panes/../../gate.py"])  # fmt: skip
def test_no_file_outside_of_the_page_s_own(site, path):
    assert site.ask("GET", path, Authorization="")[0] in (403, 404)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_is_no_path(site, name):
    status, answer = site.ask("POST", f"/api/machines/{name}/do/remove", {})
    assert status in (404, 409), answer
    status, _ = site.ask("GET", f"/api/machines/{name}/screen.png")
    assert status in (404, 409)
    for path in (f"/api/machines/{name}/streams/console", f"/api/machines/{name}/vnc"):
        from websockets.exceptions import ConnectionClosed, InvalidStatus

        with pytest.raises((ConnectionClosed, InvalidStatus)), site.socket(path) as page:
            page.recv(timeout=SOON)
    assert os.path.isdir("/tmp") and site.mount.is_dir()


@pytest.mark.parametrize("said", [{"name": "../x"}, {"name": ".x"}, {"name": ""}, {"name": 5}, {}, {"name": "a\nb"}])
def test_a_snapshot_s_name_is_no_path(site, bare, said):
    name = Path(bare.path).name
    for action in ("snapshot", "restore", "drop", "fork"):
        status, answer = site.ask("POST", f"/api/machines/{name}/do/{action}", said)
        assert status == 409 and "a name is" in answer["error"]


@pytest.mark.parametrize(
    ("action", "said", "sentence"),
    [
        ("nothing", {}, "there is no such action"),
        ("step", {"count": "many"}, "a number from"),
        ("step", {"cpu": -1}, "a CPU is a number"),
        ("step", {"cpu": "../x"}, "a CPU is a number"),
        ("set-register", {"name": "rax", "value": "nine"}, "is not a number"),
        ("set-register", {"name": "rpi", "value": "9"}, "there is no register"),
        ("set-register", {"name": "rax", "value": "1\nrbx=2"}, "one line of text"),
        ("set-memory", {"space": "mem", "at": "0x1000", "hex": "zz"}, "hexadecimal"),
        ("set-memory", {"space": "kernel", "at": "0x1000", "hex": "00"}, "virt or mem"),
        ("set-memory", {"space": "mem", "at": "0xffffffffffff0000", "hex": "00"}, ""),
        ("debug", {"line": "break 0x1000\ndelete all"}, "one line of text"),
        ("debug", {"line": "brake 0x1000"}, ""),
        ("back", {"count": 1}, "history"),
        ("goto", {"instructions": -1}, "a number from"),
        ("restore", {"name": "never"}, ""),
        ("keys", {"line": "f1\nf2"}, "one line of text"),
        ("trace", {"kinds": "insn"}, "a list"),
        ("writer", {"at": "nowhere"}, ""),
    ],
)
def test_what_cannot_be_is_said_and_nothing_changes(site, bare, action, said, sentence):
    before = bare.read_text("registers"), bare.read_text("debug")
    status, answer = site.ask("POST", f"/api/machines/{Path(bare.path).name}/do/{action}", said)
    assert status in (404, 409) and sentence in answer["error"] and "Traceback" not in answer["error"]
    assert (bare.read_text("registers"), bare.read_text("debug")) == before


@pytest.mark.parametrize("body", [b"[]", b"nothing", b"[" * 60000, b"\xff", b'{"a": ' + b"1" * 70000])
def test_a_body_that_is_no_object(site, bare, body):
    status, answer = site.ask("POST", f"/api/machines/{Path(bare.path).name}/do/step", body)
    assert status in (400, 413) and answer["error"]
    assert not bare.read_text("exit")


def test_actions_do_what_files_do(site, bare):
    name = Path(bare.path).name
    assert site.do(name, "step").startswith("debug cause=step rip=0x1003")
    site.do(name, "set-register", name="rax", value="0x77")
    assert bare.regs.rax == 0x77
    site.do(name, "set-memory", space="virt", at="rsp+0x10", hex="deadbeef")
    assert bare.read_virt(0x9010, 4) == bytes.fromhex("deadbeef")
    site.do(name, "debug", line="break 0x1006")
    assert site.do(name, "until", at="0x2000").startswith("debug cause=breakpoint id=1 rip=0x1006")
    site.do(name, "run")
    wait_until(lambda: bare.state == "paused")
    site.do(name, "snapshot", name="kept")
    site.do(name, "fork", name=f"{name}-2", of="kept")
    with Vm(f"{bare.path}-2") as fork:
        assert fork.regs.rip == 0x1006
    site.do(f"{name}-2", "remove")
    site.do(name, "drop", name="kept")
    site.do(name, "reset")
    assert bare.regs.rip == 0xFFF0


def test_a_page_is_told_what_changes_and_nothing_else(site, bare):
    name = Path(bare.path).name
    with site.socket("/live") as page:
        memory = {"at": "rsp", "size": 32}
        watch(page, name, head={}, registers={}, disasm={}, memory=memory, why={}, stack={}, points={})
        head = looked_at(page, until=lambda message: message.get("pane") == "head")["data"]
        assert head["state"] == "paused" and head["machine"] == "bare" and head["cpus"] == "1"
        looked_at(page, until=lambda message: message.get("pane") == "points")
        with pytest.raises(TimeoutError):  # nothing changes
            page.recv(timeout=1.5)
        bare.step(1)
        told = panes_of(page, "registers", "disasm")
        registers, code = told["registers"], told["disasm"]
        assert dict(registers["rows"])["rax"] == "0x0000000000000001" and registers["mode"] == "long"
        assert code["rip"] == "0x1003" and "inc rbx" in next(line for line in code["lines"] if "0000001003" in line)
        bare.write_virt(0x9000, b"\x55")
        memory = looked_at(page, until=lambda message: message.get("pane") == "memory")["data"]
        assert memory["bytes"][:2] == [0x55, 0] and memory["at"] == "0x9000"
        watch(page, name, memory={"at": "0x3ffff8", "space": "mem", "size": 16})  # RAM ends there
        assert looked_at(page, until=lambda message: message.get("pane") == "memory")["data"]["bytes"][8:] == [None] * 8
        watch(page, name, pagetable={"at": "0x1000"})
        walk = looked_at(page, until=lambda message: message.get("pane") == "pagetable")["data"]["walk"]
        assert [step["leads"] for step in walk] == ["table", "table", "page"] and walk[0]["maps"] == "512G"
        watch(page, name, memory={"at": "nowhere"})
        assert looked_at(page, until=lambda message: message.get("pane") == "memory")["error"]
        os.rmdir(bare.path)
        assert looked_at(page, until=lambda message: "gone" in message)["gone"] == name


def test_what_is_told_at_once_is_of_one_moment(bare, web_server, monkeypatch):
    asked = {"machine": Path(bare.path).name, "panes": {"registers": {}, "disasm": {}, "stack": {}}}
    with contextlib.closing(Watch(Place(web_server.path), asked)) as seen:
        assert {message["pane"] for message in seen.look()} == {"registers", "disasm", "stack"}
        assert seen.look() == []
        read, steps = PANES["registers"], iter([True])

        def read_and_step(*arguments):
            found = read(*arguments)
            if next(steps, False):  # between this pane and the next one
                bare.step(1)
            return found

        monkeypatch.setitem(PANES, "registers", read_and_step)
        assert seen.look() == [] and next(steps)  # what only looks has changed nothing, so nothing was read
        steps = iter([True])
        bare.step(1)
        told = {message["pane"]: message["data"] for message in seen.look()}
        assert dict(told["registers"]["rows"])["rip"] == "0x0000000000001006" and told["disasm"]["rip"] == "0x1006"
        assert seen.look() == []


def test_pages_that_look_at_other_code_get_their_own(bare, web_server):
    place, name = Place(web_server.path), Path(bare.path).name
    wrong = []

    def look(at):
        with contextlib.closing(place.open(name)) as vm:
            for _ in range(25):
                if not (lines := PANES["disasm"](vm, 0, {"at": at, "count": 2})["lines"])[0].startswith(at):
                    wrong.append((at, lines))

    threads = [threading.Thread(target=look, args=(f"{at:#018x}",)) for at in (0x1000, 0x1003, 0x1006)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []
    lines = bare.read_text("disasm").splitlines()
    assert lines[0].startswith("0x0000000000001000: ") and len(lines) == 16


def test_of_several_cpus_one_is_shown_and_stepped(site, web_server):
    with Vm.temporary(web_server.path, mem_size="4M", cpus=2, mode="long") as vm:
        vm.write_virt(0x1000, bytes.fromhex("48ffc0 ebfb"))
        sregs = vm.read("sregs")
        vm.write("cpu1/sregs", sregs)
        vm.cpu(1).regs.update(rip=0x1000)
        name = Path(vm.path).name
        assert site.do(name, "step", cpu=1) == "debug cause=step rip=0x1003 cpu=1"
        site.do(name, "set-register", cpu=1, name="rbx", value="7")
        assert (vm.cpu(1).regs.rbx, vm.regs.rbx) == (7, 0)
        with site.socket("/live") as page:
            panes = {"registers": {}, "memory": {"at": "rip"}}
            page.send(json.dumps({"watch": {"machine": name, "cpu": 1, "panes": panes}}))
            registers = looked_at(page, until=lambda message: message.get("pane") == "registers")
            assert registers["cpu"] == 1 and dict(registers["data"]["rows"])["rax"] == "0x0000000000000001"
            assert looked_at(page, until=lambda message: message.get("pane") == "memory")["data"]["at"] == "0x1003"


@pytest.mark.parametrize("said", ["[]", "nothing", '{"watch": 5}', '{"look": {}}'])
def test_a_page_that_says_nonsense_is_let_go_or_not_heard(site, said):
    from websockets.exceptions import ConnectionClosed

    with site.socket("/live") as page:
        page.send(said)
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            page.recv(timeout=0.5)
    assert site.ask("GET", "/api/server")[0] == 200


@pytest.mark.parametrize("asked", [{"cpu": "x"}, {"cpu": 99}, {"panes": {"secret": {}}}, {"panes": {"head": 5}},
                                   {"machine": "../x"}, {"machine": 5}, {"panes": 7}])  # fmt: skip
def test_a_page_that_looks_at_what_is_not_there(site, bare, asked):
    with site.socket("/live") as page:
        page.send(json.dumps({"watch": {"machine": Path(bare.path).name, "cpu": 0, "panes": {}, **asked}}))
        looked_at(page, until=lambda message: "failed" in message or "gone" in message)


def test_a_page_that_is_gone_holds_nothing_of_the_mount(site, bare):
    name = Path(bare.path).name
    bare.close()
    wait_until(lambda: not site.descriptors(), "other tests' pages are closed")
    with site.socket("/live") as page, site.socket("/live") as other:
        for each in (page, other):
            watch(each, name, head={}, registers={}, memory={"at": "0"})
            looked_at(each, until=lambda message: message.get("pane") == "memory")
        assert site.descriptors()
    wait_until(lambda: not site.descriptors(), "the descriptors are closed")
    with site.socket("/live") as page:
        for asked in ({"list": True}, {}, {"list": True}):
            page.send(json.dumps({"watch": asked}))
            wait_until(lambda asked=asked: bool(site.descriptors()) == bool(asked), "the files of the list")
    wait_until(lambda: not site.descriptors(), "those of the list are closed")


def test_a_page_that_takes_nothing_holds_up_no_other(site, bare):
    """It gets no more looks, and what waits for it is bounded."""
    name = Path(bare.path).name
    bare.start()
    line = socket.create_connection(site.host.split(":"))
    try:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(
            f"GET /live HTTP/1.1\r\nHost: {site.host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: vmfs, token.{site.token}\r\n\r\n".encode()
        )
        panes = {"memory": {"at": "0x1000", "size": 4096}, "registers": {}}
        text = json.dumps({"watch": {"machine": name, "cpu": 0, "panes": panes}}).encode()
        line.sendall(b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text)
        with site.socket("/live") as page:
            watch(page, name, registers={})
            resident = _resident(site.process.pid)
            for _ in range(5):
                looked_at(page, until=lambda message: message.get("pane") == "registers", seconds=20)
            assert _resident(site.process.pid) - resident < 16 << 20
    finally:
        line.close()
        bare.pause()


def _resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_call_that_waits_keeps_no_other_machine_from_answering(site, web_server, bare):
    """`step` of a CPU that sleeps waits; more than a machine's share of calls is refused, and others are served."""
    name = Path(bare.path).name
    with Vm.temporary(web_server.path, mem_size="4M", mode="long") as busy:
        busy.write_mem(0x1000, bytes.fromhex("ebfe"))
        busy.regs.rip = 0x1000
        lines = []
        for _ in range(12):
            line = http.client.HTTPConnection(site.host, timeout=SOON)
            line.request("POST", f"/api/machines/{Path(busy.path).name}/do/until", b'{"at": "0x2000"}',
                         {"Authorization": f"Bearer {site.token}"})  # fmt: skip
            lines.append(line)
        fds = [line.sock.fileno() for line in lines]
        wait_until(lambda: len(has_news(*fds, seconds=1)) == 11, "but one are refused")
        assert busy.state == "running"
        assert site.do(name, "step").startswith("debug cause=step")
        busy.pause()
        answers = [line.getresponse() for line in lines]
        assert {answer.status for answer in answers} <= {200, 409, 503} and 200 in {answer.status for answer in answers}
        for line in lines:
            line.close()


def test_a_console_is_joined_with_what_it_has_said(site, web_server):
    # out 3F8h: H, i; then in, for ever
    sector = bytearray(bytes.fromhex("baf803 b048 ee b069 ee ec ebfd")).ljust(512, b"\0")
    sector[510:] = b"\x55\xaa"
    with Vm.temporary(web_server.path, mem_size="8M") as vm:
        vm.boot(bytes(sector), cmdline=None)
        vm.console.expect("Hi")
        for _ in range(2):
            with site.socket(f"/api/machines/{Path(vm.path).name}/streams/console") as page:
                assert page.recv(timeout=SOON) == b"Hi"
                page.send(b"typed")
        with site.socket(f"/api/machines/{Path(vm.path).name}/streams/hvc") as page:
            from websockets.exceptions import ConnectionClosed

            with pytest.raises(ConnectionClosed) as closed:
                page.recv(timeout=SOON)
            assert closed.value.rcvd and "hvc" in closed.value.rcvd.reason
        vm.close()
        wait_until(lambda: not site.descriptors(), "the consoles are closed")


def test_a_screen_is_joined_and_left(site, web_server):
    with Vm.temporary(web_server.path, mem_size="8M", machine="pc") as vm:
        path = f"/api/machines/{Path(vm.path).name}/vnc"
        with site.socket(path) as one, site.socket(path) as two:
            for page in (one, two):
                assert page.recv(timeout=SOON) == b"RFB 003.008\n"
            assert "nopassword" in vm.read_text("vnc", keep=False)
        wait_until(lambda: vm.read_text("vnc", keep=False) == "off", "nobody looks, so it listens no more")
        vm.write("vnc", "127.0.0.1:0 password=secret\n")
        with site.socket(path) as page:
            assert page.recv(timeout=SOON) == b"RFB 003.008\n"
        assert site.do(Path(vm.path).name, "screen-password") == "secret"
        assert "password=secret" in vm.read_text("vnc", keep=False)  # it is somebody's own: it stays
        status, picture = site.ask("GET", f"/api/machines/{Path(vm.path).name}/screen.png")
        assert status == 200 and picture.startswith(b"\x89PNG")


# ---- files


def test_machines_are_made_of_files(site):
    flat = bytes.fromhex("48ffc0f4")
    status, answer = site.ask("PUT", "/api/uploads?name=..%2F..%2Fx%20y", flat)
    assert status == 200
    said = {"name": "made", "kind": "bare", "mode": "long", "mem": "4M", "at": "0x2000", "file": answer["result"]}
    assert site.ask("POST", "/api/machines", said) == (200, {"result": None})
    try:
        with Vm(site.mount / "made") as vm:
            assert vm.read_mem(0x2000, 4) == flat and vm.regs.rip == 0x2000 and vm.mode == "long"
        assert site.ask("POST", "/api/machines", said)[0] == 409  # it is there, and the file is not
    finally:
        site.do("made", "remove")
    assert site.ask("POST", "/api/machines", said)[1]["error"].startswith("that file is not here")
    assert not (site.mount / "made").exists()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [({"name": "../x"}, "a name is"), ({"mem": "lots"}, "number"), ({"cpus": 65}, "CPUs"),
     ({"engine": "qemu"}, "an engine is"), ({"file": "../../etc/passwd"}, "not here"),
     ({"kind": "bare", "mode": "v8086"}, "a mode is"), ({"cmdline": "a\nb"}, "one line")],
)  # fmt: skip
def test_a_machine_that_cannot_be_made_is_not(site, said, sentence):
    before = set(os.listdir(site.mount))
    status, answer = site.ask("POST", "/api/machines", {"name": "never", **said})
    assert status == 409 and sentence in answer["error"]
    assert set(os.listdir(site.mount)) == before


def test_files_are_bounded_and_what_is_cut_off_is_gone(web_server, tmp_path):
    one = Site(web_server.path, "--uploads", str(tmp_path), "--max-upload", "1M")
    try:
        assert one.ask("PUT", "/api/uploads?name=a", bytes(700 << 10))[0] == 200
        status, answer = one.ask("PUT", "/api/uploads?name=b", bytes(700 << 10))
        assert status == 409 and "--max-upload" in answer["error"]
        line = socket.create_connection(one.host.split(":"))  # no length: it is counted as it comes
        line.sendall(f"PUT /api/uploads?name=c HTTP/1.1\r\nHost: {one.host}\r\nAuthorization: Bearer {one.token}\r\n"
                     "Transfer-Encoding: chunked\r\n\r\n".encode())  # fmt: skip
        with contextlib.suppress(OSError):
            for _ in range(12):
                line.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        assert b"409" in line.recv(1000)
        line.close()
        line = socket.create_connection(one.host.split(":"))
        line.sendall(f"PUT /api/uploads?name=d HTTP/1.1\r\nHost: {one.host}\r\nAuthorization: Bearer {one.token}\r\n"
                     "Content-Length: 100000\r\n\r\nonly this".encode())  # fmt: skip
        line.close()
        wait_until(lambda: len(list(tmp_path.iterdir())) == 1, "what was cut off is removed")
    finally:
        assert "Traceback" not in one.end()


# ---- how it is started


def web(*arguments):
    command = [sys.executable, "-m", "vmfs.cli", "web", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [(["/tmp"], 1, "/tmp is not a vmfs mount"), (["--listen", "nowhere"], 2, "HOST:PORT"),
     (["--listen", "h:99999"], 2, "HOST:PORT"), (["--listen", "203.0.113.7:80", "MOUNT"], 1, "203.0.113.7"),
     (["--uploads", "/etc/passwd", "MOUNT"], 1, "no directory")],
)  # fmt: skip
def test_a_start_that_fails_is_a_sentence(site, arguments, code, sentence):
    ended = web(*(str(site.mount) if word == "MOUNT" else word for word in arguments))
    assert ended.returncode == code and sentence in ended.stderr and "Traceback" not in ended.stderr


def test_another_address_than_loopback_is_warned_of(web_server):
    one = Site(web_server.path, "--listen", "0.0.0.0:0")
    said = one.end()
    assert "nothing is encrypted" in said and not list(Path("/tmp").glob(f"vmfs-web-*{one.process.pid}"))


def test_packages_that_are_missing_are_named(site):
    code = ("import importlib.util, sys; find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *rest: None if name == 'uvicorn' else find(name, *rest)\n"
            f"from vmfs.cli import main; sys.exit(main(['web', {str(site.mount)!r}]))")  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON, check=False)
    assert ended.returncode == 1 and "pip install 'vmfs[web]'" in ended.stderr and "uvicorn" in ended.stderr


def test_no_other_command_loads_the_packages():
    code = ("import sys, vmfs.cli, vmfs.commands.mount, vmfs.commands.boot, vmfs.client; vmfs.cli.whole_parser();"
            "sys.exit(any(name in sys.modules for name in ('starlette', 'uvicorn', 'websockets')))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=SOON).returncode == 0
