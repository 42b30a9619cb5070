"""Marks: points to which an allocator can return, taking back every allocation made since, as after rejected drafts.

A mark is a position in the free list of each side. Taking pages moves along the list and leaves it as it is, so that
going back costs nothing; whatever else changes a list (a free, a sort, a `clear`) ends the marks made before.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxcache.errors import SnapshotError


class Position(NamedTuple):
    """Where a free list is.

    Attributes:
      edition: Changes whenever the list does in another way than by taking from its front.
      head: Where its first page is.
      pages: Pages in it.
    """

    edition: int
    head: int
    pages: int


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """A point to which `restore_state` can return. Opaque; compared by identity.

    Attributes:
      positions: That of each side's free list.
    """

    positions: tuple[Position, ...]

    def is_of(self, positions: tuple[Position, ...]) -> bool:
        """Whether the lists have only been taken from, or wound back, between the mark and `positions`."""
        return all(mine.edition == now.edition for mine, now in zip(self.positions, positions, strict=True))


class Marks:
    """The marks of one allocator that can still be returned to, oldest first. As many as there are pages, at most."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []

    def add(self, positions: tuple[Position, ...]) -> Mark:
        """The mark of this point; the same one as before if nothing has happened since."""
        if self._marks and not self._marks[-1].is_of(positions):
            self._marks.clear()
        if not self._marks or self._marks[-1].positions != positions:
            self._marks.append(Mark(positions))
        return self._marks[-1]

    def require(self, mark: Mark, positions: tuple[Position, ...]) -> None:
        """Raises SnapshotError unless the allocator, which is at `positions`, can return to `mark`."""
        if mark not in self._marks or not mark.is_of(positions):
            raise SnapshotError(
                "mark must be one of this allocator's, with no page freed or sorted and no older mark restored since, "
                f"got {mark}: free what was allocated since instead"
            )

    def returned_to(self, mark: Mark) -> None:
        """Forgets the marks younger than this one: they would cut later allocations in two."""
        del self._marks[self._marks.index(mark) + 1 :]
