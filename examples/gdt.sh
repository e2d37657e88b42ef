#!/bin/bash
# gdt.sh MACHINE: the global descriptor table of a machine, decoded (Intel SDM 3A 3.4.5 and 3.5). It may be running.
# gdt.sh MOUNT KERNEL: that of a kernel that boots.
set -euo pipefail
vm=${1:?usage: gdt.sh MACHINE, or gdt.sh MOUNT KERNEL}
if [ $# -gt 1 ]; then
    vm=$1/gdt.$$
    mkdir "$vm"
    trap 'rmdir "$vm"' EXIT
    echo pc > "$vm/machine"
    cp "$2" "$vm/kernel"
    until { echo kallsyms > "$vm/symbols"; } 2> /dev/null; do
        echo 'for 20ms' > "$vm/vm_run" && grep -q '^limit' "$vm/exit" || { cat "$vm/error" "$vm/exit" >&2; exit 1; }
    done
    echo 'break kernel_init' > "$vm/debug"      # by then every CPU has its own table
    cat "$vm/vm_run" > /dev/null
fi
base=$(cat "$vm/reg/gdtr.base") limit=$(cat "$vm/reg/gdtr.limit")
echo "GDT at $base, $(((limit + 1) / 8)) entries"
types=(data data:a data:w data:wa data:d data:da data:dw data:dwa code code:a code:r code:ra code:c code:ca code:cr code:cra)
system=(0 tss16 ldt tss16:busy call16 task int16 trap16 8 tss 10 tss:busy call 13 int trap)

dd if="$vm/virt" bs=1 skip=$((base & 0x7fffffffffffffff)) count=$((limit + 1)) status=none |
    od -An -v -t u8 -w8 | for ((selector = 0; ; selector += 8)); do
    read -r entry || break
    ((entry)) || continue
    start=$((entry >> 16 & 0xffffff | entry >> 32 & 0xff000000))
    size=$((entry & 0xffff | entry >> 32 & 0xf0000))
    ((entry >> 55 & 1)) && size=$((size << 12 | 0xfff))                 # G: pages
    if ((entry >> 44 & 1)); then kind=${types[entry >> 40 & 15]}; else kind=${system[entry >> 40 & 15]}; fi
    bits=
    ((entry >> 44 & 1)) && bits=" $((entry >> 53 & 1 ? 64 : entry >> 54 & 1 ? 32 : 16))-bit"
    printf '0x%04x base 0x%08x limit 0x%08x %-10s ring %d%s%s\n' "$selector" "$start" "$size" "$kind" \
        $((entry >> 45 & 3)) "$bits" "$( ((entry >> 47 & 1)) || echo ' not present')"
    if ! ((entry >> 44 & 1)) && (($(cat "$vm/reg/efer") >> 10 & 1)); then   # in long mode these have 16 bytes
        read -r high
        selector=$((selector + 8))
        printf '       base[63:32] %#x\n' "$high"
    fi
done
