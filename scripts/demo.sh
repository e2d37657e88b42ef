#!/bin/bash
# `make demo`: what is new about a machine that is a directory, in a minute, on a real mount. Each command is printed with its output, to be
# copied, and checked: the demo fails at the first one that fails or prints something else than it should.
#
#   demo.sh [short]     short: without Linux
#
# The first machine's engine is the mount's choice; VMFS_ENGINE=kvm or emulator forces one. Linux is on the emulator, which has a past.
set -uo pipefail
cd "$(dirname "$0")/.."

here=$PWD
PATH=$PATH:$here/.venv/bin       # one that is active comes first
vmfs=$(mktemp -d /tmp/vmfs-demo-XXXXXX)
output=$(mktemp)
leave() {
    cd /
    if mountpoint -q "$vmfs"; then command vmfs umount --lazy "$vmfs"; fi
    rmdir "$vmfs"; rm -f "$output"
}
trap leave EXIT

bold= dim= plain=
if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[36m' plain=$'\e[0m'; fi

say() { printf '\n'; printf "$dim# %s$plain\\n" "$@"; }

# run COMMAND [REGEX]: COMMAND in this very shell, since it may cd or define functions. Its output must match.
run() {
    sleep "${VMFS_DEMO_PAUSE:-0}"        # for a recording: scripts/cast.sh
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

say 'A mount. mkdir makes a virtual machine, and its files are the machine.'
run "vmfs mount $vmfs${VMFS_ENGINE:+ --engine $VMFS_ENGINE}" '^$'
run "mkdir $vmfs/first && cd $vmfs/first && ls -C -w 100 -T 0 | tail -n 4" 'vm_run'

say 'A guest of five bytes: mov al, 0x41; out 0x60, al; hlt. A read of vm_run runs it until it wants something.'
run 'echo real > mode'
run "printf '\\xb0\\x41\\xe6\\x60\\xf4' | dd of=mem bs=1 seek=\$((0x1000)) conv=notrunc status=none" '^$'
run 'echo 0x1000 > reg/rip && cat vm_run' '^io direction=out port=0x60 size=1 count=1 data=0x41 rip=0x1004'
run 'cat vm_run reg/rax' '^hlt rip=0x1005'$'\n''0x0000000000000041'

say 'Changed while it stands, and run again, one instruction at a time.'
run 'echo 0x1000 > reg/rip; echo 1 > debug; cat vm_run; echo 0x42 > reg/rax; cat vm_run' \
    'debug cause=step rip=0x1002'$'\n''io direction=out port=0x60 size=1 count=1 data=0x42 rip=0x1004'

say 'A machine is gone when its directory is.'
run "cd $vmfs && rmdir first" '^$'
if [ "${1-}" != short ]; then
. "$here/scripts/demo_linux.sh"
fi
run "cd / && vmfs umount $vmfs" '^$'
