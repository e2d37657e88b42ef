"""The cost of a file: `regs` against a bare pyfuse3 file, `mem` against the memfd itself."""

from __future__ import annotations

from bench.harness import Result, bare_c_file, bare_file, memfd, mounted, pairs

SPAN = 16 << 20


def results() -> list[Result]:
    found = []
    with mounted() as mount, bare_file("bench.bare_fuse", "eight") as bare, memfd(128 << 20) as ram:
        vm = mount / "bench"
        vm.mkdir()
        ours, peer = pairs("pread", 8, 2000, vm / "regs", bare)
        found.append(Result("pread of 8 bytes of regs", "ns", ours, "bare pyfuse3 file", peer, "<= 1.1"))
        with bare_c_file() as least:
            ours, peer = pairs("pread", 8, 5000, vm / "regs", least)
        found.append(Result("pread of 8 bytes of regs", "ns", ours, "bare C libfuse file", peer, "<= 1.5"))
        ours, peer = pairs("pread", 4096, 20000, vm / "mem", ram)
        found.append(Result("pread of 4 KiB of mem", "ns", ours, "memfd", peer, "<= 1.05 with passthrough"))
        if "memory_served_by passthrough" in (vm / "stat").read_text():
            with bare_file("bench.bare_passthrough", "mem") as passing:
                ours, peer = pairs("pread", 4096, 20000, vm / "mem", passing)
            found.append(Result("pread of 4 KiB of mem", "ns", ours, "bare passthrough file", peer, "<= 1.05"))
        ours, peer = pairs("pread", 1 << 20, 300, vm / "mem", ram)
        found.append(Result("pread of 1 MiB of mem", "ns", ours, "memfd", peer, "<= 1.05 with passthrough"))
        ours, peer = pairs("mapped", SPAN, 20, vm / "mem", ram)
        found.append(Result("mmap of mem, a pass over 16 MiB", "ns", ours, "memfd", peer, "<= 1.05"))
        vm.rmdir()
    return found
