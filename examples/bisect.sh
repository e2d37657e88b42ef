#!/bin/bash
# bisect.sh MOUNT [KERNEL [INSTRUCTIONS]]: when does a machine that hangs begin to? It is run again and again, for exactly so
# many instructions; time follows them, so every run is the same. Without a KERNEL: a boot sector that waits for nobody.
set -euo pipefail
vm=${1:?usage: bisect.sh MOUNT [KERNEL [INSTRUCTIONS]]}/bisect.$$ kernel=${2:-} most=${3:-1000000}

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo pc > "$vm/machine"
echo instructions > "$vm/time"
if [ -n "$kernel" ]; then cp "$kernel" "$vm/kernel"; else
    # 7c00  mov cx, 20000; 7c03 loop 7c03; 7c05 mov al, 'k'; out 0xe9, al; 7c09 cmp byte [0x600], 1; 7c0e jne 7c09; hlt
    { printf '\xb9\x20\x4e\xe2\xfe\xb0\x6b\xe6\xe9\x80\x3e\x00\x06\x01\x75\xf9\xf4'; head -c 493 /dev/zero; printf '\x55\xaa'; } > "$vm/kernel"
fi

runs=0
after() {                                   # rip after $1 instructions from the boot on
    echo reset > "$vm/state"
    echo "insns $1" > "$vm/vm_run"
    runs=$((runs + 1))
    rip=$(cat "$vm/reg/rip")
}
span() {                                    # the lowest and highest rip of the next instructions
    low=$rip high=$rip
    for ((n = 0; n < 12; n++)); do
        echo "insns 997" > "$vm/vm_run"
        rip=$(cat "$vm/reg/rip")
        low=$((rip < low ? rip : low)) high=$((rip > high ? rip : high))
    done
}
after "$most"
span
printf 'after %d instructions it hangs in %#x..%#x\n' "$most" "$low" "$high"
good=0 bad=$most hang_low=$low hang_high=$high
while ((bad - good > 1)); do
    middle=$(((good + bad) / 2))
    after "$middle"
    span
    if ((low >= hang_low && high <= hang_high)); then bad=$middle; else good=$middle; fi
done
after "$good"
echo "$runs runs: instruction $bad is the first of it, after"
head -n 1 "$vm/disasm"
