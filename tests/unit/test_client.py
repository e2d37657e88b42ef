"""vmfs.client on plain files in place of a machine's: what it reads, writes, parses and refuses."""

import errno
import os
import struct

import pytest

from vmfs.client import Vm
from vmfs.words import exits, layouts
from vmfs.words.registers import REGISTERS

STATES = {"regs": 144, "sregs": 312, "debugregs": 128, "xcrs": 392, "fpu": 416, "xsave": 4096}


@pytest.fixture
def machine(tmp_path):
    """A directory with files of a machine's names and sizes."""
    folder = tmp_path / "machine"
    folder.mkdir()
    for name, size in STATES.items():
        (folder / name).write_bytes(bytes(size))
    for name in ("registers", "vm_run", "exit", "exit.data", "irq", "debug", "state", "error", "mode"):
        (folder / name).touch()
    (folder / "mem").write_bytes(bytes(2 * 4096))
    (folder / "reg").mkdir()
    return folder


@pytest.fixture
def vm(machine):
    with Vm.open(machine) as vm:
        yield vm


@pytest.mark.parametrize("name", REGISTERS)
def test_each_register_is_its_bytes(machine, vm, name):
    row = REGISTERS[name]
    value = int.from_bytes(range(0x81, 0x81 + row.size), "little") & ((1 << row.settable) - 1)
    vm.regs[name] = value
    assert vm.regs[name] == value == row.get((machine / row.state).read_bytes())
    others = bytearray((machine / row.state).read_bytes())
    row.put(others, 0)
    if row.state == "xsave":
        layouts.put_quad(others, layouts.XSAVE_STATE_BV, 0)  # the parts stay in use
    assert not any(others)
    vm.regs[name] = -1
    assert vm.regs[name] == (1 << row.settable) - 1


def test_registers_by_attribute(machine, vm):
    vm.regs.rip = 0x7C00
    assert vm.regs.rip == 0x7C00
    assert struct.unpack_from("<Q", (machine / "regs").read_bytes(), 128) == (0x7C00,)
    assert {"rax", "cr3", "xmm15"} <= set(dir(vm.regs))


def test_registers_that_are_none_or_do_not_fit(machine, vm):
    with pytest.raises(AttributeError, match="no register rxx"):
        vm.regs.rxx  # noqa: B018
    with pytest.raises(AttributeError, match="no register rxx"):
        vm.regs.rxx = 1
    with pytest.raises(KeyError):
        vm.regs["cs.bass"]
    with pytest.raises(ValueError, match="rax: 0x10000000000000000 does not fit 64 bits"):
        vm.regs.rax = 1 << 64
    with pytest.raises(ValueError, match="cs.dpl"):
        vm.regs.update({"cs.dpl": 256, "rax": 1})
    assert not any((machine / "regs").read_bytes())
    assert (machine / "registers").read_bytes() == b""


def test_update_is_one_write_of_lines(machine, vm):
    vm.regs.update({"cs.base": 0xF0000, "msr.0xc0000082": 0x1234}, rip=0xFFF0, rax=-2)
    assert (machine / "registers").read_text() == (
        "cs.base 0xf0000\nmsr.0xc0000082 0x1234\nrip 0xfff0\nrax 0xfffffffffffffffe\n"
    )
    vm.regs.update({})
    assert vm.regs.read() == {
        "cs.base": 0xF0000, "msr.0xc0000082": 0x1234, "rip": 0xFFF0, "rax": 0xFFFFFFFFFFFFFFFE
    }  # fmt: skip


def test_msrs(machine, vm):
    (machine / "reg" / "msr.0x10").write_text("0x0000000000000007\n")
    assert vm.msr[0x10] == 7
    with pytest.raises(FileNotFoundError):
        vm.msr[0x11]
    (machine / "reg" / "msr.0xc0000082").touch()
    vm.msr[0xC0000082] = 0xFFFFFFFF81000000
    assert (machine / "reg" / "msr.0xc0000082").read_text() == "0xffffffff81000000\n"
    (machine / "msrs").write_bytes(struct.pack("<II IIQ IIQ", 2, 0, 0x10, 0, 7, 0xC0000080, 0, 1 << 63))
    assert vm.msr.read() == {0x10: 7, 0xC0000080: 1 << 63}


def test_memory_is_shared_and_writable(machine, vm):
    vm.mem[0x1000:0x1003] = b"abc"
    assert vm.read_mem(0x1000, 3) == b"abc" == (machine / "mem").read_bytes()[0x1000:0x1003]
    vm.write_mem(0, bytearray(b"xy"))
    assert bytes(vm.mem[:2]) == b"xy"
    assert len(vm.mem) == 8192
    with pytest.raises(OSError, match="mem has 2 of the 4 bytes at 0x1ffe") as caught:
        vm.read_mem(8190, 4)
    assert caught.value.errno == errno.EFAULT


def test_linear_addresses_are_offsets_without_bit_63(machine, vm):
    address = 0xFFFFFFFF80001000  # as a file offset, it would be negative
    with pytest.raises(OSError):
        vm.read_virt(address, 1)
    (machine / "virt").write_bytes(b"low")
    assert vm.read_virt(0x8000000000000001, 2) == b"ow"


def test_closing_with_a_slice_of_memory_in_use(vm):
    slice_ = vm.mem[:4]
    vm.close()
    slice_[:] = b"kept"
    assert bytes(slice_) == b"kept"


def test_close_leaves_no_descriptor(machine):
    before = os.listdir("/proc/self/fd")
    vm = Vm.open(machine)
    vm.regs.rax = vm.regs.rbx
    vm.mem[0] = 1
    vm.close()
    assert os.listdir("/proc/self/fd") == before
    vm.close()
    with pytest.raises(OSError, match="the Vm is closed"):
        vm.regs.rax  # noqa: B018


