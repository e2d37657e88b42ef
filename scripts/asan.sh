#!/bin/bash
# Builds the C extensions with AddressSanitizer and UndefinedBehaviorSanitizer in build/asan, beside a copy of the
# Python files, and runs tests with that copy. Arguments go to pytest; without any, all tests: a run of pytest for each
# directory of tests, so that a report, which ends its process, does not end the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

sanitizers=${VMFS_SANITIZE:-address,undefined}
mkdir -p build/asan
find build/asan -name '*.py' -delete            # one that was removed in the tree must not live on here
VMFS_SANITIZE=$sanitizers .venv/bin/python setup.py -q build --build-base build/asan \
    --build-lib build/asan/lib --build-temp build/asan/temp >build/asan/log 2>&1 || { cat build/asan/log >&2; exit 1; }

reports=$PWD/build/asan/reports
libasan=$(gcc -print-file-name=libasan.so) libubsan=$(gcc -print-file-name=libubsan.so)
# In each Python that starts. ASan refuses a library that is loaded with RTLD_DEEPBIND, as capstone loads its own. And the
# two runtimes have a function of one name for the path of reports: UBSan's start calls ASan's, and UBSan's reports would
# go to a stderr that pytest keeps to itself.
cat >build/asan/lib/sitecustomize.py <<END
import ctypes, os
del os.RTLD_DEEPBIND
ctypes.CDLL("$libubsan").__sanitizer_set_report_path(b"$reports/ubsan")
END
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
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:log_path=$reports/asan${ASAN_OPTIONS:+:$ASAN_OPTIONS}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}

sanitized() { PYTHONUNBUFFERED=1 LD_PRELOAD="$libasan $libubsan" .venv/bin/"$@"; }

clear_reports() { rm -rf "$reports"; mkdir -p -m 1777 "$reports"; } # of other users' processes, too

# Does a fault of either kind end its process, with a report in a file?
cat >build/asan/faults.c <<'END'
#include <stdlib.h>
int shift(int by) { return 1 << by; }
int beyond(int at) { char *bytes = malloc(8); int byte = bytes[at]; free(bytes); return byte; }
END
gcc -shared -fPIC -fsanitize=address,undefined -fno-sanitize-recover=all -o build/asan/faults.so build/asan/faults.c
while read -r call kind; do
    clear_reports
    sanitized python -c "import ctypes; ctypes.CDLL('build/asan/faults.so').$call" >/dev/null 2>&1 || true
    grep -qs "$kind" "$reports"/* || { echo "asan.sh: $call gives no report of $kind" >&2; exit 1; }
done <<'END'
shift(99) shift exponent
beyond(8) heap-buffer-overflow
END

status=0
clear_reports
run_tests() {
    sanitized pytest -p no:cacheprovider "$@" || { echo "asan.sh: exit code $? of pytest $*" >&2; status=1; }
}
if [ $# -gt 0 ]; then
    run_tests "$@"
else
    for part in tests/*/; do
        if compgen -G "$part*test_*.py" >/dev/null; then run_tests -q "$part"; fi
    done
fi
for each in "$reports"/*; do
    if [ -s "$each" ]; then cat "$each" >&2; status=1; fi
done
exit "$status"
