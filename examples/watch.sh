#!/bin/bash
# watch.sh MOUNT: look into a guest, and reach into it, while it runs. No debugger: cat and printf.
set -euo pipefail
vm=${1:?usage: watch.sh MOUNT}/watch.$$

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo long > "$vm/mode"

# 1000  xor eax, eax            100c  je 0x1002          1015  out 0x80, al
# 1002  inc rax                 100e  mov eax, [0x2000]  1017  hlt
# 1005  cmp byte [0x2000], 0
printf '\x31\xc0\x48\xff\xc0\x80\x3d\xf4\x0f\x00\x00\x00\x74\xf4\x8b\x04\x25\x00\x20\x00\x00\xe6\x80\xf4' |
    dd of="$vm/mem" bs=4k seek=$((0x1000)) oflag=seek_bytes conv=notrunc status=none
echo 'rip 0x1000' > "$vm/registers"

echo '--- step by step'
for step in 1 2 3 4 5 6; do
    echo step > "$vm/vm_run"
    echo "$(cat "$vm/exit"), rax $(cat "$vm/reg/rax")"
done
[ "$(cat "$vm/exit")" = 'debug cause=step rip=0x100c' ]
(($(cat "$vm/reg/rax") == 2))

echo '--- running: a register, now and then'
echo run > "$vm/state"
first=$(cat "$vm/reg/rax")
until second=$(cat "$vm/reg/rax"); ((second > first)); do :; done
echo "rax $first, then $second; it is $(cat "$vm/state")"

echo '--- still running: the byte that it waits for, changed under it'
# Without FUSE passthrough (Linux 6.9, CAP_SYS_ADMIN) memory is shared whenever the guest starts and stops.
live=$(grep -c 'memory_served_by passthrough' "$vm/stat" || true)
((live)) || echo pause > "$vm/state"
printf '\x2a' | dd of="$vm/mem" bs=1 seek=$((0x2000)) conv=notrunc status=none
((live)) || echo run > "$vm/state"
until [ "$(cat "$vm/state")" != running ]; do sleep 0.01; done
cat "$vm/exit"
[ "$(cat "$vm/exit")" = 'io direction=out port=0x80 size=1 count=1 data=0x2a rip=0x1017' ]
[ "$(cat "$vm/vm_run")" = 'hlt rip=0x1018' ]
