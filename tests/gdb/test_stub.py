"""The commands, over a channel, on a machine of the emulator; and what hostile clients send."""

from __future__ import annotations

import re
import struct

import pytest
import trio
from gdb.stub_client import Surroundings, connected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfs.debug.symbols import SymbolTable
from vmfs.machine.gdb.packets import escape, frame
from vmfs.machine.gdb.server import Gdb
from vmfs.machine.gdb.stub import COMMANDS, PACKET_SIZE, QUERIES
from vmfs.machine.gdb.target import layout
from vmfs.words import exits
from vmfs.words.registers import has_avx

ROWS = layout("x86-64", avx=False).registers
RIP = 16


def number_of(name: str) -> int:
    return next(number for number, row in enumerate(ROWS) if row.name == name)


def fields(stop: bytes) -> dict[str, str]:
    """The pairs of a T reply."""
    assert re.fullmatch(rb"T[0-9a-f]{2}(?:[^:;]+:[^;]*;)*", stop), stop
    return dict(pair.split(":") for pair in stop[3:].decode().rstrip(";").split(";"))


def pc(stop: bytes) -> int:
    return struct.unpack("<Q", bytes.fromhex(fields(stop)[f"{RIP:02x}"]))[0]


# inc ax at 0x100, four times; then a loop of two instructions
CODE = bytes.fromhex("40404040" "43ebfd")


@pytest.fixture
def loaded(vm):
    vm.memory.write(0x100, CODE)
    vm.change(lambda cpu: _set_rip(cpu, 0x100))
    return vm


def _set_rip(cpu, value):
    regs = bytearray(cpu.get_state("regs"))
    struct.pack_into("<Q", regs, 128, value)
    cpu.set_state("regs", bytes(regs))


def test_what_gdb_asks_first(loaded, on_stub):
    async def test(client, _):
        supported = await client.ask(b"qSupported:multiprocess+;swbreak+;xmlRegisters=i386")
        assert b"PacketSize=%x" % PACKET_SIZE in supported and b"qXfer:features:read+" in supported
        assert await client.ask(b"vMustReplyEmpty") == b""
        assert await client.ask(b"Hg0") == b"OK"
        assert await client.ask(b"Hc-1") == b"OK"
        assert await client.ask(b"qC") == b"QC1"
        assert await client.ask(b"qAttached") == b"1"
        assert await client.ask(b"qOffsets") == b""
        assert await client.ask(b"qSymbol::") == b"OK"
        assert await client.ask(b"vCont?") == b"vCont;c;C;s;S;r"
        assert await client.ask(b"qfThreadInfo") == b"m1"
        assert await client.ask(b"qsThreadInfo") == b"l"
        assert bytes.fromhex((await client.ask(b"qThreadExtraInfo,1")).decode()) == b"cpu0 [real]"
        assert await client.ask(b"T1") == b"OK"
        assert await client.ask(b"T2") == b"E22"
        assert await client.ask(b"Hg2") == b"E22"
        why = await client.ask(b"?")
        assert why.startswith(b"T05") and pc(why) == 0x100
        assert await client.ask(b"vRun;") == b""

    on_stub(test)


def test_a_first_packet_that_came_twice_is_answered_once(on_stub):
    """As of a gdb that has waited too long for its pipe to begin."""

    async def test(client, _):
        await client.raw(b"+" + frame(b"qC") + frame(b"qC") + frame(b"qC"))
        assert await client.heard(b"+++" + frame(b"QC1"))
        assert await client.ask(b"qAttached") == b"1"
        await client.raw(frame(b"qC") + frame(b"qC"))
        assert await client.heard((b"+" + frame(b"QC1")) * 2)

    on_stub(test)


def test_acknowledgements_end_when_asked(on_stub):
    async def test(client, _):
        await client.raw(b"+" + frame(b"qC"))
        assert await client.heard(b"+")
        assert await client.heard(frame(b"QC1"))
        await client.raw(b"-")  # once more
        assert await client.heard(frame(b"QC1"))
        await client.raw(b"$qC#00")
        assert await client.heard(b"-")
        assert await client.ask(b"QStartNoAckMode") == b"OK"
        await client.raw(frame(b"qC"))
        assert await client.heard(frame(b"QC1"))
        await client.raw(b"$qC#00")
        assert (await client.reply()).startswith(b"E.")

    on_stub(test)


