#!/bin/bash
# The Debian package in a Debian: apt installs it with what it depends on, the command mounts and runs a guest, man pages, completions and the unit
# are there and are read by man, the shells and systemd; purged, it leaves nothing. As root.
#
#   deb_test.sh [PACKAGE]       default: the one in dist/
#
# The Debian is a fresh one of the host's release, made by mmdebstrap once (.cache/deb/root.tar, 290 MB), unpacked into a directory that is removed at the end.
# It has the host's /dev, without which nothing mounts, and a mount namespace of its own: no mount is left over.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'deb-test: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

if [ "${1-}" != inside ]; then
    [ "$(id -u)" = 0 ] || die "a root directory of a Debian is root's: run it as root"
    [ -e /dev/fuse ] || die "there is no /dev/fuse"
    package=$(readlink -f "${1:-$(ls -t dist/vmfs_*.deb 2>/dev/null | head -n 1)}")
    [ -e "$package" ] || die "there is no package: make deb"
    command -v mmdebstrap >/dev/null || apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null || die "mmdebstrap is missing"
    . /etc/os-release
    image=.cache/deb/$VERSION_CODENAME.tar
    if [ ! -e "$image" ]; then
        say "making a Debian $VERSION_ID"
        mkdir -p .cache/deb
        mmdebstrap --quiet --variant=minbase --include=systemd,man-db,bash-completion,zsh,fish "$VERSION_CODENAME" "$image.new" >.cache/deb/log 2>&1 </dev/null ||
            { tail -n 5 .cache/deb/log >&2; die "it was not made"; }
        mv "$image.new" "$image"
    fi
    root=$(mktemp -d /var/tmp/vmfs-deb-XXXXXX)
    trap 'rm -rf --one-file-system "$root"' EXIT
    tar -C "$root" -xf "$image" --exclude='./dev/*'
    cp "$package" "$root/tmp/vmfs.deb"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    cp scripts/deb_test.sh "$root/tmp"
    unshare --mount --pid --fork --kill-child scripts/deb_test.sh inside "$root"
    exit
fi

root=$2
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"

within() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8 "$@"; }
sh() { within bash -c "$1"; }

# check WHAT COMMAND [REGEX]: a command in there, which succeeds and prints something like that
check() {
    local printed
    printed=$(sh "$2" 2>&1 </dev/null) || die "$1: \`$2\` failed with $?: $printed"
    [[ $printed =~ ${3-} ]] || die "$1: \`$2\` printed: $printed"
    say "$1"
}
files() { (cd "$root" && find . -xdev \( -path ./proc -o -path ./dev -o -path ./tmp -o -path ./var/cache -o -path ./var/lib/apt -o -path ./var/lib/dpkg -o -path ./var/log \) -prune -o -printf '%p\n' | sort); }

sh 'apt-get update -qq' >/dev/null 2>&1 || die "apt-get update failed"
# What the package depends on comes first, alone: what vmfs itself leaves is then a difference.
check 'its dependencies are Debian'"'"'s' "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \$(dpkg-deb -f /tmp/vmfs.deb Depends | sed 's/([^)]*)//g; s/,/ /g')"
before=$(files)
check 'apt installs it, and nothing else' 'apt-get install -y --no-install-recommends /tmp/vmfs.deb' '1 newly installed'
check 'there is no compiler' '! command -v gcc cc'
check 'its files are as packed' 'dpkg --verify vmfs' '^$'

check 'the command' 'vmfs --version' '^vmfs [0-9]'
check 'a mount, a guest, its end' 'mkdir /mnt/vms && vmfs mount /mnt/vms && mkdir /mnt/vms/a && cd /mnt/vms/a && echo emulator > engine && echo real > mode &&
    printf "\xb0\x41\xe6\x60\xf4" | dd of=mem bs=1 seek=4096 conv=notrunc status=none && echo 0x1000 > reg/rip && cat vm_run vm_run &&
    cd / && rmdir /mnt/vms/a && vmfs umount /mnt/vms && rmdir /mnt/vms' '^io direction=out port=0x60 size=1 count=1 data=0x41 rip=0x1004'$'\n''hlt rip=0x1005$'
check 'mount -t fuse.vmfs' 'mkdir /mnt/vms && mount -t fuse.vmfs none /mnt/vms && mkdir /mnt/vms/a && rmdir /mnt/vms/a && umount /mnt/vms && rmdir /mnt/vms'
check 'the library, by its own Python' '/opt/vmfs/bin/python -c "from vmfs import Machine; m = Machine(memory={0x1000: bytes.fromhex(\"b82a000000f4\")}, engine=\"emulator\"); m.run(start=0x1000); print(m.eax)"' '^42$'
check 'doctor' 'vmfs doctor || true' 'pyfuse3'
check 'man pages, of each command' 'for page in /usr/share/man/man1/vmfs*.1.gz; do man -P cat "$(basename "$page" .1.gz)" | head -n 3 | grep -q . || exit 1; done; man -P cat vmfs-boot' 'vmfs.boot'
check 'completion in bash' 'source /usr/share/bash-completion/bash_completion; COMP_WORDS=(vmfs mou) COMP_CWORD=1 COMP_LINE="vmfs mou" COMP_POINT=8; _completion_loader vmfs; $(complete -p vmfs | sed "s/.*-F \([^ ]*\).*/\1/"); echo "${COMPREPLY[@]}"' 'mount'
check 'completion in fish' "fish -c \"complete -C 'vmfs mou'\"" 'mount'
cat >"$root/tmp/tab.zsh" <<'ZSH'
zmodload zsh/zpty
zpty shell 'zsh -f -i'
zpty -w shell "autoload -Uz compinit; compinit -D -u; PS1='> '; echo rea''dy"
zpty -r -m shell said '*ready*'
zpty -w -n shell $'vmfs dis\t'
for n in {1..300}; do
    sleep 0.1
    zpty -r -t shell part && said+=$part
    [[ $said == *disasm* ]] && break
done
print -r -- "$said"
ZSH
check 'completion in zsh' 'zsh -f /tmp/tab.zsh' 'disasm'
check 'the unit' 'systemd-analyze verify --man=no /lib/systemd/system/vmfs@.service && systemd-escape --path /srv/machines' 'srv-machines'
check 'its pages' 'head -n 1 /usr/share/doc/vmfs/README.md' 'every virtual machine is a directory'

check 'removed, options stay' 'apt-get remove -y -qq vmfs && test -e /etc/default/vmfs && ! command -v vmfs'
check 'purged' 'apt-get purge -y -qq vmfs && ! dpkg -s vmfs'
left=$(comm -13 <(echo "$before") <(files) | grep -v -e '^\./root/' -e '^\./run/' || true)
[ -z "$left" ] || die "purged, it leaves: $left"
say 'purged, nothing is left'
