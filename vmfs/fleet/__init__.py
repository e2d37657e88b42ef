"""Many machines on many hosts: `Fleet`, on a cluster of Dask. docs/fleet.md.

It is also a plugin of pytest: `pytest -p vmfs.fleet --scheduler ADDRESS` runs the tests that are marked `fleet` there.
"""

from __future__ import annotations

import sys
from typing import Any

_FROM = {
    "Fleet": "vmfs.fleet.fleet",
    "Template": "vmfs.fleet.fleet",
    "Result": "vmfs.fleet.results",
    "Campaign": "vmfs.fleet.fuzz",
    "Bug": "vmfs.fleet.fuzz",
    "FleetPlugin": "vmfs.fleet.worker",
    "local_cluster": "vmfs.fleet.local",
}
__all__ = [*_FROM]  # noqa: PLE0604
if "pytest" in sys.modules:  # it looks for hooks in what a module has when it is imported
    from vmfs.fleet.testing import pytest_addoption, pytest_configure, pytest_runtestloop

    __all__ += ["pytest_addoption", "pytest_configure", "pytest_runtestloop"]


def __getattr__(name: str) -> Any:
    """What needs Dask is imported when it is used."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(_FROM[name]), name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("distributed", "dask", "cloudpickle", "psutil"):
            raise ModuleNotFoundError("a fleet needs Dask: pip install 'vmfs[fleet]'", name=missing.name) from None
        raise
