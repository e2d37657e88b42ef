"""python -m bench.profile PROGRAM ...: which instructions translated code still leaves to handlers.

Boots the Debian of bench.programs in this process, outside of a machine's sandbox, so that `perf record` sees it, too
(with VMFS_JIT_DUMP=FOLDER it names the regions). A line for each row: calls of its handler from host code, leaves.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

COUNTED = 40


def boot(disk: Path, initrd: bytes, kernel: Path) -> bytearray:
    from bench.guests import CMDLINE
    from vmfs.engine import by_name
    from vmfs.machine.attach import attach, parse_attachment
    from vmfs.machine.control import Bound
    from vmfs.machine.machine import Vm

    class Door:
        def open(self, path: str, flags: int) -> int:
            return os.open(path, flags)

    vm = Vm(by_name("emulator"), memory_size=512 << 20)
    vm.set_machine("pc")
    said = bytearray()
    vm.board.devices["com1"].output = said.extend
    attach(vm, parse_attachment(f"blk {disk} rw"), Door())
    vm.images["kernel"].write(0, kernel.read_bytes())
    vm.images["initrd"].write(0, initrd)
    vm.images.cmdline = CMDLINE.encode()
    vm._boot_due = True
    print(vm.start(Bound()).result(600).line())
    counters = vm.counters()
    print({name: value for name, value in counters.items() if value and not name.startswith("exits")})
    vm.close()
    return said


def main() -> None:
    with tempfile.NamedTemporaryFile() as file:
        os.environ["VMFS_JIT_PROFILE"] = file.name
        from bench import programs

        chosen = tuple(p for p in programs.PROGRAMS if any(word in p.name for word in sys.argv[1:]))
        initrd = programs.build(programs.HANDOVER, modules=("virtio_pci", "virtio_blk", "ext4"))
        with programs.disk(chosen) as disk:
            print(boot(disk, initrd, programs.CLOUD.image)[-1500:].decode())
        rows = [line.split() for line in file.read().decode().splitlines()]
    for calls, leaves, *name in sorted(rows, key=lambda row: -int(row[0]) - int(row[1]))[:COUNTED]:
        print(f"{int(calls):>12,} {int(leaves):>12,}  {' '.join(name)}")


if __name__ == "__main__":
    main()
