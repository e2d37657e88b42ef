"""What the buttons of a page do: ACTIONS, a function each. It gets the machine, the number of the CPU and what the page
has said, may block, and returns what becomes JSON: mostly nothing, of a run its exit's line."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable
from typing import Any

from vmfs.web.panes import Asked, address_of, line_of, number_of, of_cpu
from vmfs.web.place import SeenVm, checked, poke

_COUNT_MOST = 1 << 62


def run(vm: SeenVm, cpu: int, said: Asked) -> None:
    """In the background."""
    vm.start()


def pause(vm: SeenVm, cpu: int, said: Asked) -> None:
    vm.pause()


def reset(vm: SeenVm, cpu: int, said: Asked) -> None:
    vm.reset()


def step(vm: SeenVm, cpu: int, said: Asked) -> str:
    """`count` instructions of this CPU."""
    count = number_of(said.get("count", 1), 1, _COUNT_MOST, "a count of instructions")
    return vm.run(steps=count, cpu=cpu).line()


def until(vm: SeenVm, cpu: int, said: Asked) -> str:
    return vm.run(until=address_of(vm, cpu, said.get("at"))).line()


def back(vm: SeenVm, cpu: int, said: Asked) -> str:
    """By `count` instructions, to the last time at `at`, or to the last stop."""
    if said.get("at"):
        return vm.back(until=address_of(vm, cpu, said["at"])).line()
    if said.get("count"):
        return vm.back(number_of(said["count"], 1, _COUNT_MOST, "a count of instructions")).line()
    return vm.back().line()


def goto(vm: SeenVm, cpu: int, said: Asked) -> str:
    return vm.goto(number_of(said.get("instructions"), 0, _COUNT_MOST, "a place")).line()


def record(vm: SeenVm, cpu: int, said: Asked) -> None:
    vm.record(bool(said.get("on")))


def snapshot(vm: SeenVm, cpu: int, said: Asked) -> None:
    vm.snapshot(checked(said.get("name")))


def restore(vm: SeenVm, cpu: int, said: Asked) -> None:
    vm.restore(checked(said.get("name")))


def drop(vm: SeenVm, cpu: int, said: Asked) -> None:
    vm.drop(checked(said.get("name")))


def fork(vm: SeenVm, cpu: int, said: Asked) -> None:
    """A machine `name`, of what it is now or of the snapshot `of`."""
    vm.fork(checked(said.get("name")), checked(said["of"]) if said.get("of") else None).close()


def remove(vm: SeenVm, cpu: int, said: Asked) -> None:
    os.rmdir(vm.path)


def set_register(vm: SeenVm, cpu: int, said: Asked) -> None:
    name, value = line_of(said.get("name"), "a register"), line_of(said.get("value"), "a value")
    of_cpu(vm, cpu).write("registers", f"{name}={value}\n")


def set_memory(vm: SeenVm, cpu: int, said: Asked) -> None:
    """`hex` at the address `at` of the `space`, `virt` or `mem`."""
    space = said.get("space")
    if space not in ("virt", "mem"):
        raise OSError(errno.EINVAL, "memory is written in virt or mem")
    try:
        data = bytes.fromhex(line_of(said.get("hex"), "what is to be stored"))
    except ValueError:
        raise OSError(errno.EINVAL, "what is to be stored is bytes in hexadecimal") from None
    where = os.path.join(vm.path, f"cpu{cpu}") if cpu and space == "virt" else vm.path
    poke(where, space, address_of(vm, cpu, said.get("at")), data)


def resolve(vm: SeenVm, cpu: int, said: Asked) -> str:
    """The address that a text means."""
    return f"{address_of(vm, cpu, said.get('at')):#x}"


def debug(vm: SeenVm, cpu: int, said: Asked) -> None:
    """A line for the file `debug`: `break start_kernel if rdi==0`, `delete 3`."""
    vm.write("debug", line_of(said.get("line"), "a point") + "\n")


def symbols(vm: SeenVm, cpu: int, said: Asked) -> None:
    """Find those of the Linux that runs, or drop all."""
    vm.write("symbols", "kallsyms" if said.get("find") else "clear")


def trace(vm: SeenVm, cpu: int, said: Asked) -> None:
    """Trace what is in `kinds`, or nothing. The guest waits for no page: what is not read in time is dropped."""
    kinds = said.get("kinds") or []
    if not isinstance(kinds, list):
        raise OSError(errno.EINVAL, "kinds is a list of words")
    lines = [f"{kind} {'on' if kind in kinds else 'off'}" for kind in TRACE_KINDS]
    if kinds:
        lines += ["full drop", "buffer 1M"]
    vm.write("trace", "\n".join(lines if kinds else ["off"]) + "\n")


TRACE_KINDS = ("insn", "mem", "exceptions", "interrupts", "exits")


def keys(vm: SeenVm, cpu: int, said: Asked) -> None:
    """Words for the file `keyboard`, or a text."""
    if said.get("text"):
        vm.type(str(said["text"])[:4096])
    else:
        vm.write("keyboard", line_of(said.get("line"), "names of keys") + "\n")


def screen_password(vm: SeenVm, cpu: int, said: Asked) -> str:
    """That of `vnc`, empty where there is none."""
    words = shlex.split(vm.read_text("vnc"))
    return next((word.partition("=")[2] for word in words if word.startswith("password=")), "")


def writer(vm: SeenVm, cpu: int, said: Asked) -> str:
    """Who wrote `length` bytes at `at` last."""
    length = number_of(said.get("length", 1), 1, 4096, "the count of bytes")
    at = address_of(vm, cpu, said.get("at"))
    return vm.writer(at, length, physical=said.get("space") == "mem")


ACTIONS: dict[str, Callable[[SeenVm, int, Asked], Any]] = {
    "run": run,
    "pause": pause,
    "reset": reset,
    "step": step,
    "until": until,
    "back": back,
    "goto": goto,
    "record": record,
    "snapshot": snapshot,
    "restore": restore,
    "drop": drop,
    "fork": fork,
    "remove": remove,
    "set-register": set_register,
    "set-memory": set_memory,
    "resolve": resolve,
    "debug": debug,
    "symbols": symbols,
    "trace": trace,
    "keys": keys,
    "screen-password": screen_password,
    "writer": writer,
}
