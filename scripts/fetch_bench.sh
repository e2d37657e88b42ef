#!/bin/bash
# Unpacks what benchmarks boot beside the tests' kernels into .cache/bench: Debian's 32-bit kernel with a busybox, and the
# programs that are timed inside a Debian (OpenSSL, gzip, Python with its tests) with their libraries, over the tests' root.
#
#   .cache/bench/{686/{vmlinuz,modules,release},busybox-i386,programs/}
#
# The packages are downloaded, not installed; those of i386 through a state of apt's own. A second run finds all there,
# takes no time and prints nothing. Ends with 1, and a line that says why, where they cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'fetch_bench: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

programs=(gzip libexpat1 libpython3.11-minimal libpython3.11-stdlib libpython3.11-testsuite libssl3 openssl python3.11-minimal)

target=.cache/bench
stamp=$(sha256sum <scripts/fetch_bench.sh)
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "the packages are Debian's; apt-get is missing"
mkdir -p .cache
exec 8>.cache/bench.lock
flock 8
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

work=$(realpath "$(mktemp -d .cache/bench.XXXXXX)")
trap 'rm -rf "$work"' EXIT
log=$work/log
mkdir -p "$work"/{out/686,out/programs,state/lists/partial,cache/archives/partial,i386,amd64}

say "downloading Debian's 32-bit kernel and programs (about 70 MB)"
narrow=(-o APT::Architecture=i386 -o APT::Architectures=i386 -o "Dir::State=$work/state" -o Dir::State::status=/dev/null
    -o "Dir::Cache=$work/cache")
apt-get "${narrow[@]}" update -qq >>"$log" 2>&1 || true # some lists do; the packages are what is asked for
kernel=$(apt-cache "${narrow[@]}" depends linux-image-686 2>>"$log" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
[ -n "$kernel" ] && (cd "$work/i386" && apt-get "${narrow[@]}" download -qq "$kernel" busybox-static) >>"$log" 2>&1 ||
    { tail -n 3 "$log" >&2; die "apt-get could not download Debian's kernel for i386"; }
(cd "$work/amd64" && apt-get download -qq "${programs[@]}") >>"$log" 2>&1 ||
    { tail -n 3 "$log" >&2; die "apt-get could not download the programs"; }

release=${kernel#linux-image-}
dpkg-deb --fsys-tarfile "$work"/i386/linux-image-*.deb | tar -x -C "$work/i386" ./boot "./lib/modules/$release"
mv "$work/i386/boot/vmlinuz-$release" "$work/out/686/vmlinuz"
mkdir "$work/out/686/modules"
mv "$work/i386/lib/modules/$release"/modules.* "$work/out/686/modules"
echo "$release" >"$work/out/686/release"
dpkg-deb --fsys-tarfile "$work"/i386/busybox-static_*.deb | tar -x -O ./bin/busybox >"$work/out/busybox-i386"
chmod 755 "$work/out/busybox-i386"
for package in "$work"/amd64/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/out/programs" --exclude=./usr/share
done
echo "$stamp" >"$work/out/stamp"
rm -rf "$target"
mv "$work/out" "$target"