def avx_of(surroundings) -> bool:
    """Whether the machine's CPU has the upper halves of the YMM registers: the emulator's, where the host has AVX."""
    return surroundings.vm.at_boundary(has_avx).result()


def test_target_xml_in_pieces(on_stub):
    async def test(client, surroundings):
        document, size = b"", 0
        while True:
            part = await client.ask(b"qXfer:features:read:target.xml:%x,200" % size)
            document, size = document + part[1:], size + len(part) - 1
            if part[:1] == b"l":
                break
        assert document.decode() == layout("x86-64", avx=avx_of(surroundings)).xml()
        assert await client.ask(b"qXfer:features:read:target.xml:ffffff,10") == b"l"
        assert await client.ask(b"qXfer:features:read:other.xml:0,10") == b"E00"
        assert await client.ask(b"qXfer:auxv:read::0,10") == b""
        threads = await client.ask(b"qXfer:threads:read::0,1000")
        assert b'<thread id="1" core="0" name="cpu0">real</thread>' in threads and threads[:1] == b"l"
        assert (await client.ask(b"qXfer:memory-map:read::0,1000")).startswith(b"l<?xml")

    on_stub(test)


def test_the_layout_is_chosen_before_it_is_used(on_stub):
    async def test(client, _):
        assert await client.ask(b"Qvmfs.Layout:i8086,linear") == b"OK"
        assert b"<architecture>i8086<" in await client.ask(b"qXfer:features:read:target.xml:0,1000")
        assert await client.ask(b"Qvmfs.Layout:i386") == b"E16"

    on_stub(test)


def test_registers(loaded, on_stub):
    async def test(client, surroundings):
        whole = bytes.fromhex((await client.ask(b"g")).decode())
        rows = layout("x86-64", avx=avx_of(surroundings)).registers
        assert len(whole) == sum(row.size for row in rows)
        assert await client.ask(b"p%x" % RIP) == b"0001000000000000"
        assert await client.ask(b"P0=8877665544332211") == b"OK"
        assert await client.ask(b"p0") == b"8877665544332211"
        changed = b"\x01" + bytes(7) + whole[8:]
        assert await client.ask(b"G" + changed.hex().encode()) == b"OK"
        assert bytes.fromhex((await client.ask(b"g")).decode()) == changed
        for bad in (b"p", b"pfff", b"P0", b"P0=1", b"P0=00", b"Pfff=00", b"G00", b"Gzz", b"pzz"):
            assert await client.ask(bad) == b"E22", bad
        assert bytes.fromhex((await client.ask(b"g")).decode()) == changed
        cr0 = number_of("cr0")
        refused = await client.ask(b"P%x=%b" % (cr0, b"01000080" + b"01000000"))  # a reserved bit
        assert refused.startswith(b"E."), refused
        assert surroundings.complaints
        assert bytes.fromhex((await client.ask(b"g")).decode()) == changed

    on_stub(test)


def test_memory(loaded, on_stub):
    async def test(client, _):
        assert await client.ask(b"m100,4") == b"40404040"
        assert await client.ask(b"x100,4") == b"b@@@@"
        assert await client.ask(b"M2000,3:010203") == b"OK"
        data = bytes(range(256))
        assert await client.ask(b"X3000,100:" + escape(data)) == b"OK"
        assert loaded.memory.read(0x3000, 256) == data
        assert loaded.memory.read(0x2000, 4) == b"\1\2\3\0"
        assert await client.ask(b"X0,0:") == b"OK"  # gdb's question whether there is X
        assert len(await client.ask(b"m0,ffffffff")) <= PACKET_SIZE
        end = loaded.memory.size
        assert await client.ask(b"m%x,10" % (end - 4)) == b"00" * 4
        assert await client.ask(b"m%x,10" % end) == b"E14"
        assert await client.ask(b"mffffffffffffffff,10") == b"E14"
        assert await client.ask(b"M%x,8:0102030405060708" % (end - 4)) == b"E14"
        assert loaded.memory.read(end - 4, 4) == bytes(4)  # all or nothing
        bad_ones = (b"m", b"m1", b"m1,2,3", b"m,1", b"mx,1", b"M1,2:01", b"M1,1", b"M1,1:0", b"X1,2:a")
        for bad in (*bad_ones, b"m1,f0000000000000000"):
            assert await client.ask(bad) == b"E22", bad

    on_stub(test)


