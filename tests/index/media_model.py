"""Oracle for keys with media: a dictionary of pages, each under its whole prefix and all media that start there."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcache.index.media import MediaRange


class PrefixDictionary:
    """What is cached, a page at a time."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.pages: dict[tuple[object, ...], int] = {}

    def _names(self, space: str | None, tokens: Sequence[int], media: Sequence[MediaRange]) -> list[tuple[object, ...]]:
        names = []
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            begun = tuple(sorted([(each.start, each.stop, each.digest) for each in media if each.start < end]))
            names.append((space, tuple(tokens[:end]), begun))
        return names

    def match(self, space: str | None, tokens: Sequence[int], media: Sequence[MediaRange]) -> list[int]:
        """The ids of the pages found."""
        found = []
        for name in self._names(space, tokens, media):
            if name not in self.pages:
                break
            found.append(self.pages[name])
        return found

    def insert(self, space: str | None, tokens: Sequence[int], media: Sequence[MediaRange], ids: Sequence[int]) -> None:
        """Keeps what is there."""
        for name, page in zip(self._names(space, tokens, media), ids, strict=False):
            self.pages.setdefault(name, page)

    def remove(self, ids: Sequence[int]) -> None:
        """These pages are evicted."""
        gone = set(ids)
        self.pages = {name: page for name, page in self.pages.items() if page not in gone}
