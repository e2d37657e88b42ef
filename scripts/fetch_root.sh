#!/bin/bash
# Unpacks a small Debian into .cache/debian: sysvinit, bash, coreutils, util-linux, e2fsprogs and what they
# need, and an ssh server, as dpkg would install them, but without their documentation and without running their scripts. Tests boot it.
#
# A second run finds all there, takes no time and prints nothing. Ends with 1, and a line that says why, where the packages
# cannot be had: tests that need them skip then.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'fetch_root: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

packages=(base-files base-passwd bash coreutils dash debianutils dropbear-bin e2fsprogs grep libacl1 libattr1 libaudit1
    libblkid1 libc6 libcap-ng0 libcap2 libcom-err2 libcrypt1 libext2fs2 libgcc-s1 libgcrypt20 libgmp10 libgpg-error0 liblz4-1
    liblzma5 libmount1 libpam0g libpcre2-8-0 libselinux1 libsmartcols1 libss2 libsystemd0 libtinfo6 libtomcrypt1 libtommath1 libudev1 libuuid1 libzstd1
    login logsave mount ncurses-base sed sysvinit-core sysvinit-utils util-linux zlib1g)

target=.cache/debian
stamp=$(sha256sum <scripts/fetch_root.sh)
[ "$(cat $target.stamp 2>/dev/null)" = "$stamp" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "the packages are Debian's; apt-get is missing"
mkdir -p .cache
exec 8>.cache/root.lock
flock 8
[ "$(cat $target.stamp 2>/dev/null)" = "$stamp" ] && exit 0

work=$(mktemp -d .cache/debian.XXXXXX)
trap 'rm -rf "$work"' EXIT
log=$work/log
mkdir "$work/out"

download() { (cd "$work" && apt-get download -qq "${packages[@]}") >>"$log" 2>&1; }
update() {
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    "${root[@]}" apt-get update -qq >>"$log" 2>&1 </dev/null
}

say "downloading ${#packages[@]} packages of Debian (about 18 MB)"
download || { update && download; } || { tail -n 3 "$log" >&2; die "apt-get could not download the packages"; }
for package in "$work"/*.deb; do
    dpkg-deb --fsys-tarfile "$package" |
        tar -x -C "$work/out" --exclude=./usr/share/{doc,info,locale,man,bash-completion} --exclude='*/gconv'
done
rm -rf "$target"
mv "$work/out" "$target"
echo "$stamp" >$target.stamp
