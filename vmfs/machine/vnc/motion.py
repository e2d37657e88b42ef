"""What of a picture moves, and what of it a client has only roughly.

A part that changes again and again is sent by JPEG, in a fraction of the time that zlib takes for what is like a
photograph; once it has been at rest for `CALM_SECONDS` it is sent as it is. Sets of tiles are integers, a byte a tile.
"""

from __future__ import annotations

CALM_SECONDS = 0.4


class Motion:
    """Of one client's picture."""

    def __init__(self) -> None:
        self._now = self._before = 0  # tiles that changed in this period, and in the one before it
        self._turns = 0.0
        self._rough = 0

    def split(self, dirty: int, now: float) -> tuple[int, int]:
        """What has changed: the tiles that are to be sent as they are, and those that move. Tiles that are at rest and
        were sent roughly are of the first."""
        if now >= self._turns:
            self._before = self._now if now < self._turns + CALM_SECONDS else 0
            self._now, self._turns = 0, now + CALM_SECONDS
        lately = self._now | self._before
        self._now |= dirty
        calm, self._rough = self._rough & ~(lately | dirty), self._rough & (lately & ~dirty)
        return dirty & ~lately | calm, dirty & lately

    def sent_roughly(self, tiles: int) -> None:
        self._rough |= tiles

    def rests_in(self, now: float) -> float:
        """Seconds until `split` may have tiles that rest."""
        return max(self._turns - now, 0.0) if self._rough else float("inf")
