#!/bin/bash
# ports.sh MOUNT PORT[-PORT] KERNEL|BIOS [COUNT [CMDLINE]]: who uses a port while a kernel or a BIOS starts. Each line: what
# was done, where, and the instruction. `ports.sh /vmfs 0x70-0x71 /usr/share/seabios/bios-256k.bin`: the CMOS of SeaBIOS.
set -euo pipefail
usage='usage: ports.sh MOUNT PORT[-PORT] KERNEL|BIOS [COUNT [CMDLINE]]'
vm=${1:?$usage}/ports.$$ ports=${2:?$usage} image=${3:?$usage} count=${4:-12}

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo pc > "$vm/machine"
cp "$image" "$vm/kernel"
[ -z "${5:-}" ] || echo "$5" > "$vm/cmdline"
echo "iobreak $ports" > "$vm/debug"

for ((n = 0; n < count; n++)); do
    stop=$(timeout 60 cat "$vm/vm_run")
    [[ $stop == *cause=io* ]] || { echo "$stop" >&2; exit 1; }
    port=$(sed 's/.*addr=\(0x[0-9a-f]*\).*/\1/' <<< "$stop")
    at=$(($(cat "$vm/reg/cs.base") + $(cat "$vm/reg/rip")))
    for length in 2 1; do                   # the exit comes after the instruction: in al, 0x71 has two bytes, in al, dx one
        echo "$((at - length)) 1" > "$vm/disasm"
        code=$(sed 's/.*:  *\([0-9a-f][0-9a-f] \)* *//' "$vm/disasm")
        [[ $code != in* && $code != out* ]] || break
    done
    printf 'port %s %-14s al 0x%02x  before %#x  %s\n' "$port" "$code" "$(($(cat "$vm/reg/rax") & 255))" "$at" "$(cat "$vm/mode")"
done
