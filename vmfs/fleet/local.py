"""A cluster on this host alone, and one whose address is known."""

from __future__ import annotations

from typing import Any

import dask
from distributed import Client, LocalCluster

from vmfs.words.errors import Invalid

# Dask does this in each scheduler, nanny and worker while nothing is to be done: it checks the event loop 50 times a
# second, samples a worker's threads 100 times, measures its memory ten times, and the host's disks and networks twice.
QUIET = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.monitor-interval": "1s",
}


def local_cluster(**options: Any) -> LocalCluster:
    """A `distributed.LocalCluster`, with its options, which leaves the processors to the cases: without a dashboard
    (unless `dashboard_address` is given), and what Dask looks at it looks at seldom, but for what the user's own
    configuration of Dask says."""
    if "dashboard_address" not in options:
        options["dashboard_address"] = None
        options["scheduler_kwargs"] = {"dashboard_address": ":0", **options.get("scheduler_kwargs", {})}
    with dask.config.set({name: value for name, value in QUIET.items() if _is_default(name)}):
        return LocalCluster(**options)


def client_of(address: str) -> Client:
    """Of a scheduler; Invalid, with a sentence, where none answers."""
    try:
        return Client(address, timeout="10s")
    except OSError as failure:
        raise Invalid(f"no scheduler answers at {address}: {failure}") from None
    except (ValueError, TypeError) as failure:  # its address is none; it needs TLS, and Dask has no certificates
        raise Invalid(f"{address!r} cannot be connected to: {failure}") from None


def _is_default(name: str) -> bool:
    defaults = dask.config.merge(*dask.config.defaults)
    return bool(dask.config.get(name) == dask.config.get(name, config=defaults))
