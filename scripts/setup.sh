#!/bin/bash
# Gets everything that `make test` needs: system packages (Debian), .venv, the C extensions, and the kernels that tests boot. Called with
# the word demo: only what `make demo` shows.
# Each step looks first, so that a second run takes a fraction of a second and prints nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin              # where mount.fuse3 and ldconfig are; an ordinary user's PATH has neither

for=${1-}
say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

mkdir -p .cache
exec 9>.cache/setup.lock
flock 9                                 # two at a time would build in the same folders

# --- system packages: only those whose thing is missing -------------------------------------------------

usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
find_python() {
    local each
    for each in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if command -v "$each" >/dev/null && usable_python "$each"; then echo "$each"; return; fi
    done
}

missing=()
need() { local package=$1; shift; "$@" >/dev/null 2>&1 || missing+=("$package"); }      # PACKAGE TEST...
has() { command -v "$1"; }

# What a mount and its parts in C take, and what the demo shows.
need fuse3       has fusermount3
need fuse3       has mount.fuse3
need gcc         has gcc
need libc6-dev   test -e /usr/include/stdio.h
need pkg-config  has pkg-config
need libfuse3-dev pkg-config --exists fuse3
need libseccomp2 sh -c "ldconfig -p | grep -q libseccomp.so.2"   # machines are processes in a filter of system calls
need xxd         has xxd

if [ "$for" = demo ]; then
need gdb-minimal has gdb                # the demo shows it, without its Python and 20 MB of libraries
else
need gdb         has gdb                # tests attach it to a guest
need g++         has g++                # vmfs.h is for C++, too, and a test compiles it
need binutils    has objdump            # tests assemble guest programs with as and ld
need perl        has perl
need lua5.4      has lua5.4             # an example is in Lua
need seabios     test -e /usr/share/seabios/bios.bin   # a test boots it on the emulator
need ovmf        test -e /usr/share/OVMF/OVMF_VARS_4M.ms.fd    # and UEFI firmware
need dmidecode   has dmidecode          # reads the SMBIOS tables
need grub-common has grub-mkrescue       # tests make media that a BIOS boots: GRUB's,
need grub-pc-bin test -e /usr/lib/grub/i386-pc/boot.img
need xorriso     has xorriso
need mtools      has mformat
need isolinux    test -e /usr/lib/ISOLINUX/isolinux.bin            # ISOLINUX's
need syslinux    has syslinux                                      # and SYSLINUX's
need syslinux-common test -e /usr/lib/syslinux/modules/bios/ldlinux.c32
need qemu-utils  has qemu-img           # and disk images of other programs
need ipxe-qemu   test -e /usr/lib/ipxe/qemu/pxe-e1000.rom    # a BIOS boots over a network by it
need passt       has passt              # the network of a guest (`net user`); a test talks through it
need e2fsprogs   test -e /sbin/mkfs.ext4      # a guest writes to a file system that the host then checks
need acpica-tools has iasl              # tests read the ACPI tables with it
need npm         has npm                # gets the packages of the web page, once,
need chromium    has chromium           # in which tests press its buttons
need git         has git                # programs that copy files, of which tests see what they get
need rsync       has rsync
need vim         has vim                # the guide of Unix tools, whose commands a test runs
need procps      has watch
need openssh-client has sftp
need sshfs       has sshfs
need openssh-sftp-server test -e /usr/lib/openssh/sftp-server
fi

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    if [ -z "$python" ]; then
        missing+=(python3 python3-venv libpython3-dev)
    else
        need python3-venv "$python" -c 'import ensurepip, venv'
        need libpython3-dev "$python" -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
    fi
fi

fetching=                               # the process that gets what the demo boots, beside all else
fetch() {
    if [ "$for" = demo ] && [ -z "$fetching" ]; then scripts/fetch_demo.sh 9>&- & fetching=$!; fi
}

