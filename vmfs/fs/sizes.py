"""st_size and st_blocks of files. The machine that has them is asked once for all that are wanted."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from vmfs.fs.inodes import ATTR_SECONDS, File, Node
from vmfs.fs.kinds import counted
from vmfs.words.errors import LimitReached, VmfsError

# A machine that does not answer in that time shows the sizes that it had: `ls -l` of others does not wait for it.
ANSWER_SECONDS = 1.0
FIRST_SECONDS = 20.0  # a busy host may take seconds to make the first one


def is_measured(node: Node) -> bool:
    """Whether `size` is as it is now, of what needs no machine for that."""
    if not isinstance(node, File) or not node.kind.sized:
        return True
    known = node.kind.local_size(node)
    if known is not None:
        node.size = known
        return True
    machine = node.scope.machine  # type: ignore[attr-defined]
    if (fresh := machine.fresh_size(node.path)) is not None:
        node.size = fresh
        return True
    since = node.kind.stands_since(node)
    return since is not None and node.measured_at == since


async def measure(nodes: Iterable[Node]) -> None:
    """Have `size` of those nodes that have one as it is now."""
    asked: dict[object, list[File]] = {}
    for node in nodes:
        if not is_measured(node):
            assert isinstance(node, File)
            asked.setdefault(node.scope, []).append(node)
    for scope, files in asked.items():
        stood = {file: file.kind.stands_since(file) for file in files}  # before: it may change meanwhile
        # The first machine of a mount has no sizes that it had: it is not there yet, and 0 would be wrong.
        first = not scope.machine.knows_sizes  # type: ignore[attr-defined]
        with trio.move_on_after(FIRST_SECONDS if first else ANSWER_SECONDS):
            try:
                with counted(scope.machine):  # type: ignore[attr-defined]
                    sizes, modified_ns = await scope.machine.measure([file.path for file in files])  # type: ignore[attr-defined]
            except LimitReached:
                raise
            except VmfsError:  # it has failed, or is gone, or too many of that user wait
                continue
            scope.modified_ns = max(scope.modified_ns, modified_ns)  # type: ignore[attr-defined]
            for file in files:
                size, blocks = sizes.get(file.path, (0, 0))
                file.size = size + file.kind.added_size(file), blocks
                file.measured_at = stood[file]
                if file.kind.lasting:
                    file.attr_seconds = ATTR_SECONDS
