#!/bin/bash
# symbols.sh MOUNT KERNEL [NAME...]: find a stock kernel's symbols in its RAM, KASLR or not: nothing but the image is needed.
# Prints where it was moved to, how many symbols it has, the addresses of NAMEs, and the code that one begins with.
set -euo pipefail
vm=${1:?usage: symbols.sh MOUNT KERNEL [NAME...]}/symbols.$$ kernel=${2:?which kernel?}
shift 2
(($#)) || set -- start_kernel panic sys_call_table init_task

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo pc > "$vm/machine"
cp "$kernel" "$vm/kernel"
echo 'console=ttyS0 quiet kaslr' > "$vm/cmdline"         # without `kaslr` a kernel is where it was linked
until { echo kallsyms > "$vm/symbols"; } 2> /dev/null; do
    echo 'for 20ms' > "$vm/vm_run" && grep -q '^limit' "$vm/exit" || { cat "$vm/error" "$vm/exit" >&2; exit 1; }
done

text=$(awk '$3 == "_text" { print $1 }' "$vm/symbols")
echo "--- _text is at $text, moved by $(printf '%#x' $((0x$text - 0xffffffff81000000))); $(wc -l < "$vm/symbols") symbols"
for name; do
    awk -v name="$name" '$3 == name { print; found = 1 } END { exit !found }' "$vm/symbols" ||
        { echo "there is no symbol $name" >&2; exit 1; }
done
echo "--- where it stands now"
head -n 3 "$vm/disasm"
echo "$1 5" > "$vm/disasm"
echo "--- $1"
cat "$vm/disasm"
