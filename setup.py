"""The C extensions. Everything else about the package is in pyproject.toml; these are here because they need
code: what pkg-config says about libfuse, a glob over the emulator's core, and a switch for the sanitizers.

VMFS_SANITIZE=address,undefined builds all with those sanitizers (`make asan` does, in a folder of its own, and
`make tsan` says thread). VMFS_BUILT=1 installs what is not C alone, around extensions that are built in place already.
"""

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = "vmfs/engine/emulator/core"
CHIPS = "vmfs/devices/chips"
LANE = "vmfs/words/lane.h"      # what the server, a machine's process and its engine share
RING = "vmfs/words/ring.h"      # what the server and a machine's process share of a stream
EXIT = "vmfs/include/vmfs.h"
BUS = "vmfs/words/bus.h"        # what an engine and a board's devices share

SANITIZE = os.environ.get("VMFS_SANITIZE", "")

COMPILE = [
    "-std=gnu11",               # GNU: labels as values, __int128, statement expressions
    # Python may have been built with less, or with -O3. With python -m bench.flags, a geometric mean of nine loops:
    # -O3 0.92, LTO 0.96, -march=x86-64-v3 1.06, PGO 1.08 of this, the last two mostly in one loop (docs/emulator.md).
    "-O2",
    "-g",                       # gdb and sanitizer reports name lines; costs no time at run
    "-fvisibility=hidden",      # what is not exported is called directly, not through the PLT
    "-fno-strict-aliasing",     # guest memory and register state are read at several widths
    "-fwrapv",                  # guest arithmetic wraps; signed overflow must not be undefined
    "-fcf-protection=none",     # no ENDBR at each of the emulator's handlers, which end in indirect jumps
    "-fno-stack-protector",     # a protected function's last call is no jump
    "-fno-tree-slp-vectorize",  # it joins the handlers' few stores in vector registers, which is slower
    "-fno-partial-inlining", "-fno-crossjumping",  # each handler keeps its own last jump, for the predictor
    "-Wall", "-Wextra",
    "-Wno-unused-parameter",    # handlers of one table share a signature
    "-Wno-missing-field-initializers",  # PyMethodDef and PyType_Slot tables end in a short sentinel
]
COMPILE += shlex.split(os.environ.get("VMFS_CFLAGS", ""))  # for experiments: bench/flags.py
LINK = shlex.split(os.environ.get("VMFS_LDFLAGS", ""))
if SANITIZE:
    COMPILE += [
        f"-fsanitize={SANITIZE}",
        "-fno-sanitize-recover=all",    # the first report ends the process, so that a test fails
        "-fno-omit-frame-pointer",      # whole stacks in reports
        "-O1",
        "-DVMFS_TRAMPOLINE",            # the emulator's handlers return, and do not call the next (core/cpu/state.h)
        "-UNDEBUG",                     # and assertions on
    ]
    LINK += [f"-fsanitize={SANITIZE}"]


def pkg_config(what, package):
    """The flags that pkg-config gives for a package, e.g. `pkg_config("--cflags", "fuse3")`."""
    try:
        done = subprocess.run(["pkg-config", what, package], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SystemExit("vmfs: pkg-config is missing: apt-get install pkg-config libfuse3-dev") from None
    except subprocess.CalledProcessError as failure:
        raise SystemExit(f"vmfs: {failure.stderr.strip()}\nvmfs: apt-get install libfuse3-dev") from None
    return shlex.split(done.stdout)


def extensions():
    found = []
    if os.path.exists("vmfs/fs/_fuse.c"):
        found.append(Extension(
            "vmfs.fs._fuse",
            sources=sorted(glob("vmfs/fs/*.c")),
            depends=[*glob("vmfs/fs/*.h"), LANE, RING],
            # libfuse's headers only. pyfuse3 brings the library; this extension finds it with dlopen, since
            # it stands in front of some of its functions.
            extra_compile_args=COMPILE + pkg_config("--cflags", "fuse3"),
            extra_link_args=LINK + ["-ldl"],
        ))
    if os.path.exists(f"{CORE}/python/module.c"):
        found.append(Extension(
            "vmfs.engine.emulator._core",
            sources=sorted(glob(f"{CORE}/**/*.c", recursive=True)),
            depends=[*sorted(glob(f"{CORE}/**/*.h", recursive=True)), LANE, BUS, EXIT],
            include_dirs=["vmfs/words", CORE, *sorted(glob(f"{CORE}/*/"))],
            # A handler begins at a cache line of its own: a loop is up to 15 % slower where some do not by chance.
            extra_compile_args=[*COMPILE, "-falign-functions=64"],
            extra_link_args=LINK + ["-lm"],
        ))
    for name, source in (
        ("vmfs.machine._lane", "vmfs/machine/_lane.c"),
        ("vmfs.machine._ring", "vmfs/machine/_ring.c"),
        ("vmfs.host._multiply", "vmfs/host/_multiply.c"),
        ("vmfs.engine.kvm._run", "vmfs/engine/kvm/_run.c"),
    ):
        if os.path.exists(source):
            found.append(Extension(
                name,
                sources=[source],
                depends=[LANE, RING, BUS, EXIT],
                include_dirs=["vmfs/words"],
                extra_compile_args=COMPILE,
                extra_link_args=LINK,
            ))
    if os.path.exists(f"{CHIPS}/module.c"):
        found.append(Extension(
            "vmfs.devices._chips",
            sources=sorted(glob(f"{CHIPS}/*.c")),
            depends=[*sorted(glob(f"{CHIPS}/*.h")), BUS],
            include_dirs=["vmfs/words", CHIPS],
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
        ))
    for name, source in (
        ("vmfs.debug._trace", "vmfs/debug/_trace.c"),
        ("vmfs.devices._pixels", "vmfs/devices/_pixels.c"),
    ):
        if os.path.exists(source):
            found.append(Extension(name, sources=[source], extra_compile_args=COMPILE, extra_link_args=LINK))
    return found


class build_changed(build_ext):
    """build_ext that compiles the files that changed, side by side: the stock one compiles all files of an
    extension again, one after another."""

    def build_extension(self, ext):
        compile_all = self.compiler.compile
        settings = [__file__, *ext.depends]

        def compile_changed(sources, output_dir=None, **options):
            objects = self.compiler.object_filenames(sources, output_dir=output_dir)
            stale = [source for source, built in zip(sources, objects, strict=True)
                     if self.force or not is_newer(built, [source, *settings])]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda source: compile_all([source], output_dir=output_dir, **options), stale))
            return objects

        self.compiler.compile = compile_changed
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


def is_newer(built, sources):
    return os.path.exists(built) and all(os.path.getmtime(built) > os.path.getmtime(each) for each in sources)


setup(ext_modules=[] if os.environ.get("VMFS_BUILT") else extensions(), cmdclass={"build_ext": build_changed})
