"""Medium: what a drive with removable media has in it, and how that is changed from outside while the machine runs.

To change it is no input that is recorded (docs/decisions/0014): while inputs are, it is refused.
"""

from __future__ import annotations

from typing import Any

from vmfs.devices.virtio.disk import Disk
from vmfs.words.errors import Busy, Invalid

NOTHING = "none"


class Removable:
    """Mixed into a drive. `disk` is its medium, or None; `path` where that is from. `is_locked`: the guest holds it."""

    board: Any
    name: str
    disk: Disk | None = None
    path = ""
    is_locked = False
    MODES: tuple[str, ...] = ("ro",)

    @property
    def medium(self) -> str:
        """What `media` shows."""
        return self.path if self.disk is not None else NOTHING

    def present_words(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """The words of the line that would attach the drive with what is in it now; `words` are of the one that did."""
        plain = [word for word in words if not word.startswith(("as=", "format="))]
        if (self.path if self.disk is not None else "") == (plain[0] if plain else ""):
            return words
        place = tuple(word for word in words if word.startswith("as="))
        if self.disk is None:
            return place
        return (self.path, *([self.disk.mode] if len(self.MODES) > 1 else []), *place)

    def accepts(self, disk: Disk) -> None:
        """Invalid for what is no medium of it."""

    def check_changeable(self) -> None:
        with self.board.lock:
            if self.board.inputs.have_times:
                raise Busy(f"{self.name}: its medium cannot be changed while inputs are recorded")

    def insert(self, disk: Disk, path: str) -> None:
        """Put it in, in place of what there is. From any thread. Busy while the guest holds that."""
        with self.board.lock:
            self.check_changeable()
            self.accepts(disk)
            self._take_out(force=False)
            self.disk, self.path = disk, path
            self.medium_changed()

    def eject(self, *, force: bool = False) -> None:
        """Take it out. `force`: whether the guest holds it or not, as with a paper clip."""
        with self.board.lock:
            self.check_changeable()
            if self.disk is None:
                raise Invalid(f"{self.name}: there is no medium in it")
            self._take_out(force=force)
            self.medium_changed()

    def _take_out(self, *, force: bool) -> None:
        if self.disk is None:
            return
        if self.is_locked and not force:
            self.eject_asked()
            raise Busy(f"{self.name}: the guest holds its medium, and was told of the button; `eject force` takes it")
        self.stop()
        disk, self.disk, self.path = self.disk, None, ""
        disk.close()

    def eject_asked(self) -> None:
        """Somebody has pressed the button."""

    def stop(self) -> None:
        """Have nothing of the medium under way."""

    def medium_changed(self) -> None:
        """There is another one, or none."""