def test_memory_is_linear_unless_asked(vm, on_stub):
    vm.resize_memory(16 << 20)
    vm.set_mode("long")
    # The identity mapping's second 2 MiB page is made to show the third.
    tables = struct.unpack_from("<Q", vm.at_boundary(lambda cpu: cpu.get_state("sregs")).result(), 24 * 8 + 32 + 16)[0]
    pd = (struct.unpack("<Q", vm.memory.read(tables + 4096, 8))[0]) & ~0xFFF
    vm.memory.write(pd + 8, struct.pack("<Q", 0x40_0000 | 0x87))
    vm.memory.write(0x20_0000, b"two!")
    vm.memory.write(0x40_0000, b"four")

    async def test(client, _):
        assert await client.ask(b"m200000,4") == b"four".hex().encode()
        assert await client.ask(b"qqemu.PhyMemMode") == b"0"
        assert await client.ask(b"Qqemu.PhyMemMode:1") == b"OK"
        assert await client.ask(b"m200000,4") == b"two!".hex().encode()
        assert await client.ask(b"Qqemu.PhyMemMode:2") == b"E22"
        assert (await client.ask_and_hear(b"qRcmd," + b"phys off".hex().encode())) == ("phys off\n", b"OK")
        assert await client.ask(b"M200000,1:46") == b"OK"
        assert vm.memory.read(0x40_0000, 4) == b"Four"
        assert await client.ask(b"m8000000000000000,4") == b"E14"  # not canonical

    on_stub(test)


def test_regions_of_memory(vm, on_stub):
    async def test(client, _):
        assert await client.ask(b"qMemoryRegionInfo:0") == b"start:0;size:%x;permissions:rwx;" % vm.memory.size
        assert await client.ask(b"qMemoryRegionInfo:ffffffffffffffff") == b"start:%x;size:%x;" % (
            vm.memory.size,
            (1 << 64) - vm.memory.size,
        )
        assert await client.ask(b"qMemoryRegionInfo:x") == b"E22"

    on_stub(test)


def test_steps(loaded, on_stub):
    async def test(client, _):
        for command in (b"s", b"vCont;s:1", b"vCont;s:1;c", b"vCont;S05"):
            stop = await client.ask(command)
            assert stop.startswith(b"T05")
        assert pc(stop) == 0x104
        stop = await client.ask(b"s100")
        assert pc(stop) == 0x101
        stop = await client.ask(b"vCont;r100,104:1;c:1")
        assert pc(stop) == 0x104
        for bad in (b"vCont;", b"vCont;q", b"vCont", b"vCont;s:2", b"vCont;r1", b"vCont;Cxx", b"sx", b"C", b"S123"):
            assert await client.ask(bad) == b"E22", bad
        assert pc(await client.ask(b"?")) == 0x104

    on_stub(test)


def test_a_range_with_a_breakpoint_in_it(loaded, on_stub):
    async def test(client, _):
        assert await client.ask(b"Z0,102,1") == b"OK"
        assert pc(await client.ask(b"vCont;r100,104:1")) == 0x102
        assert pc(await client.ask(b"vCont;r100,104:1")) == 0x104

    on_stub(test)


def test_breakpoints(loaded, on_stub):
    code = bytes.fromhex("40404040" "4343ebfc")
    loaded.memory.write(0x100, code)

    async def test(client, _):
        assert await client.ask(b"Z0,102,1") == b"OK"
        stop = await client.ask(b"c")
        assert stop.startswith(b"T05") and pc(stop) == 0x102 and b"swbreak:;" in stop
        assert fields(stop)["thread"] == "1"
        assert loaded.memory.read(0x100, len(code)) == code  # nothing is written into the guest
        # gdb takes all away, and sets them again: it is the same point of the machine.
        assert await client.ask(b"z0,102,1") == b"OK"
        assert "hits=1 owner=gdb" in loaded.points_text()
        assert await client.ask(b"Z1,102,1") == b"OK"
        stop = await client.ask(b"c100")
        assert pc(stop) == 0x102 and b"hwbreak:;" in stop
        assert loaded.points_text().splitlines() == ["0", "1 break 0x102 hits=2 owner=gdb by=engine"]
        assert await client.ask(b"z1,102,1") == b"OK"
        assert await client.ask(b"Z0,106,1") == b"OK"
        stop = await client.ask(b"c100")
        assert pc(stop) == 0x106
        assert "0x102" not in loaded.points_text()
        assert await client.ask(b"Z5,100,1") == b""
        for bad in (b"Z0", b"Z0,1", b"Zx,1,1", b"Z0,1,1;X1,2", b"z0,1,1,1"):
            assert await client.ask(bad) == b"E22", bad

    on_stub(test)
    assert loaded.points_text() == "0\n"  # those of a gdb go with it


