"""python -m bench [GROUP ...]: run the benchmarks (all groups, or those named) and print one table."""

from __future__ import annotations

import sys

from bench import (
    bios,
    boot,
    cpu,
    debug,
    disk,
    drives,
    files,
    fleet,
    gdb,
    history,
    house,
    lane,
    library,
    net,
    past,
    points,
    ports,
    programs,
    runs,
    screen,
    smp,
    web,
)
from bench.harness import table

GROUPS = {
    "files": files.results,
    "runs": runs.results,
    "lane": lane.results,
    "house": house.results,
    "ports": ports.results,
    "cpu": cpu.results,
    "smp": smp.results,
    "boot": boot.results,
    "disk": disk.results,
    "drives": drives.results,
    "bios": bios.results,
    "net": net.results,
    "programs": programs.results,
    "points": points.results,
    "debug": debug.results,
    "gdb": gdb.results,
    "library": library.results,
    "history": history.results,
    "past": past.results,
    "web": web.results,
    "screen": screen.results,
    "fleet": fleet.results,
}


def main() -> None:
    names = sys.argv[1:] or list(GROUPS)
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        sys.exit(f"bench: there is no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    results = [result for name in names for result in GROUPS[name]()]
    print(table(results))


if __name__ == "__main__":
    main()
