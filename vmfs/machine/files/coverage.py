"""`coverage`: which jumps the guest has taken, as a map that the server and the kernel serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmfs.debug.coverage import SIZE
from vmfs.machine.files.handles import File, Handle, Kind
from vmfs.words.errors import Invalid


@dataclass(frozen=True)
class CoverageFile(Kind):
    """Whatever is written to it, or O_TRUNC, clears it; a mapping is the map itself."""

    writable = True

    def size(self, scope: Any) -> int:
        return SIZE

    def truncate(self, scope: Any, size: int, opened: bool) -> None:
        if size not in (0, SIZE):
            raise Invalid(f"coverage: its {SIZE} bytes are fixed")
        scope.vm.trace.coverage.clear()

    def open(self, node: File, nonblocking: bool, writing: bool) -> Handle:
        return _CoverageHandle(node, nonblocking)


class _CoverageHandle(Handle):
    def __init__(self, node: File, nonblocking: bool) -> None:
        super().__init__(node, nonblocking)
        self.memory = self.scope.vm.trace.coverage.fd

    async def read(self, offset: int, size: int) -> bytes:
        return self.scope.vm.trace.coverage.view[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        self.scope.vm.trace.coverage.clear()
        return len(data)