def test_points_that_the_shell_has_deleted_come_back(loaded, on_stub):
    async def test(client, _):
        await client.ask(b"Z0,102,1")
        loaded.set_points(lambda points: points.delete_all()).result()
        assert pc(await client.ask(b"c")) == 0x102

    on_stub(test)


def test_the_shells_points_stop_and_say_so(loaded, on_stub):
    loaded.set_points(lambda points: points.add_break(0x103)).result()

    async def test(client, _):
        text, stop = await client.ask_and_hear(b"c")
        assert text == "vmfs: debug cause=breakpoint id=1 rip=0x103\n"
        assert stop.startswith(b"T05") and b"break" not in stop

    on_stub(test)
    assert "1 break 0x103" in loaded.points_text()  # it is not gdb's


def test_watchpoints(loaded, on_stub):
    loaded.memory.write(0x100, bytes.fromhex("a30020" "a10120" "ebf8"))  # mov [0x2000], ax; mov ax, [0x2001]

    async def test(client, _):
        assert await client.ask(b"Z2,2000,4") == b"OK"
        stop = await client.ask(b"c")
        assert fields(stop)["watch"] == "2000" and pc(stop) == 0x103
        assert await client.ask(b"z2,2000,4") == b"OK"
        assert await client.ask(b"Z3,2002,1") == b"OK"
        stop = await client.ask(b"c")
        assert fields(stop)["rwatch"] == "2002" and pc(stop) == 0x106
        assert await client.ask(b"z3,2002,1") == b"OK"
        assert await client.ask(b"Z4,2001,1") == b"OK"
        stop = await client.ask(b"c")
        assert fields(stop)["awatch"] == "2001" and pc(stop) == 0x103
        assert await client.ask(b"Z2,2000,0") == b"E22"
        assert await client.ask(b"Z2,2000,1001") == b"E22"
        assert await client.ask(b"Z2,ffffffffffffffff,2") == b"E22"

    on_stub(test)


def test_exits_are_signals_with_a_text(loaded, on_stub):
    # mov al, 0x41; out 0xe9, al; in al, 0x60; hlt; and again
    loaded.memory.write(0x100, bytes.fromhex("b041e6e9" "e460" "f4" "ebf7"))

    async def test(client, _):
        text, stop = await client.ask_and_hear(b"c")
        assert text.startswith("vmfs: io direction=out port=0xe9") and stop.startswith(b"T1e")
        text, stop = await client.ask_and_hear(b"c")
        assert text.startswith("vmfs: io direction=in port=0x60") and stop.startswith(b"T1e") and pc(stop) == 0x104
        loaded.set_access_data(b"\x77")
        stop = await client.ask(b"s")
        assert stop.startswith(b"T05") and pc(stop) == 0x106
        assert (await client.ask(b"p0"))[:2] == b"77"
        text, stop = await client.ask_and_hear(b"C1e")
        assert text.startswith("vmfs: hlt") and stop.startswith(b"T11")
        # What gdb passes (handle SIGUSR1 nostop noprint) it does not hear of.
        assert await client.ask(b"QPassSignals:1e;11") == b"OK"
        await client.ask(b"Z0,102,1")
        await client.ask(b"P%x=%b" % (RIP, b"0001" + b"00" * 6))
        stop = await client.ask(b"s")
        assert pc(stop) == 0x102
        for at in (0x104, 0x106, 0x107, 0x100):  # single steps over them are single steps
            stop = await client.ask(b"s")
            assert stop.startswith(b"T05") and pc(stop) == at
        assert pc(await client.ask(b"c")) == 0x102

    on_stub(test)


def test_a_triple_fault(loaded, on_stub):
    loaded.memory.write(0x100, bytes.fromhex("0f011e0801" "cd20"))  # lidt [0x108]; int 0x20

    async def test(client, _):
        text, stop = await client.ask_and_hear(b"c")
        assert text.startswith("vmfs: shutdown cause=triple-fault") and stop.startswith(b"T0b")
        text, stop = await client.ask_and_hear(b"c")  # it is off
        assert text.startswith("vmfs: shutdown") and stop.startswith(b"T0b")
        assert await client.ask(b"P%x=%b" % (RIP, b"0001" + b"00" * 6)) == b"OK"
        assert pc(await client.ask(b"s")) == 0x105

    on_stub(test)