if [ ${#missing[@]} -gt 0 ]; then
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (by their Debian names); install them and try again"
    root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || die "missing: run as root: apt-get install ${missing[*]}"
        root=(sudo)
    fi
    say "installing ${missing[*]}"
    install=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}")
    : >.cache/apt.log
    if [ "$for" = demo ]; then
        apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || "${root[@]}" apt-get update -qq >>.cache/apt.log 2>&1 </dev/null || true
        if command -v python3 >/dev/null; then fetch; fi    # which makes the initial RAM disk
    fi
    "${install[@]}" >>.cache/apt.log 2>&1 </dev/null ||
        { "${root[@]}" apt-get update -qq >>.cache/apt.log 2>&1 </dev/null && "${install[@]}" >>.cache/apt.log 2>&1 </dev/null; } ||
        { tail -n 5 .cache/apt.log >&2; die "apt-get could not install ${missing[*]}"; }
fi

# --- .venv: made once, filled again when pyproject.toml changed -----------------------------------------

digest() { sha256sum "$@" | sha256sum; }

if ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(find_python)
    [ -n "$python" ] || die "Python 3.11 or later is missing"
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi

wanted=$(digest pyproject.toml setup.py)
sources() {
    find vmfs setup.py \( -name '*.[ch]' -o -name '*.def' -o -name setup.py \) -printf '%p %s %T@\n' | sort
    find vmfs -name '*.so' -printf '%p\n' | sort
}
stamped() { [ "$(cat ".venv/$1.stamp" 2>/dev/null)" = "$2" ]; }
if [ "$for" = demo ] && ! stamped packages "$wanted"; then
    fetch
    if ! stamped demo "$wanted $(sources)"; then
        # In seconds: with nothing optimized, without debug information, and with what builds pyfuse3 installed once, without the Cython that
        # would only write again what pyfuse3 brings; vmfs itself is built beside that. What is imported is compiled then. Nothing of it is
        # kept for others: a later `make setup` builds all again.
        say "building vmfs, and installing Python packages into .venv"
        export CFLAGS="-O0 -g0 -w" VMFS_CFLAGS="-O0 -g0 -DVMFS_TRAMPOLINE -DVMFS_NO_INLINE" PIP_NO_COMPILE=1
        pip() { .venv/bin/pip install --disable-pip-version-check --no-cache-dir "$@" >>.cache/pip.log 2>&1 </dev/null; }
        failed() { tail -n 30 .cache/pip.log >&2; die "pip could not install vmfs"; }
        : >.cache/pip.log
        pip 'setuptools>=77' setuptools-scm || failed        # what pyproject.toml requires of it
        .venv/bin/python setup.py -q build_ext --inplace --build-temp build/demo --build-lib build/demo >.cache/build.log 2>&1 </dev/null 9>&- &
        building=$!
        mapfile -t needed < <(.venv/bin/python - <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["mount"], sep="\n")
PYTHON
        )
        pip --no-build-isolation "${needed[@]}" || pip "${needed[@]}" || failed
        wait "$building" || { cat .cache/build.log >&2; die "the C extensions do not build"; }
        VMFS_BUILT=1 pip --no-build-isolation --no-deps -e . || failed
        echo "$wanted $(sources)" >.venv/demo.stamp
    fi
    wait "$fetching"
    exit
fi
if ! stamped packages "$wanted"; then
    say "installing Python packages into .venv"
    if [ -e .venv/demo.stamp ]; then        # all is built again, with all options
        rm -rf build
        .venv/bin/pip uninstall -q -y pyfuse3
        rm .venv/demo.stamp
    fi
    # pip before 25.1 (Debian 12 has 23.0) cannot read [dependency-groups].
    mapfile -t development < <(.venv/bin/python - <<'PYTHON'
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")
PYTHON
    )
    { .venv/bin/pip install --disable-pip-version-check "${development[@]}" &&
      .venv/bin/pip install --disable-pip-version-check --config-settings editable_mode=compat -e '.[mount,web]'; } >.cache/pip.log 2>&1 </dev/null ||
        { tail -n 30 .cache/pip.log >&2; die "pip could not install the packages above"; }
    rm -f .venv/extensions.stamp
    echo "$wanted" >.venv/packages.stamp
fi

# --- the C extensions: built in place when a source came, went or changed --------------------------------

if ! stamped extensions "$(sources)"; then
    say "building the C extensions"
    .venv/bin/python setup.py -q build_ext --inplace >.cache/build.log 2>&1 </dev/null ||
        { cat .cache/build.log >&2; die "the C extensions do not build"; }
    grep -A 12 -E 'warning:' .cache/build.log >&2 || true
    sources >.venv/extensions.stamp
fi

# --- what tests boot --------------------------------------------------------------------------------------

if [ "$for" = demo ]; then exit; fi
scripts/vendor.sh || say "without its packages there is no web page, and its tests skip"
scripts/fetch_kernels.sh || say "without Debian's kernels, the tests that boot them skip"
scripts/fetch_efi.sh || say "without Debian's boot loaders, the tests of UEFI skip"
scripts/fetch_root.sh || say "without Debian's packages, the test of a root on a disk skips"
