#!/bin/bash
# What the demo boots, into .cache/demo/{vmlinuz,initrd}: Debian's cloud kernel and a busybox, those of the tests where they are there. Of the packages
# (28 MB) only these two files are kept, and nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'fetch_demo: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

target=.cache/demo
stamp=$(cat scripts/fetch_demo.sh scripts/initrd.py | sha256sum)
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p $target
if [ -e .cache/kernels/cloud/vmlinuz ] && [ -e .cache/kernels/busybox ]; then
    cp .cache/kernels/cloud/vmlinuz .cache/kernels/busybox "$work"
else
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "the kernel is Debian's; apt-get is missing"
    say "downloading Debian's cloud kernel and busybox (28 MB)"
    current() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
    download() { kernel=$(current) && [ -n "$kernel" ] && (cd "$work" && apt-get download -qq "$kernel" busybox-static) >>"$work/log" 2>&1; }
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    download || { "${root[@]}" apt-get update -qq >>"$work/log" 2>&1 </dev/null && download; } ||
        { tail -n 3 "$work/log" >&2; die "apt-get could not download them"; }
    dpkg-deb --fsys-tarfile "$work"/linux-image-*.deb | tar -x -O "./boot/vmlinuz-${kernel#linux-image-}" >"$work/vmlinuz"
    dpkg-deb --fsys-tarfile "$work"/busybox-static_*.deb | tar -x -O ./bin/busybox >"$work/busybox"
fi
python3 scripts/initrd.py "$work/busybox" "$work/initrd"
mv "$work/vmlinuz" "$work/initrd" $target
echo "$stamp" >$target/stamp
