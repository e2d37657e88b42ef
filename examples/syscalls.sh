#!/bin/bash
# syscalls.sh MOUNT KERNEL INITRD [COUNT]: which files a Linux opens while it boots: a breakpoint on a system call,
# its arguments from registers, its path from the process' memory. The kernel is stock; its symbols are found in its RAM.
set -euo pipefail
usage='usage: syscalls.sh MOUNT KERNEL INITRD [COUNT]'
vm=${1:?$usage}/syscalls.$$ kernel=${2:?$usage} initrd=${3:?$usage} count=${4:-5}

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo pc > "$vm/machine"
cp "$kernel" "$vm/kernel"
cp "$initrd" "$vm/initrd"
echo 'console=ttyS0 quiet' > "$vm/cmdline"

# Where to break is not known before the kernel is in its RAM: run for a moment, and ask for its names.
until { echo kallsyms > "$vm/symbols"; } 2> /dev/null; do
    echo 'for 20ms' > "$vm/vm_run" && grep -q '^limit' "$vm/exit" || { cat "$vm/error" "$vm/exit" >&2; exit 1; }
done
echo "--- $(grep -c . "$vm/symbols") symbols; do_sys_openat2 is at $(awk '$3 == "do_sys_openat2" { print $1 }' "$vm/symbols")"
echo 'break do_sys_openat2' > "$vm/debug"

string_at() {                               # a C string at a linear address, as far as its page
    dd if="$vm/virt" bs=1 skip=$(($1 & 0x7fffffffffffffff)) count=256 status=none 2> /dev/null | tr '\0' '\n' | head -n 1
}
for ((n = 0; n < count; n++)); do           # do_sys_openat2(int dfd, const char __user *filename, struct open_how *how)
    stop=$(cat "$vm/vm_run")
    [[ $stop == *cause=breakpoint* ]] || { echo "$stop" >&2; exit 1; }
    printf 'open(%d, "%s")\n' "$(($(cat "$vm/reg/rdi") << 32 >> 32))" "$(string_at "$(cat "$vm/reg/rsi")")"
done
