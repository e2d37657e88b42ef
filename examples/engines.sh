#!/bin/bash
# engines.sh MOUNT [CODE [STEPS]]: run a flat 64-bit binary on both engines, an instruction at a time, and tell the first one
# after which they differ. Without CODE: a few sums, and then CPUID, in which no two processors agree.
# Exit code 77: this host has one engine only.
set -euo pipefail
mount=${1:?usage: engines.sh MOUNT [CODE [STEPS]]} steps=${3:-200}
mapfile -t engines < <(awk '/available=yes/ { print $1 }' "$mount/engines")
((${#engines[@]} == 2)) || { echo "one engine only: ${engines[*]}" >&2; exit 77; }

work=$(mktemp -d)
trap 'rmdir "$mount/engines.$$."*; rm -r "$work"' EXIT
if [ -n "${2:-}" ]; then cp "$2" "$work/code"; else
    # 1000 mov ecx, 20; 1005 add rax, rcx; 1008 lea rdx, [rax+rax*4]; 100c loop 1005; 100e mov eax, 1; 1013 cpuid; 1015 hlt
    printf '\xb9\x14\0\0\0\x48\x01\xc8\x48\x8d\x14\x80\xe2\xf7\xb8\x01\0\0\0\x0f\xa2\xf4' > "$work/code"
fi
for engine in "${engines[@]}"; do
    vm=$mount/engines.$$.$engine
    mkdir "$vm"
    echo "$engine" > "$vm/engine"
    echo long > "$vm/mode"
    dd if="$work/code" of="$vm/mem" bs=4096 seek=1 conv=notrunc status=none
    echo 'rip 0x1000' > "$vm/registers"
done
for ((n = 1; n <= steps; n++)); do
    for engine in "${engines[@]}"; do
        vm=$mount/engines.$$.$engine
        head -n 1 "$vm/disasm" > "$work/code"
        echo step > "$vm/vm_run"
        { cat "$vm/exit"; head -n 18 "$vm/registers"; } > "$work/$engine"       # the general registers, rip, rflags
    done
    if ! diff "$work/${engines[0]}" "$work/${engines[1]}" > "$work/difference"; then
        echo "instruction $n, $(cat "$work/code"): < ${engines[0]}, > ${engines[1]}"
        cat "$work/difference"
        exit
    fi
    [[ $(cat "$work/${engines[0]}") != hlt* ]] || break
done
echo "$n instructions, and no difference"
