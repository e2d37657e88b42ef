#!/bin/bash
# A Debian package into dist/: the command, man pages, completions, a unit for a mount, the docs.
#
# Debian 12 has pyfuse3, trio and capstone in older versions than vmfs needs, and msgspec and dissect not at all. So the Python packages are in the
# package, under /opt/vmfs, as a virtual environment of the Debian's own Python; libfuse, libseccomp and Python are Debian's. dpkg-deb makes it: what
# debhelper would find out about a source package, there is not.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

say() { printf 'deb: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
command -v dpkg-deb >/dev/null || die "dpkg-deb is missing: a Debian makes Debian packages"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
read -r version minor < <($python -c 'import sys, vmfs; print(vmfs.__version__, sys.version_info[1])')
site=$tree/opt/vmfs/lib/python3.$minor/site-packages
umask 022

say "building the wheel, and installing it with what it needs"
scripts/vendor.sh || die "the packages of the web page are not here"
{ $python setup.py -q build --build-lib "$work/lib" bdist_wheel --bdist-dir "$work/wheel" -d "$work" &&
  .venv/bin/pip install -q --disable-pip-version-check --no-compile --target "$site" "$(echo "$work"/*.whl)[mount,web]"; } >"$work/log" 2>&1 </dev/null ||
    { tail -n 20 "$work/log" >&2; die "it was not built"; }
rm -rf "$site/bin"
find "$site" -name '*.so' -exec strip --strip-debug {} +

# What `python3 -m venv` would make, for /usr/bin/python3.
mkdir -p "$tree/opt/vmfs/bin" "$tree/usr/bin"
ln -s "/usr/bin/python3.$minor" "$tree/opt/vmfs/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$tree/opt/vmfs/pyvenv.cfg"
printf '#!/opt/vmfs/bin/python\nimport sys\n\nfrom vmfs.cli import main\n\nsys.exit(main())\n' >"$tree/usr/bin/vmfs"
chmod 755 "$tree/usr/bin/vmfs"

share=$tree/usr/share
$python scripts/pages.py "$work/pages"
install -d "$share/man/man1" "$share/bash-completion/completions" "$share/zsh/vendor-completions" "$share/fish/vendor_completions.d" \
    "$share/doc/vmfs" "$tree/usr/include" "$tree/lib/systemd/system" "$tree/etc/default"
install -m 644 "$work"/pages/*.1 "$share/man/man1"
gzip -9n "$share"/man/man1/*.1
install -m 644 "$work/pages/vmfs.bash" "$share/bash-completion/completions/vmfs"
install -m 644 "$work/pages/vmfs.zsh" "$share/zsh/vendor-completions/_vmfs"
install -m 644 "$work/pages/vmfs.fish" "$share/fish/vendor_completions.d/vmfs.fish"
cp -r README.md CHANGELOG.md docs/*.md "$share/doc/vmfs"
install -m 644 vmfs/include/vmfs.h "$tree/usr/include/vmfs.h"
install -m 644 packaging/vmfs@.service "$tree/lib/systemd/system"
install -m 644 packaging/vmfs.default "$tree/etc/default/vmfs"

mkdir "$tree/DEBIAN"
cat >"$tree/DEBIAN/control" <<CONTROL
Package: vmfs
Version: $version
Section: otherosfs
Priority: optional
Architecture: $(dpkg --print-architecture)
Maintainer: The vmfs project <vmfs@localhost>
Installed-Size: $(du -sk "$tree" | cut -f1)
Depends: python3 (>= 3.$minor), python3 (<< 3.$((minor + 1))), libc6 (>= 2.34), libfuse3-3, fuse3, libseccomp2
Recommends: seabios, passt
Suggests: gdb, xxd
Description: every virtual machine is a directory
 mkdir makes a virtual machine. Its registers, memory, interrupts and exits
 are files in it: read, write, poll and mmap them from a shell, from gdb, from
 any language. Under it is KVM, or an x86-64 emulator of its own.
CONTROL
echo /etc/default/vmfs >"$tree/DEBIAN/conffiles"
printf '#!/bin/sh\nset -e\n[ "$1" != configure ] || /opt/vmfs/bin/python -m compileall -q /opt/vmfs/lib || true\n' >"$tree/DEBIAN/postinst"
printf '#!/bin/sh\nset -e\nfind /opt/vmfs/lib -name __pycache__ -type d -prune -exec rm -rf {} +\n' >"$tree/DEBIAN/prerm"
chmod 755 "$tree/DEBIAN/postinst" "$tree/DEBIAN/prerm"
(cd "$tree" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)

mkdir -p dist
dpkg-deb --root-owner-group -Zxz --build "$tree" dist >/dev/null
ls -l "dist/vmfs_${version}_$(dpkg --print-architecture).deb"
