"""virtio-rng: entropy.

Source: VIRTIO 1.2, section 5.4. It is the host's (getrandom); where the machine's time follows its instructions, a
series that it was born with (`Board.random`).
"""

from __future__ import annotations

from vmfs.devices.virtio.pci import FIRST_DEVICE, VirtioDevice, VirtioState
from vmfs.devices.virtio.queue import Chain, Virtqueue

_MOST = 1 << 16  # bytes a request: the driver asks again for more


class Rng(VirtioDevice[VirtioState]):
    STATE = VirtioState
    TYPE = "virtio-rng"
    DEVICE = FIRST_DEVICE + 4
    CLASS = 0x00FF00
    QUEUES = (64,)

    def notified(self, queue: Virtqueue) -> None:
        self.serve(queue, self._fill)

    def _fill(self, chain: Chain) -> int:
        count = chain.write(self.board.random(min(chain.writable_length, _MOST)))
        self.counters["bytes"] += count
        return count
