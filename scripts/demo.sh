#!/bin/bash
# `make demo`: a session on a real mount. Each command is printed with its output, to be copied, and checked:
# the demo fails at the first one that fails or prints something else than it should.
# The engine is the mount's choice; VMFS_ENGINE=kvm or emulator forces one.
set -uo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:$PWD/.venv/bin        # one that is active comes first
vmfs=$(mktemp -d /tmp/vmfs-demo-XXXXXX)
output=$(mktemp)
leave() {
    cd /
    if mountpoint -q "$vmfs"; then command vmfs umount --lazy "$vmfs"; fi
    rmdir "$vmfs"; rm -f "$output"
}
trap leave EXIT

bold= plain=
if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; fi

say() { printf '\n'; printf '# %s\n' "$@"; }

# run COMMAND [REGEX]: COMMAND in this very shell, since it may cd or define functions. Its output must match.
run() {
    printf '%s$ %s%s\n' "$bold" "${1//$'\n'/$'\n> '}" "$plain"
    eval "$1" >"$output" 2>&1
    local status=$?
    cat "$output"
    if [ $status != 0 ]; then
        printf 'demo: this failed with code %d\n' $status >&2
        [ ! -s error ] || printf 'demo: the machine says: %s\n' "$(cat error)" >&2
        exit 1
    fi
    if [[ ! $(<"$output") =~ ${2-} ]]; then
        printf 'demo: this should have printed something like: %s\n' "$2" >&2
        exit 1
    fi
}

say 'A mount, and a machine: a directory.'
run "vmfs mount $vmfs${VMFS_ENGINE:+ --engine $VMFS_ENGINE}" '^$'
run "cd $vmfs && cat engines" 'available=yes preferred=yes'
run 'mkdir first && cd first && ls -C -w 80 -T 0' '(^|[[:space:]])vm_run([[:space:]]|$)'
run 'grep . engine mode mem_size' 'mode:real.*mem_size:134217728'

say 'Code for the serial port, at address 0x1000:' \
    '   mov si, text; mov dx, 0x3f8; next: lodsb; test al, al; jz end; out dx, al; jmp next; end: hlt'
run 'echo real > mode'
run "printf '\\xbe\\x0f\\x10\\xba\\xf8\\x03\\xac\\x84\\xc0\\x74\\x03\\xee\\xeb\\xf8\\xf4A directory said this.\\n\\0' |
dd of=mem bs=1 seek=\$((0x1000)) conv=notrunc status=none" '^$'
run 'echo 0x1000 > reg/rip' '^$'
run 'xxd -s 0x1000 -l 48 mem' '00001000: be0f 10ba f803 ac84 c074 03ee ebf8 f441'

say 'Run it. Each run ends at an exit: here, at what a serial port would do. We are the serial port.'
run 'cat vm_run' '^io direction=out port=0x3f8 size=1 count=1 data=0x41 rip=0x100c'
run 'serial() {
    while line=$(cat vm_run); do
        case $line in
        "io direction=out port=0x3f8 "*) data=${line#*data=0x}; printf "\\x${data%% *}" ;;
        *) echo "$line"; return ;;
        esac
    done
}'
run 'serial' ' directory said this.'$'\n''hlt rip=0x100f'
run 'grep -E "^(rax|rsi|rdx|rip|rflags) " registers' 'rsi 0x0000000000001027.*rip 0x000000000000100f'

say 'Input: the guest executes in al, dx; we write what it reads. (in al, dx; inc al; out dx, al; hlt)'
run "printf '\\xec\\xfe\\xc0\\xee\\xf4' | dd of=mem bs=1 seek=\$((0x2000)) conv=notrunc status=none"
run "printf 'rip 0x2000\\nrdx 0x60\\n' > registers"
run 'cat vm_run' '^io direction=in port=0x60 size=1 count=1 rip=0x2000'
run "printf A > exit.data && cat vm_run" '^io direction=out port=0x60 size=1 count=1 data=0x42 rip=0x2004'

say 'An interrupt. Its handler, at 0x3000, stores 0x1234 at 0x4000 and returns: mov word [0x4000], 0x1234; iret'
run "printf '\\xc7\\x06\\x00\\x40\\x34\\x12\\xcf' | dd of=mem bs=1 seek=\$((0x3000)) conv=notrunc status=none"
run "printf '\\x00\\x30\\x00\\x00' | dd of=mem bs=1 seek=\$((4 * 0x20)) conv=notrunc status=none"
run "printf '\\xfb\\xf4\\xf4' | dd of=mem bs=1 seek=\$((0x2800)) conv=notrunc status=none    # sti; hlt; hlt"
run 'echo 0x2800 > reg/rip && cat vm_run' '^hlt rip=0x2802'
run 'echo 0x20 > irq && cat vm_run' '^hlt rip=0x2803'
run 'xxd -s 0x4000 -l 2 mem' '00004000: 3412'

say 'Debugging: one instruction at a time, then up to a breakpoint.'
run 'echo 0x1000 > reg/rip && echo 1 > debug'
run 'cat vm_run vm_run vm_run' 'debug cause=step rip=0x1003'$'\n''debug cause=step rip=0x1006'$'\n''debug cause=step rip=0x1007'
run 'echo 0 > debug && echo "break 0x100b" > debug && cat vm_run' '^debug cause=breakpoint id=1 rip=0x100b'
run 'cat debug' 'break 0x100b'

say 'A machine is gone when its directory is.'
run "cd $vmfs && rmdir first && ls" 'engines'
run "cd / && vmfs umount $vmfs" '^$'
