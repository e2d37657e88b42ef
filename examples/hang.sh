#!/bin/bash
# hang.sh MOUNT KERNEL [INITRD [INSTRUCTIONS]]: a kernel hangs while it boots: where, since when, and how it came there. It runs once, with
# `history`; the instruction at which the hang began is found by bisection with `goto`, which goes both ways.
set -euo pipefail
usage='usage: hang.sh MOUNT KERNEL [INITRD [INSTRUCTIONS]]'
vm=${1:?$usage}/hang.$$ kernel=${2:?$usage} initrd=${3:-} most=${4:-1500000000}

mkdir "$vm"
trap 'rmdir "$vm"' EXIT
echo emulator > "$vm/engine"
echo pc > "$vm/machine"
echo instructions > "$vm/time"
cp "$kernel" "$vm/kernel"
[ -z "$initrd" ] || cp "$initrd" "$vm/initrd"
echo 'console=ttyS0' > "$vm/cmdline"
echo on > "$vm/history"
echo "insns $most" > "$vm/vm_run"
grep '^limit' "$vm/exit" > /dev/null || { cat "$vm/exit" >&2; exit 1; }
echo kallsyms > "$vm/symbols" || { cat "$vm/error" >&2; exit 1; }

frames() { grep -o '[a-zA-Z_][a-zA-Z0-9_.]*+0x[0-9a-f]* at 0x[0-9a-f]*' "$vm/stack" 2> /dev/null || true; }
common=$(frames)
for ((n = 0; n < 8; n++)); do                   # what is on the stack all the time, the innermost first
    echo 'insns 1000003' > "$vm/vm_run"
    common=$(grep -xF "$(frames)" <<< "$common") || { echo 'it does not hang' >&2; exit 1; }
done
frame=$(head -n 1 <<< "$common")
function=${frame%%+*}
echo "it hangs in $function, which was called by"
sed -n '2,$s/ at .*//p' <<< "$common" | sed 's/^/    /'

good=0 bad=$(awk '$1 == "now" { print $2 }' "$vm/history") looks=0
while ((bad - good > 1)); do
    middle=$(((good + bad) / 2))
    echo "goto $middle" > "$vm/vm_run"
    looks=$((looks + 1))
    if frames | grep -qxF "$frame"; then bad=$middle; else good=$middle; fi
done
echo "$looks looks: it began with instruction $bad, which is"
echo "goto $good" > "$vm/vm_run"
head -n 1 "$vm/disasm"
echo "back until $function" > "$vm/vm_run"
printf 'and %s was called with rdi=%s' "$function" "$(cat "$vm/reg/rdi")"
text=$(dd if="$vm/virt" iflag=skip_bytes bs=64 skip="$(($(cat "$vm/reg/rdi") & 0x7fffffffffffffff))" count=1 status=none 2> /dev/null | tr '\0' '\n' | head -n 1)
[[ $text != *[[:cntrl:]]* && -n $text ]] && printf ' "%s"' "$text"
echo
