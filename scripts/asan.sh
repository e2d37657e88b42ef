#!/bin/bash
# Builds the C extensions with AddressSanitizer and UndefinedBehaviorSanitizer in build/asan, beside a copy of the
# Python files, and runs tests with that copy. Arguments go to pytest; without any, all tests.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizers=${VMFS_SANITIZE:-address,undefined}
mkdir -p build/asan
find build/asan -name '*.py' -delete            # one that was removed in the tree must not live on here
VMFS_SANITIZE=$sanitizers .venv/bin/python setup.py -q build --build-base build/asan \
    --build-lib build/asan/lib --build-temp build/asan/temp >build/asan/log 2>&1 || { cat build/asan/log >&2; exit 1; }

# ASan refuses a library that is loaded with RTLD_DEEPBIND, as capstone loads its own.
echo 'import os; del os.RTLD_DEEPBIND' >build/asan/lib/sitecustomize.py
# PYTHONPATH and PYTHONSAFEPATH: the copy, also in the processes that tests start in the tree.
export PYTHONPATH=$PWD/build/asan/lib PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
.venv/bin/python -c 'import vmfs, sys; sys.exit("build/asan" not in vmfs.__file__)'
# Programs of the host that do not run with ASan's allocator run without.
mkdir -p build/asan/bin
for each in dd gdb; do
    if [ -n "$(command -v $each)" ]; then
        printf '#!/bin/sh\nunset LD_PRELOAD\nexec %s "$@"\n' "$(command -v $each)" >build/asan/bin/$each
        chmod +x build/asan/bin/$each
    fi
done
export PATH=$PWD/build/asan/bin:$PATH
# Python's own allocator would hide overruns of bytes objects from ASan.
export PYTHONMALLOC=malloc
# detect_leaks: Python leaves much to the end of the process. Link order: Python itself is not built with ASan, so
# that the runtime comes by LD_PRELOAD. handle_segv stays on: a fault in the core is a report with a stack.
# Reports go to files: pytest would keep what a process that ends at once has written.
reports=$PWD/build/asan/reports
rm -rf "$reports"
mkdir -p "$reports"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:log_path=$reports/asan${ASAN_OPTIONS:+:$ASAN_OPTIONS}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$reports/ubsan${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}
status=0
PYTHONUNBUFFERED=1 LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    .venv/bin/pytest -p no:cacheprovider "$@" || status=$?
for each in "$reports"/*; do
    if [ -s "$each" ]; then cat "$each" >&2; status=1; fi
done
exit "$status"
