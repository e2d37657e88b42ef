#!/bin/bash
# Builds the C extensions with ThreadSanitizer in build/tsan, beside a copy of the Python files, and runs tests of what has
# threads in C with that copy: the lane on both sides, streams, runs that are kicked, several CPUs, devices that work in the
# background. Arguments go to pytest, instead of those tests. A report is a failure; scripts/tsan.supp has those that are none.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p build/tsan
find build/tsan -name '*.py' -delete            # one that was removed in the tree must not live on here
VMFS_SANITIZE=thread .venv/bin/python setup.py -q build --build-base build/tsan \
    --build-lib build/tsan/lib --build-temp build/tsan/temp >build/tsan/log 2>&1 || { cat build/tsan/log >&2; exit 1; }

# The sandbox would keep a machine's process from writing reports and from finding the names in them, and needs a process of
# one thread, where the runtime has one of its own. So in this copy there is none, and no life is led ahead.
cat >>build/tsan/lib/vmfs/host/sandbox.py <<'END'
Sandbox.fork = lambda self: os.fork()
Sandbox.seclude = lambda self: die_with_parent()
Sandbox.confine = lambda self, who, filter_name="machine", memory_most=0: None
END
echo '_live_before = lambda engine, engine_named: None' >>build/tsan/lib/vmfs/host/spare.py

# The runtime refuses a library that is loaded with RTLD_DEEPBIND, as capstone loads its own.
echo 'import os; del os.RTLD_DEEPBIND' >build/tsan/lib/sitecustomize.py

reports=$PWD/build/tsan/reports
libtsan=$(gcc -print-file-name=libtsan.so)
# PYTHONPATH and PYTHONSAFEPATH: the copy, also in the processes that tests start in the tree.
export PYTHONPATH=$PWD/build/tsan/lib PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
.venv/bin/python -c 'import vmfs, sys; sys.exit("build/tsan" not in vmfs.__file__)'
# Other programs run without: with the runtime, shells fall over before they begin.
rm -rf build/tsan/bin
mkdir -p build/tsan/bin
cat >build/tsan/without.c <<'END'
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    unsetenv("LD_PRELOAD");
    setenv("PATH", strchr(getenv("PATH"), ':') + 1, 1);     /* without this folder */
    execvp(basename(argv[0]), argv);
    return 127;
}
END
gcc -static -o build/tsan/without build/tsan/without.c
for each in sh bash dd gdb gcc; do ln -s ../without build/tsan/bin/$each; done
export PATH=$PWD/build/tsan/bin:$PATH
# die_after_fork: the zygote forks, before it has threads. exitcode: reports are told by their files, at the end.
export TSAN_OPTIONS=die_after_fork=0:exitcode=0:history_size=4:suppressions=$PWD/scripts/tsan.supp:log_path=$reports/tsan${TSAN_OPTIONS:+:$TSAN_OPTIONS}

sanitized() { PYTHONUNBUFFERED=1 LD_PRELOAD="$libtsan" .venv/bin/"$@"; }

clear_reports() { rm -rf "$reports"; mkdir -p -m 1777 "$reports"; }

# Is a race of two threads reported, and none where Python's GIL orders them?
cat >build/tsan/races.c <<'END'
#include <pthread.h>
static int count;
void add(int times) { while (times--) count++; }
static void *begin(void *argument) { add(100000); return argument; }
void race(int threads)
{
    pthread_t each[8];
    for (int i = 0; i < threads; i++) pthread_create(each + i, 0, begin, 0);
    for (int i = 0; i < threads; i++) pthread_join(each[i], 0);
}
END
gcc -shared -fPIC -fsanitize=thread -g -o build/tsan/races.so build/tsan/races.c
threads='import ctypes, threading
add = ctypes.PyDLL("build/tsan/races.so").add
both = [threading.Thread(target=lambda: [add(10) for _ in range(10000)]) for _ in range(2)]
[one.start() for one in both], [one.join() for one in both]'
clear_reports
sanitized python -c "$threads"
[ -z "$(ls "$reports")" ] || { echo "tsan.sh: the GIL is not seen" >&2; exit 1; }
sanitized python -c "import ctypes; ctypes.CDLL('build/tsan/races.so').race(2)"
grep -qs "data race" "$reports"/* || { echo "tsan.sh: a race gives no report" >&2; exit 1; }

# Without one of them tests would only skip.
sanitized python -c 'import vmfs.engine.emulator._core, vmfs.engine.kvm._run, vmfs.devices._chips, vmfs.machine._lane'

status=0
clear_reports
[ $# -gt 0 ] || set -- -q tests/mount/test_lane.py tests/mount/test_trace.py tests/mount/test_running.py tests/engine/test_running.py \
    tests/engine/test_cpus.py tests/emulator/test_parallel.py
sanitized pytest -p no:cacheprovider "$@" || { echo "tsan.sh: exit code $? of pytest $*" >&2; status=1; }
for each in "$reports"/*; do
    if [ -s "$each" ]; then cat "$each" >&2; status=1; fi
done
exit "$status"
