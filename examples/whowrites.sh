#!/bin/bash
# whowrites.sh MOUNT KERNEL [SYMBOL [LENGTH [COUNT]]]: who writes a variable of a kernel that boots, and with what.
# A watchpoint on its bytes; `stack` says who was at it, `disasm` what comes next.
set -euo pipefail
vm=${1:?usage: whowrites.sh MOUNT KERNEL [SYMBOL [LENGTH [COUNT]]]}/whowrites.$$
kernel=${2:?which kernel?} symbol=${3:-jiffies_64} length=${4:-8} count=${5:-4}

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo pc > "$vm/machine"
cp "$kernel" "$vm/kernel"
echo 'console=ttyS0 quiet' > "$vm/cmdline"
until { echo kallsyms > "$vm/symbols"; } 2> /dev/null; do
    echo 'for 20ms' > "$vm/vm_run" && grep -q '^limit' "$vm/exit" || { cat "$vm/error" "$vm/exit" >&2; exit 1; }
done

echo "watch $symbol $length w" > "$vm/debug"
address=$(awk -v name="$symbol" '$3 == name { print $1; exit }' "$vm/symbols")
echo "--- $symbol is at $address"
for ((n = 0; n < count; n++)); do
    stop=$(cat "$vm/vm_run")
    [[ $stop == *cause=watchpoint* ]] || { echo "$stop" >&2; exit 1; }
    value=$(dd if="$vm/virt" bs=1 skip=$((0x$address & 0x7fffffffffffffff)) count="$length" status=none | xxd -p)
    echo "written: $value (bytes, the lowest first) before"
    head -n 1 "$vm/disasm" | sed 's/^/    /'
    grep -m 3 '<\|[a-z_]*+0x' "$vm/stack" | sed 's/^/    /'
done
