#!/bin/bash
# Unpacks what tests boot into .cache/kernels: Debian's kernels with their modules, busybox, iPXE and memtest86+.
#
#   .cache/kernels/{cloud,generic}/{vmlinuz,config,release,modules/}     busybox  ipxe.lkrn  memtest.bin  memtest.iso
#
# The packages are downloaded, not installed. A second run finds all there, takes no time and prints nothing.
# Ends with 1, and a line that says why, where they cannot be had: tests that need them skip then.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'fetch_kernels: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

target=.cache/kernels
stamp=$(sha256sum <scripts/fetch_kernels.sh)
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "the packages are Debian's; apt-get is missing"
mkdir -p .cache
exec 8>.cache/kernels.lock
flock 8
[ "$(cat $target/stamp 2>/dev/null)" = "$stamp" ] && exit 0

work=$(mktemp -d .cache/kernels.XXXXXX)
trap 'rm -rf "$work"' EXIT
log=$work/log

# What a package of no contents depends on: linux-image-cloud-amd64 -> linux-image-6.1.0-56-cloud-amd64
current() { apt-cache depends "$1" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
names() {
    cloud=$(current linux-image-cloud-amd64) generic=$(current linux-image-amd64)
    [ -n "$cloud" ] && [ -n "$generic" ]
}
download() { (cd "$work" && apt-get download -qq "$cloud" "$generic" busybox-static ipxe memtest86+) >>"$log" 2>&1; }
update() {
    local root=()
    [ "$(id -u)" = 0 ] || root=(sudo -n)
    "${root[@]}" apt-get update -qq >>"$log" 2>&1 </dev/null
}

say "downloading Debian's kernels, busybox, iPXE and memtest86+ (about 110 MB)"
{ names && download; } || { update && names && download; } ||
    { tail -n 3 "$log" >&2; die "apt-get could not download the kernels"; }

# The generic kernel's modules take 380 MB, most of it for hardware that no machine of ours has.
without=()
for each in sound drivers/gpu/{[!d]*,drm/{[!vt]*/*,tiny/[!b]*}} drivers/{media,infiniband,staging,iio,hwmon,scsi/*/*,message,mtd,isdn,platform,power} \
    drivers/net/{wireless,usb,can,phy,wwan} drivers/net/ethernet/{[!8ir],i[!n],r[!e]}* drivers/net/ethernet/intel/{[!e]*,e1000e} net/{mac80211,bluetooth,sctp,tipc} \
    drivers/usb/{atm,c67x00,cdns3,chipidea,class,dwc2,dwc3,gadget,image,isp1760,misc,mon,musb,phy,roles,serial,typec,usbip} drivers/usb/storage/ums-* \
    fs/{ocfs2,gfs2,nfs,nfsd,smb,cifs,ceph,xfs,btrfs,f2fs,jfs}
do without+=("--exclude=*/kernel/$each"); done

unpack() {      # NAME PACKAGE
    local package=$2 out=$work/out/$1 tree=$work/$1 release=${2#linux-image-} part
    mkdir -p "$tree" "$out"
    dpkg-deb --fsys-tarfile "$work/$package"_*.deb | tar -x -C "$tree" "${without[@]}" ./boot "./lib/modules/$release"
    for part in vmlinuz config; do
        mv "$tree/boot/$part-$release" "$out/$part"
    done
    mv "$tree/lib/modules/$release" "$out/modules"
    echo "$release" >"$out/release"
}

file_of() { dpkg-deb --fsys-tarfile "$work/$1"_*.deb | tar -x -O "./$2" >"$work/out/$3"; }

unpack cloud "$cloud"
unpack generic "$generic"
file_of busybox-static bin/busybox busybox
file_of ipxe boot/ipxe.lkrn ipxe.lkrn
file_of memtest86+ boot/memtest86+x64.bin memtest.bin
file_of memtest86+ usr/lib/memtest86+/memtest86+x64.iso memtest.iso
chmod 755 "$work/out/busybox"
echo "$stamp" >"$work/out/stamp"
rm -rf "$target"
mv "$work/out" "$target"