@pytest.mark.parametrize(
    ("bound", "command"),
    [
        ({"steps": 3}, "step 3\n"),
        ({"insns": 1000}, "insns 1000\n"),
        ({"until": 0xFFFFFFFF81000000}, "until 0xffffffff81000000\n"),
        ({"until": "start_kernel"}, "until start_kernel\n"),
        ({"timeout": 0.25}, "for 250000000ns\n"),
        ({"until": 0x10, "timeout": 2}, "until 0x10 for 2000000000ns\n"),
        ({"insns": 7, "until": 0x10, "timeout": 2}, "insns 7 until 0x10 for 2000000000ns\n"),
    ],
)
def test_a_bounded_run_writes_its_bound_and_reads_its_exit(machine, vm, bound, command, monkeypatch):
    asked = []

    def run(fd, data, offset):
        asked.append((os.readlink(f"/proc/self/fd/{fd}"), data.decode(), offset))
        (machine / "vm_run").write_text("limit rip=0x10\n")
        return len(data)

    monkeypatch.setattr(os, "pwrite", run)
    assert vm.run(**bound) == exits.Limit(rip=0x10)
    assert asked == [(str(machine / "vm_run"), command, 0)]


def test_a_run_reads_its_exit(machine, vm):
    (machine / "vm_run").write_text("io direction=out port=0x3f8 size=1 count=2 data=0x41,0x42 rip=0x2\n")
    assert vm.run() == exits.Io(direction="out", port=0x3F8, size=1, count=2, data=b"AB", rip=2)
    with pytest.raises(ValueError, match="not both"):
        vm.run(steps=1, insns=1)


def test_a_long_exit_is_read_whole(machine, vm):
    wanted = exits.Io(direction="out", port=1, size=4, count=20000, data=bytes(range(200)) * 400, rip=2)
    (machine / "vm_run").write_text(wanted.line() + "\n")
    assert len(wanted.line()) > 1 << 17
    assert vm.run() == wanted


def test_no_exit_yet(vm):
    assert vm.exit is None


@pytest.mark.parametrize(
    ("line", "value", "data"),
    [
        ("io direction=in port=0x60 size=1 count=1 rip=0x2", 0x41, b"A"),
        ("io direction=in port=0x60 size=2 count=1 rip=0x2", -1, b"\xff\xff"),
        ("io direction=in port=0x60 size=1 count=3 rip=0x2", b"abc", b"abc"),
        ("mmio direction=read addr=0xa0000 size=4 rip=0x2", 0x12345678, b"\x78\x56\x34\x12"),
    ],
)
def test_answers(machine, vm, line, value, data):
    (machine / "exit").write_text(line + "\n")
    vm.answer(value)
    assert (machine / "exit.data").read_bytes() == data


@pytest.mark.parametrize(
    ("line", "value", "reason"),
    [
        ("", 1, "there was none"),
        ("hlt rip=0x2\n", 1, "no access: hlt"),
        ("io direction=in port=0x60 size=1 count=1 rip=0x2\n", 256, "does not fit 1 bytes"),
        ("io direction=in port=0x60 size=1 count=2 rip=0x2\n", 1, "2 elements"),
    ],
)
def test_answers_that_cannot_be(machine, vm, line, value, reason):
    (machine / "exit").write_text(line)
    with pytest.raises(ValueError, match=reason):
        vm.answer(value)
    assert (machine / "exit.data").read_bytes() == b""


def test_commands(machine, vm):
    vm.interrupt(0x20)
    assert (machine / "irq").read_bytes() == b"\x20\0\0\0"
    (machine / "debug").write_text("0\n1 break 0x10 hits=0\n3 break 0x20 hits=0\n")
    vm.delete(3)
    assert (machine / "debug").read_text() == "delete 3\n"
    vm.pause()
    assert (machine / "state").read_text() == "pause\n"


def test_a_refused_write_has_the_sentence_of_the_error_file(machine):
    """/dev/full refuses every write, as a machine's file may."""
    (machine / "mode").unlink()
    (machine / "mode").symlink_to("/dev/full")
    (machine / "error").write_text("mode: 'odd' is none of real, protected, long\n")
    with Vm.open(machine) as vm, pytest.raises(OSError, match="mode: 'odd' is none of") as caught:
        vm.mode = "odd"
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(machine / "mode")


def test_what_is_written_replaces_what_was_there_and_is_whole(machine, vm):
    (machine / "kernel").write_bytes(b"a longer one")
    vm.write("kernel", memoryview(bytearray(b"short")))
    assert (machine / "kernel").read_bytes() == b"short"
    vm.write("kernel", bytes(range(256)) * 20000)  # more than one write(2) of FUSE
    assert (machine / "kernel").read_bytes() == bytes(range(256)) * 20000


def test_a_read_that_fails_has_no_sentence_of_somebody_elses_write(machine, vm):
    (machine / "error").write_text("something else\n")
    with pytest.raises(FileNotFoundError, match="No such file"):
        vm.read("nothing")


def test_create_removes_what_it_could_not_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="mode"):
        Vm.create(tmp_path / "new", mode="long")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError):
        Vm.create(tmp_path)


def test_a_temporary_machine_goes(tmp_path):
    with Vm.temporary(tmp_path) as vm:
        assert os.path.isdir(vm.path)
    assert not list(tmp_path.iterdir())
    with Vm.temporary(tmp_path) as vm:
        vm.remove()
    with pytest.raises(KeyError), Vm.temporary(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())
