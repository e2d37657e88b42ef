#!/bin/bash
# corrupted.sh MOUNT: a guest dies of a pointer that was overwritten long before. From the list that is broken back to who broke it,
# with `writer`, `goto` and `back until`: nothing was set up before the crash but `history`.
set -euo pipefail
vm=${1:?usage: corrupted.sh MOUNT}/corrupted.$$ here=$(dirname "$(readlink -f "$0")") made=$(mktemp -d)
trap 'rm -r "$made"' EXIT
mkdir "$vm"
trap 'rmdir "$vm"; rm -r "$made"' EXIT

elf=$made/list
gcc -g -Og -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -mno-red-zone -fno-asynchronous-unwind-tables \
    -nostdlib -static -Wl,--build-id=none,-Ttext=0x100000,-e,start,--no-warn-rwx-segments,-N -o "$elf" "$here/guest/list.c"
objcopy -O binary --set-section-flags .bss=alloc,load,contents "$elf" "$made/flat"
symbol() { nm "$elf" | awk -v name="$1" '$3 == name { print "0x" $1 }'; }
number() { echo $((0x$(dd if="$vm/virt" bs=1 skip=$(($1)) count=8 status=none | xxd -e -g 8 | awk '{ print $2 }'))); }
line() { addr2line -s -e "$elf" "$1" | sed "s/ (.*//"; }

echo emulator > "$vm/engine"
echo 16M > "$vm/mem_size"
echo long > "$vm/mode"
dd if="$made/flat" of="$vm/mem" bs=1M seek=1 conv=notrunc status=none
printf 'rip %s\nrsp 0x90000\n' "$(symbol start)" > "$vm/registers"
cat "$elf" > "$vm/symbols"
until echo on > "$vm/history"; do sleep 0.1; done 2> "$made/error"     # until `dd` has closed `mem`
echo run > "$vm/vm_run"
read -r exit < "$vm/exit"
echo "$exit"
[[ $exit == shutdown\ cause=triple-fault* ]]
grep -m 1 '^exception' "$vm/why"

tasks=$(($(symbol tasks))) node=$(number "$(symbol ready)")
while next=$(number $((node + 16))); ((next >= tasks && next < tasks + 8 * 32 && (next - tasks) % 32 == 0)); do node=$next; done
printf -- '--- task %d is followed by %#x, which is none\n' $(((node - tasks) / 32)) "$next"

echo "$((node + 16)) 8" > "$vm/writer"
writer=$(cat "$vm/writer")
echo "$writer"
[[ $writer =~ ^writer=instruction\ count=([0-9]+)\ rip=(0x[0-9a-f]+) ]]
printf -- '--- that is %s, %d instructions before the crash; the store, the task and the name:\n' \
    "$(line "${BASH_REMATCH[2]}")" $(($(awk '$1 == "instructions" { print $2 }' "$vm/why") - BASH_REMATCH[1]))
echo "goto ${BASH_REMATCH[1]}" > "$vm/vm_run"
head -n 1 "$vm/disasm"
echo 'back until rename' > "$vm/vm_run"                        # how it was called
printf 'rename(&tasks[%d], "%s")\n' $((($(cat "$vm/reg/rdi") - tasks) / 32)) \
    "$(dd if="$vm/virt" bs=1 skip=$(($(cat "$vm/reg/rsi"))) count=32 status=none | tr '\0' '\n' | head -n 1)"
caller=$(printf '%#x' "$(number "$(cat "$vm/reg/rsp")")")
echo "--- called before $(line "$caller")"