def test_interrupting(loaded, on_stub):
    async def test(client, _):
        await client.send(b"c")
        await trio.to_thread.run_sync(_until_running, loaded)
        await client.raw(b"\x03")
        stop = await client.reply()
        assert stop.startswith(b"T02") and pc(stop) in (0x104, 0x105)
        await client.send(b"vCont;r104,107:1")  # never left
        await trio.to_thread.run_sync(_until_running, loaded)
        await client.raw(b"\x03")
        assert (await client.reply()).startswith(b"T02")

    on_stub(test)


def test_packets_do_not_pile_up_while_the_guest_runs(loaded, on_stub):
    async def test(client, _):
        await client.send(b"c")
        await trio.to_thread.run_sync(_until_running, loaded)
        await client.raw(frame(b"qC") * 20000 + b"\x03")
        assert (await client.reply()).startswith(b"T02")
        await client.send(b"qAttached")
        count = 0
        while await client.reply() != b"1":
            count += 1
        assert 0 < count < 1000

    on_stub(test)


def _until_running(vm):
    while not vm.counters()["instructions"] > 1000:
        pass


def test_a_machine_that_runs_is_stopped_for_gdb(loaded, on_stub):
    run = loaded.start()

    async def test(client, _):
        assert (await client.ask(b"?")).startswith(b"T05")
        assert isinstance(run.result(0), exits.Interrupted)

    on_stub(test)


@pytest.mark.parametrize("bits, architecture", [(32, b"i386<"), (64, b"i386:x86-64<")])
def test_the_layout_is_that_of_the_symbols(loaded, on_stub, bits, architecture):
    """gdb with a 32-bit ELF file takes no description of a 64-bit CPU."""
    loaded.symbols = SymbolTable([(0x100, "T", "here")], bits=bits)

    async def test(client, surroundings):
        document = await client.ask(b"qXfer:features:read:target.xml:0,1000")
        assert b"<architecture>" + architecture in document

    on_stub(test)


def test_somebody_elses_run(loaded, on_stub):
    async def test(client, surroundings):
        assert await client.ask(b"?")
        run = loaded.start()
        assert (await client.ask(b"p0")).endswith(b"0000")  # a sample
        assert await client.ask(b"m100,1") == b"40"
        assert (await client.ask(b"P0=0000000000000000")) == b"E16"
        text, stop = await client.ask_and_hear(b"c")
        assert "somebody else" in text and stop.startswith(b"T00")
        assert "somebody else" in surroundings.complaints[-1]
        assert not run.done()
        loaded.stop(run)
        assert isinstance(run.result(10), exits.Interrupted)

    on_stub(test)


def test_a_gdb_that_vanishes_leaves_the_machine_standing(loaded):
    async def main():
        surroundings = Surroundings(loaded)
        async with connected(Gdb(surroundings)) as client:
            await client.ask(b"Z0,7777,1")
            await client.send(b"c")
            await trio.to_thread.run_sync(_until_running, loaded)

    trio.run(main)
    assert loaded.state == "paused"
    assert loaded.points_text() == "0\n"
    assert loaded.last_exit.REASON == "interrupted"


@pytest.mark.parametrize("command, reply", ((b"D", b"OK"), (b"D;1", b"OK"), (b"vKill;1", b"OK"), (b"k", None)))
def test_detaching_and_killing(loaded, command, reply):
    async def main():
        gdb = Gdb(Surroundings(loaded))
        async with connected(gdb) as client:
            await client.ask(b"Z0,102,1")
            await client.send(command)
            if reply is not None:
                assert await client.reply() == reply
            with pytest.raises(EOFError):
                await client.reply()
            assert not gdb.connected
            assert loaded.points_text() == "0\n"
            async with connected(gdb) as another:  # and again
                assert await another.ask(b"qC") == b"QC1"

    trio.run(main)
    assert loaded.state == "paused"


def test_a_second_gdb_is_told(loaded):
    async def main():
        gdb = Gdb(Surroundings(loaded))
        async with connected(gdb) as first:
            assert await first.ask(b"qC") == b"QC1"
            async with connected(gdb) as second:
                assert await second.ask(b"qSupported") == b"E.another gdb is connected to this machine"
                with pytest.raises(EOFError):
                    await second.reply()
            assert await first.ask(b"qC") == b"QC1"

    trio.run(main)


