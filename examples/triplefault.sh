#!/bin/bash
# triplefault.sh MOUNT [KERNEL [INITRD]]: run until a triple fault comes, keep the machine as a core, and ask gdb what it was
# doing. Without a KERNEL: 32-bit code that has no IDT, and divides by zero. The core is ./triplefault.core.
set -euo pipefail
vm=${1:?usage: triplefault.sh MOUNT [KERNEL [INITRD]]}/triplefault.$$ core=triplefault.core

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
if [ -n "${2:-}" ]; then
    echo pc > "$vm/machine"
    cp "$2" "$vm/kernel"
    [ -z "${3:-}" ] || cp "$3" "$vm/initrd"
else
    echo protected > "$vm/mode"
    # 1000 mov eax, 1234; 1005 xor ecx, ecx; 1007 xor edx, edx; 1009 div ecx
    printf '\xb8\xd2\x04\0\0\x31\xc9\x31\xd2\xf7\xf1' | dd of="$vm/mem" bs=4096 seek=1 conv=notrunc status=none
    echo 'rip 0x1000' > "$vm/registers"
fi
stop=$(cat "$vm/vm_run")
echo "$stop"
[[ $stop == shutdown\ cause=triple-fault* ]] || exit 1

cp --sparse=always "$vm/core" "$core"
echo "--- $core: $(stat -c %s "$core") bytes, $(($(stat -c %b "$core") / 2)) KiB of them on the disk"
gdb -batch -nx -c "$core" -ex 'info registers rip eflags rax rcx' -ex 'x/3i $rip' 2> /dev/null | grep -v '^$\|warning\|Core was'
