#!/bin/bash
# fuzzboot.sh MOUNT [SECTOR [ROUNDS]]: fuzz a boot sector. Each round changes a few bytes of it, runs it for at most 20000
# instructions with every port and device an exit, and counts how it ended; what ends in a triple fault is kept in /tmp.
set -euo pipefail
vm=${1:?usage: fuzzboot.sh MOUNT [SECTOR [ROUNDS]]}/fuzzboot.$$ sector=${2:-} rounds=${3:-60}
RANDOM=1                                    # the same bytes each time

mkdir "$vm"
work=$(mktemp -d)
trap 'rmdir "$vm"; rm -r "$work"' EXIT
if [ -n "$sector" ]; then head -c 512 "$sector" > "$work/sector"; else
    # 7c00  xor ax, ax; mov ds, ax; mov si, 0x7c12; 7c07 lodsb; test al, al; jz 7c10; out 0xe9, al; jmp 7c07; 7c10 hlt
    printf '\x31\xc0\x8e\xd8\xbe\x12\x7c\xac\x84\xc0\x74\x04\xe6\xe9\xeb\xf7\xf4\x90hello\0' > "$work/sector"
fi
size=$(stat -c %s "$work/sector")
declare -A ends
for ((round = 0; round < rounds; round++)); do
    cp "$work/sector" "$work/mutant"
    for ((n = RANDOM % 3; n >= 0; n--)); do
        printf "\\x$(printf %02x $((RANDOM & 255)))" |
            dd of="$work/mutant" bs=1 seek=$((RANDOM % size)) conv=notrunc status=none
    done
    echo reset > "$vm/state"
    echo real > "$vm/mode"
    dd if="$work/mutant" of="$vm/mem" bs=512 seek=$((0x7c00 / 512)) conv=notrunc,sync status=none
    echo 'rip 0x7c00' > "$vm/registers"
    for ((prints = 0; prints < 50; prints++)); do      # what it prints on port e9 is no end, unless it goes on and on
        echo 'insns 20000' > "$vm/vm_run"
        read -r how detail < "$vm/exit"
        [[ $how == io && $detail == *port=0xe9\ * ]] || break
    done
    [[ $how != shutdown ]] || cp "$work/mutant" "/tmp/fuzzboot-$round"
    ends[$how]=$((${ends[$how]:-0} + 1))
done
for how in "${!ends[@]}"; do echo "$how ${ends[$how]}"; done | sort
