"""vmfs: every virtual machine is a directory; or an object: `from vmfs import Machine` (docs/library.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmfs.library.machine import Machine

__version__ = "0.1.0"
__all__ = ["Machine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Machine":  # what it needs is loaded when it is used
        from vmfs.library.machine import Machine

        return Machine
    raise AttributeError(f"module 'vmfs' has no attribute {name!r}")
