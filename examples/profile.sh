#!/bin/bash
# profile.sh MOUNT KERNEL [INITRD [SAMPLES]]: where a booting kernel spends its time. Its rip is read while it runs, which
# stops it between two instructions for some microseconds, and looked up in the symbols that it has itself. Then its next
# two million instructions are traced, and drawn as a flame graph: profile.svg, for a browser.
set -euo pipefail
PATH=$PATH:$(dirname "$0")/../.venv/bin
vm=${1:?usage: profile.sh MOUNT KERNEL [INITRD [SAMPLES]]}/profile.$$ kernel=${2:?which kernel?} samples=${4:-400}

mkdir "$vm"
samplings=$(mktemp)
trap 'rmdir "$vm"; rm "$samplings"' EXIT
echo pc > "$vm/machine"
cp "$kernel" "$vm/kernel"
[ -z "${3:-}" ] || cp "$3" "$vm/initrd"
echo 'console=ttyS0 quiet' > "$vm/cmdline"
until { echo kallsyms > "$vm/symbols"; } 2> /dev/null; do
    echo 'for 20ms' > "$vm/vm_run" && grep -q '^limit' "$vm/exit" || { cat "$vm/error" "$vm/exit" >&2; exit 1; }
done

echo run > "$vm/state"
for ((n = 0; n < samples; n++)); do
    cat "$vm/reg/rip"
done > "$samplings"
echo pause > "$vm/state"

# Hexadecimal numbers of one length sort as text: each sample belongs to the last symbol before it.
{ sed 's/^/0x/' "$vm/symbols"; sed 's/$/ ~/' "$samplings"; } | sort |
    awk '$2 != "~" { name = $3; next } { hits[name]++ } END { for (one in hits) print hits[one], one }' |
    sort -rn | head -n 15 | awk -v all="$samples" '{ printf "%5.1f %%  %s\n", 100 * $1 / all, $2 }'

vmfs trace "$vm" start insn
vmfs trace --format flame -o profile.svg "$vm" & # reads until `stop`; the guest waits for it where it is slower
echo 'insns 2000000 for 60s' > "$vm/vm_run"
vmfs trace "$vm" stop
wait $!
echo "the flame graph is profile.svg" >&2
