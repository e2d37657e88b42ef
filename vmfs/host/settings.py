"""What one mount is told when it is made."""

import dataclasses

NO_LIMIT = (1 << 63) - 1
"""More than there can be: a bound that is compared like any other."""


@dataclasses.dataclass(frozen=True)
class MountSettings:
    """How a mount behaves, as given to `vmfs mount`. It never changes while the mount lives."""

    engine: str = "auto"
    """The engine of new VMs: "auto" for the fastest one here, else a name from vmfs.engine.ENGINES."""

    allow_other: bool = False
    """Whether other users may look at the mount at all (the kernel's permission checks hold either way)."""

    max_vms: int = NO_LIMIT
    """How many VMs there may be at a time: mkdir answers ENOSPC over it."""

    max_memory: int = NO_LIMIT
    """How many bytes of RAM all VMs may have together, touched or not: ENOSPC over it."""

    max_vms_user: int = NO_LIMIT
    """How many of them one user may have."""

    max_memory_user: int = NO_LIMIT
    """How much of it one user may have."""

    max_waiting_user: int = 2000
    """How many calls of one user may wait at a time: EAGAIN over it, so that others are served, too."""

    fuse_options: tuple[str, ...] = ()
    """Options for the FUSE library as in mount(8)'s -o, e.g. "ro" or "fsname=lab"."""

    debug: bool = False
    """Whether each request and each answer is logged."""