def test_a_machine_that_is_removed_ends_the_session(loaded):
    async def main():
        async with connected(Gdb(Surroundings(loaded))) as client:
            assert await client.ask(b"qC") == b"QC1"
            loaded.close()
            await client.send(b"g")
            with pytest.raises(EOFError):
                await client.reply()

    trio.run(main)


def test_monitor(loaded, on_stub):
    async def test(client, surroundings):
        async def monitor(text):
            return await client.ask_and_hear(b"qRcmd," + text.hex().encode())

        assert await monitor(b"hello") == ("hellohello", b"OK")
        assert await monitor(b"bad thing") == ("it is bad\n", b"E22")
        assert await monitor(b"phys maybe") == ("phys: 'maybe' is not on or off\n", b"E22")
        long = b"y" * 40000
        assert await monitor(long) == ((long * 2).decode(), b"OK")
        assert await client.ask(b"qRcmd,zz") == b"E22"
        assert await client.ask(b"qRcmd,ff") == b"E22"
        assert surroundings.commands[0] == "hello"

    on_stub(test)


# ---- hostile clients

PREFIXES = [*COMMANDS, *(letter + name for name in QUERIES for letter in (b"q", b"Q")), b"qRcmd,", b"QPassSignals:"]
ARGUMENTS = st.one_of(
    st.binary(max_size=40),
    st.text("0123456789abcdef,;:=-rcsZ", max_size=40).map(str.encode),
    st.sampled_from([b"ffffffffffffffff,ffffffffffffffff", b"0,0:", b"1:1:1,1", b";c;c;c:1", b"-1"]),
)


# `c` would go on for ever: the guest is a hlt, which ends every run.
@given(st.lists(st.tuples(st.sampled_from(PREFIXES), ARGUMENTS), max_size=12))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_command_is_answered_or_ends_the_session(vm, commands):
    async def main():
        vm.reset()
        vm.memory.write(0, b"\xf4" * vm.memory.size)
        vm.change(lambda cpu: _set_rip(cpu, 0x100))
        async with connected(Gdb(Surroundings(vm))) as client:
            try:
                for prefix, arguments in commands:
                    await client.send(escape(prefix + arguments))
                    while (reply := await client.reply())[:1] == b"O" and reply != b"OK":
                        pass
                assert await client.ask(b"qC") == b"QC1"
            except (EOFError, trio.BrokenResourceError):  # one of them was k or D
                assert any(prefix[:1] in b"kD" or prefix == b"vKill" for prefix, _ in commands)

    trio.run(_limited, main)
    assert vm.state != "running"


@given(st.lists(st.one_of(st.binary(max_size=80), st.sampled_from([b"$", b"$m0,4#", b"\x03", b"$g#67", b"+", b"-"]))))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_leave_a_stub_that_answers(vm, pieces):
    async def main():
        async with connected(Gdb(Surroundings(vm))) as client:
            for piece in pieces:
                await client.raw(piece.replace(b"k", b"").replace(b"D", b""))
            await client.raw(b"$#00")  # ends whatever was begun
            await client.send(b"qAttached")
            while await client.reply() != b"1":
                pass

    trio.run(_limited, main)


async def _limited(main):
    with trio.fail_after(60):
        await main()


def test_page_tables_that_change_while_the_guest_stands_still(vm, on_stub):
    vm.resize_memory(16 << 20)
    vm.set_mode("long")
    tables = struct.unpack_from("<Q", vm.at_boundary(lambda cpu: cpu.get_state("sregs")).result(), 24 * 8 + 32 + 16)[0]
    pd = (struct.unpack("<Q", vm.memory.read(tables + 4096, 8))[0]) & ~0xFFF
    vm.memory.write(0x20_0010, b"two!")
    vm.memory.write(0x40_0010, b"four")

    async def test(client, _):
        for frame_at, there in ((0x20_0000, b"two!"), (0x40_0000, b"four"), (0x20_0000, b"two!")):
            vm.memory.write(pd + 8, struct.pack("<Q", frame_at | 0x87))
            for at, size in ((0, 4), (2, 2)):  # the second the way that is known
                reply = await client.ask(b"m%x,%x" % (0x20_0010 + at, size))
                assert bytes.fromhex(reply.decode()) == there[at:]
        vm.memory.write(pd + 8, struct.pack("<Q", 0))
        assert await client.ask(b"m200010,4") == b"E14"

    on_stub(test)
