"""The oracle of the allocator tests: a slow allocator on Python lists, one rule of the original at a time."""

from __future__ import annotations

import dataclasses

FREE, PRIVATE, TREE, PENDING, SINK = 0, 1, 2, 5, 6


def ceil_div(n: int, d: int) -> int:
    return (n + d - 1) // d


def three_part_extend(
    prefix_lens: list[int], seq_lens: list[int], last_loc: list[int], pages: list[int], page_size: int
) -> list[int]:
    """Tail of the old page, then whole new pages, then a part of the last one, request after request."""
    slots: list[int] = []
    pages = list(pages)
    for prefix, length, last in zip(prefix_lens, seq_lens, last_loc, strict=True):
        end_of_old_page = ceil_div(prefix, page_size) * page_size
        n1 = min(length, end_of_old_page) - prefix
        slots += [last + 1 + k for k in range(n1)]
        if prefix + n1 == length:
            continue
        for _ in range(length // page_size - end_of_old_page // page_size):
            page = pages.pop(0)
            slots += [page * page_size + k for k in range(page_size)]
        rest = length - length // page_size * page_size
        if rest:
            page = pages.pop(0)
            slots += [page * page_size + k for k in range(rest)]
    assert not pages, "the model was given more pages than the batch needs"
    return slots


@dataclasses.dataclass
class Model:
    """Free list, released pages and pending calls as lists; the owner of each page as a list of ints."""

    num_pages: int
    page_size: int
    lifo: bool
    need_sort: bool = False

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.free_pages = list(range(1, self.num_pages + 1))
        self.release_pages: list[int] = []
        self.pending: list[int] = []
        self.depth = 0
        self.owner = [SINK] + [FREE] * self.num_pages
        self.reordered = 0  # Counts what ends marks.

    def available(self) -> int:
        return (len(self.free_pages) + len(self.release_pages) + len(self.pending)) * self.page_size

    def merge_and_sort(self) -> None:
        self.sort_own()

    def sort_own(self) -> None:
        if self.release_pages:
            self.free_pages = sorted(self.free_pages + self.release_pages)
            self.release_pages = []
            self.reordered += 1

    def join_pending(self) -> None:
        if not self.pending:
            return
        pages, self.pending = self.pending, []
        for page in pages:
            self.owner[page] = FREE
        name = "release_pages" if self.need_sort else "free_pages"
        target = getattr(self, name)
        setattr(self, name, sorted(pages) + target if self.lifo else target + pages)
        self.reordered += 1

    def has(self, n: int) -> bool:
        return n <= self.available() // self.page_size

    def take(self, n: int, trigger: int) -> list[int] | None:
        """What is short is refused before anything is sorted."""
        if not self.has(n):
            return None
        if self.need_sort and trigger > len(self.free_pages):
            self.sort_own()
        if n > len(self.free_pages):
            self.join_pending()
            self.sort_own()
        pages, self.free_pages = self.free_pages[:n], self.free_pages[n:]
        for page in pages:
            self.owner[page] = PRIVATE
        return pages

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.owner[page] = PENDING
        self.pending += pages
        if self.depth == 0:
            self.join_pending()

    def free(self, slots: list[int]) -> None:
        if self.page_size == 1:
            self.release(list(slots))
        else:
            self.release(sorted({slot // self.page_size for slot in slots}))

    def alloc(self, need_size: int) -> list[int] | None:
        n = need_size // self.page_size
        pages = self.take(n, n)
        return None if pages is None else [p * self.page_size + k for p in pages for k in range(self.page_size)]

    def extend_pages(self, prefix_lens: list[int], seq_lens: list[int]) -> list[int] | None:
        lengths = list(zip(prefix_lens, seq_lens, strict=True))
        new = sum(ceil_div(s, self.page_size) - ceil_div(p, self.page_size) for p, s in lengths)
        tokens = sum(s - p for p, s in lengths)
        return self.take(new, tokens // self.page_size + len(lengths) + 1)

    def alloc_extend(self, prefix_lens: list[int], seq_lens: list[int], last_loc: list[int]) -> list[int] | None:
        pages = self.extend_pages(prefix_lens, seq_lens)
        return None if pages is None else three_part_extend(prefix_lens, seq_lens, last_loc, pages, self.page_size)

    def alloc_decode(self, seq_lens: list[int], last_loc: list[int]) -> list[int] | None:
        new = sum((s - 1) % self.page_size == 0 for s in seq_lens)
        pages = self.take(new, len(seq_lens))
        if pages is None:
            return None
        return [
            pages.pop(0) * self.page_size if (s - 1) % self.page_size == 0 else last + 1
            for s, last in zip(seq_lens, last_loc, strict=True)
        ]
