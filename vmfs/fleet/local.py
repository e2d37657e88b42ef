"""A cluster on this host alone."""

from __future__ import annotations

from typing import Any

import dask
from distributed import LocalCluster

# Dask looks 50 times a second whether each process's event loop answers, and 100 times a second what a thread of a
# worker does: 2 % of a core for each scheduler, nanny and worker, while nothing is to be done.
QUIET = {"distributed.admin.tick.interval": "1s", "distributed.worker.profile.enabled": False}


def local_cluster(**options: Any) -> LocalCluster:
    """A `distributed.LocalCluster`, with its options, which leaves the processors to the cases: without a dashboard
    (unless `dashboard_address` is given), and what Dask looks at it looks at seldom."""
    if "dashboard_address" not in options:
        options["dashboard_address"] = None
        options["scheduler_kwargs"] = {"dashboard_address": ":0", **options.get("scheduler_kwargs", {})}
    with dask.config.set(QUIET):
        return LocalCluster(**options)
