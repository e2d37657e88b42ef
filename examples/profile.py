#!/usr/bin/env python3
"""profile.py MOUNT: where does a running guest spend its time? Sample its rip: it does not notice.

The guest computes in two functions, the second with ten times the work of the first, until a byte in its
memory is set; this program sets it, through a mapping of the guest's RAM, while the guest runs.
"""

import random
import struct
import sys
import time
from collections import Counter

from vmfs.client import Vm
from vmfs.words.exits import Hlt

CODE, STOP, ROUNDS = 0x1000, 0x2000, 0x2008
GUEST = bytes.fromhex(
    "e8 14000000"           # 1000 main: call short
    "e8 1a000000"           # 1005       call long
    "48ff0425 08200000"     # 100a       inc qword [ROUNDS]
    "803c25 00200000 00"    # 1012       cmp byte [STOP], 0
    "7400"                  # 101a       je main (the distance is filled in below)
    "f4"                    # 101c       hlt
    "b9 64000000"           # short:     mov ecx, 100
    "ffc9"                  # .          dec ecx
    "75fc"                  #            jnz .
    "c3"                    #            ret
    "b9 e8030000"           # long:      mov ecx, 1000
    "ffc9"                  # .          dec ecx
    "75fc"                  #            jnz .
    "c3"                    #            ret
)  # fmt: skip
SYMBOLS = {0x1000: "main", 0x101D: "short", 0x1027: "long"}


def function_at(rip: int) -> str:
    return SYMBOLS[max(start for start in SYMBOLS if start <= rip)]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} MOUNT")
    with Vm.temporary(sys.argv[1], mode="long") as vm:
        code = bytearray(GUEST)
        struct.pack_into("<i", code, 1, 0x101D - 0x1005)
        struct.pack_into("<i", code, 6, 0x1027 - 0x100A)
        struct.pack_into("<b", code, 0x1B, 0x1000 - 0x101C)
        vm.mem[CODE : CODE + len(code)] = code
        vm.regs.rip = CODE

        vm.start()
        samples: Counter[str] = Counter()
        for _ in range(300):
            time.sleep(random.uniform(0, 0.003))  # a rhythm would beat with the guest's
            samples[function_at(vm.regs.rip)] += 1
        for name, count in samples.most_common():
            print(f"{name:6} {count / samples.total():6.1%} {'#' * (count // 5)}")
        state = vm.state
        if not vm.mem_is_live:  # without FUSE passthrough, memory is shared when the guest starts and stops
            vm.pause()
        before = int.from_bytes(vm.mem[ROUNDS : ROUNDS + 8], "little")
        vm.mem[STOP] = 1
        if not vm.mem_is_live:
            vm.start()
        exit_ = vm.wait(timeout=60)
        rounds = int.from_bytes(vm.mem[ROUNDS : ROUNDS + 8], "little")
        print(f"{before} rounds while it was {state}, {rounds} in the end: {exit_}")

        if exit_ != Hlt(rip=0x101D) or state != "running" or not 0 < before <= rounds:
            sys.exit("the guest did not do what it should")
        if samples["long"] < 3 * samples["short"]:  # ten times, but for chance
            sys.exit("the samples are not where the time goes")


if __name__ == "__main__":
    main()
