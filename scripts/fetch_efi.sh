#!/bin/bash
# Unpacks what tests boot by UEFI into .cache/efi: Debian's signed chain (shim, GRUB) and systemd-boot.
#
#   .cache/efi/{shimx64.efi,grubx64.efi,systemd-bootx64.efi}
#
# The packages are downloaded, not installed. A second run finds all there, takes no time and prints nothing.
# Ends with 1, and a line that says why, where they cannot be had: tests that need them skip then.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'fetch_efi: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

target=.cache/efi
stamp=$(sha256sum <scripts/fetch_efi.sh)
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "the packages are Debian's; apt-get is missing"
mkdir -p .cache
exec 8>.cache/efi.lock
flock 8
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

work=$(mktemp -d .cache/efi.XXXXXX)
trap 'rm -rf "$work"' EXIT
log=$work/log

download() { (cd "$work" && apt-get download -qq shim-signed grub-efi-amd64-signed systemd-boot-efi) >>"$log" 2>&1; }
update() {
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    "${root[@]}" apt-get update -qq >>"$log" 2>&1 </dev/null
}

say "downloading Debian's shim, GRUB and systemd-boot (2 MB)"
download || { update && download; } || { tail -n 3 "$log" >&2; die "apt-get could not download them"; }

mkdir "$work/out"
file_of() { dpkg-deb --fsys-tarfile "$work/$1"_*.deb | tar -x -O "./$2" >"$work/out/$3"; }
file_of shim-signed usr/lib/shim/shimx64.efi.signed shimx64.efi
file_of grub-efi-amd64-signed usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed grubx64.efi
file_of systemd-boot-efi usr/lib/systemd/boot/efi/systemd-bootx64.efi systemd-bootx64.efi
echo "$stamp" >"$work/out/stamp"
rm -rf "$target"
mv "$work/out" "$target"
