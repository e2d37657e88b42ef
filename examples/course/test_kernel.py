"""Tests of the kernel, as a student hands them in: each on a machine that has just booted."""

import struct

import pytest

from vmfs.words import exits


def call(vm, function, *arguments):
    """What a function of the kernel returns. The machine is stopped first, and stays where it was afterwards."""
    vm.pause()
    before = vm.regs.read()
    stack = before["rsp"] - 256
    back = vm.symbol("_start")  # where it returns to, and stops
    vm.write_virt(stack, struct.pack(f"<{1 + len(arguments)}I", back, *arguments))
    vm.regs.update(rsp=stack, rip=vm.symbol(function))
    ended = vm.run(until=back, timeout=10)
    assert isinstance(ended, exits.Debug), ended
    result = vm.regs.rax & 0xFFFF_FFFF
    vm.regs.update(rip=before["rip"], **{name: before[name] for name in ("rsp", "rax", "rbx", "rcx", "rdx", "rflags")})
    return result


def test_it_answers(booted):
    booted.console.send_line("hello")
    booted.console.expect("hello to you\r\n> ")


def test_the_first_page_is_not_mapped_and_the_rest_is(booted):
    booted.pause()
    first, *more = booted.read_text("pagetable").splitlines()
    assert first.startswith("0000000000001000-") or first.startswith("00001000-"), first
    assert booted.regs.cr0 >> 31 == 1


def test_a_division_by_zero_is_caught_and_the_kernel_goes_on(booted):
    booted.console.send_line("divide")
    booted.console.expect(r"exception 0x00000000 at 0x001\w+\r\n> ")
    booted.console.send_line("hello")
    booted.console.expect("hello to you")


def test_a_null_pointer_is_told_with_its_address(booted):
    seen = booted.symbol("exceptions_seen")
    booted.console.send_line("null")
    booted.console.expect(r"exception 0x0000000e at \w+ address 0x00000000\r\n> ")
    booted.pause()
    assert booted.read_virt(seen, 4) == b"\x01\0\0\0"


def test_a_crash_is_a_triple_fault_that_says_where(booted):
    booted.console.send_line("crash")
    ended = booted.wait(timeout=60)
    assert isinstance(ended, exits.Shutdown) and ended.cause == "triple-fault"


@pytest.mark.parametrize("size", [1, 8, 100, 4096])
def test_blocks_do_not_overlap(booted, size):
    blocks = [call(booted, "kmalloc", size) for _ in range(5)]
    assert all(later - earlier >= size for earlier, later in zip(blocks, blocks[1:], strict=False))


def test_freed_blocks_are_used_again(booted):
    first, second = call(booted, "kmalloc", 100), call(booted, "kmalloc", 100)
    call(booted, "kfree", first)
    call(booted, "kfree", second)
    assert call(booted, "kmalloc", 200) == first


def test_too_much_is_refused(booted):
    assert call(booted, "kmalloc", 0x7FFF_FFFF) == 0
    assert call(booted, "kmalloc", 0xFFFF_FFFF) == 0
