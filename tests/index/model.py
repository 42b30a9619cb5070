"""Oracle for the tree with any components: what has to be true, one page at a time.

Written from the rules, not from the code. There are no nodes here and nothing is split: every cached page is a `Page`
under the whole prefix it ends, and the boundaries that the rules speak of are marks (`is_end`) on pages. A run is what
lies between two marks.

  * What is cached is, for each component, a page id for each page of a run or for none of it (a hole), or a state at
    the end of a run. Every run has the first component; a run that no page follows has them all.
  * A stop is a prefix that every component can be continued from: the last `reach` tokens before it are there, the
    state is the one saved exactly there. A lookup gives the longest one.
  * A lock covers, of each component, the runs with a token that its stop needs. It leaves a mark where it ends. When it
    is narrowed to a later stop, it covers of a window only pages that this one needs, and its last one, with a mark
    before the first of them.
  * An insert keeps what is there and leaves a mark where the new begins. Of a further component only what comes after
    the last 0 is offered. It fills holes; a hole in which it begins, and new pages, are cut there.
  * A use of a path makes its runs the youngest: in the first component the run next to the root last, in others first.
    A run that loses its last lock, is filled or is cut off by a mark has just been used. A lookup uses and finds the
    runs that it covers whole; a run cut off by a mark was found where the cut left it, and keeps hits and age.
  * A resume point is where no page follows, or several do. Of a further component of finite reach, what the next one
    does not need is surplus: pages before its last `reach` tokens, and states anywhere else. Evicting it takes unlocked
    surplus first, run by run, as it is told, if a lookup was ever locked, and as long as twice as many tokens of such
    lookups ended where no page follows as in the middle; a run is cut where its surplus ends, which is no use of it.
  * Evicting a component takes unlocked runs by the order of the policy (`ORDERS`): of the first one, runs that no page
    follows. A run that no page follows goes with all it has, and then what led to it if that is no stop for all. Of a
    run that pages follow only this component goes. Where the order is no simple rule, the victims are told.

Elements are bytes here, `width` a token or pair of tokens, so that a prefix is a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from jaxcache.index.component import Component

ORDERS: dict[str, Callable[[Page, int], tuple[int, ...]]] = {
    "lru": lambda end, c: (end.used[c],),
    "mru": lambda end, c: (-end.used[c],),
    "lfu": lambda end, c: (end.hits[c], end.used[c]),
    "fifo": lambda end, c: (end.born[c], end.used[c]),
    "filo": lambda end, c: (-end.born[c], end.used[c]),
    "priority": lambda end, c: (end.priority, end.used[c]),
}


class Page:
    """One cached page; what belongs to a run (a state, locks of it, its use) is kept at the run's last page.

    Attributes:
      ids: For each component its page id, or its state; 0 for none.
      known: Whether the policy of a component has met this run.
    """

    __slots__ = (
        "below",
        "born",
        "depth",
        "hits",
        "ids",
        "is_end",
        "known",
        "locks",
        "parent",
        "prefix",
        "priority",
        "space",
        "used",
    )

    def __init__(self, space: bytes, prefix: bytes, parent: Page | None, count: int):
        self.space, self.prefix, self.parent = space, prefix, parent
        self.depth: int = parent.depth + 1 if parent else 1
        self.below: list[Page] = []
        self.is_end = False
        self.priority = 0
        self.ids, self.locks, self.used, self.born, self.hits = ([0] * count for _ in range(5))
        self.known = [False] * count

    def __repr__(self) -> str:
        return f"Page({self.space!r}, {self.prefix.hex()}, ids={self.ids}, locks={self.locks}, end={self.is_end})"


class TreeModel:
    """The state and every operation on it. Lengths are pages."""

    def __init__(self, page_size: int, components: Sequence[Component], policy: str = "lru", width: int = 1):
        self.page_size, self.components, self.count = page_size, components, len(components)
        self.page_bytes = page_size * width
        self.order = ORDERS.get(policy)
        self.is_lru = policy == "lru"
        self.spanning = [c for c, component in enumerate(components) if component.spans]
        self.state = next((c for c, component in enumerate(components) if not component.spans), 0)
        self.reset()

    def reset(self) -> None:
        self.cached: dict[tuple[bytes, bytes], Page] = {}
        self.clock = 0
        self.has_requests = False  # whether a lookup was ever locked
        self.looked_up = [0, 0, 0]  # tokens of those that ended where no page follows, one does, several do

    # Looking up.

    def path(self, space: bytes, elements: bytes) -> list[Page]:
        """The cached pages that `elements` leads through."""
        path: list[Page] = []
        for end in range(self.page_bytes, len(elements) + 1, self.page_bytes):
            page = self.cached.get((space, elements[:end]))
            if page is None:
                break
            path.append(page)
        return path

    def is_stop(self, path: Sequence[Page], length: int) -> bool:
        """Whether every component can be continued from the first `length` pages of `path`."""
        if length == 0:
            return True
        for c, component in enumerate(self.components):
            if not component.spans:
                if not path[length - 1].is_end or not path[length - 1].ids[c]:
                    return False
            elif any(not page.ids[c] for page in self._needed(path, length, component.reach)):
                return False
        return True

    def _needed(self, path: Sequence[Page], length: int, reach: float) -> Sequence[Page]:
        """The pages with one of the last `reach` tokens before a stop."""
        first = 0 if reach == math.inf else max(0, int(length * self.page_size - reach) // self.page_size)
        return path[first:length]

    def stop(self, path: Sequence[Page]) -> int:
        """The longest stop on `path`."""
        return next(length for length in range(len(path), -1, -1) if self.is_stop(path, length))

    def state_at(self, path: Sequence[Page], length: int) -> int:
        return path[length - 1].ids[self.state] if self.state and length else 0

    def find(self, path: Sequence[Page]) -> None:
        """A lookup ended at the end of `path`."""
        ends = [page for page in path if page.is_end]
        for c in range(self.count):
            for end in ends:
                end.hits[c] += end.known[c]
            self._touch(c, ends)

    def went_on(self, path: Sequence[Page], cut: int) -> None:
        """A lookup that `path` is all of was locked; if it was cut back, `cut` pages were there."""
        self.has_requests = True
        kind = 1 if cut or not path else min(len(path[-1].below), 2)
        self.looked_up[kind] += (cut or len(path)) * self.page_size

    # Use.

    def _touch(self, c: int, ends: Sequence[Page]) -> None:
        for end in ends[::-1] if c == 0 else ends:
            self._use(c, end)

    def _use(self, c: int, end: Page) -> None:
        self.clock += 1
        end.used[c] = self.clock

    def _enter(self, c: int, end: Page) -> None:
        """A run may be evicted from now on."""
        if not end.known[c]:
            end.known[c], end.born[c], end.hits[c] = True, self.clock, 0
        self._use(c, end)

    def mark(self, page: Page) -> None:
        """A run ends at `page` from now on."""
        if page.is_end:
            return
        rest = self.end_of(page)
        page.is_end, page.priority = True, rest.priority
        for c in self.spanning:
            if page.ids[c] and rest.known[c]:
                page.known[c], page.born[c], page.hits[c] = True, rest.born[c], rest.hits[c] + 1
                self._use(c, page)

    def cut(self, page: Page) -> None:
        """The same, but no use: only that what is above stays younger, where the order is that of use alone."""
        rest = self.end_of(page)
        self.mark(page)
        for c in self.spanning:
            page.hits[c] = rest.hits[c]
        if self.is_lru and not page.locks[0]:
            above = page.parent
            while above is not None:
                if above.is_end:
                    self._use(0, above)
                above = above.parent

    def is_surplus(self, c: int, page: Page) -> bool:
        """Whether no resume point needs what `page` has of a further component."""
        reach, point = self.components[c].reach, page
        while len(point.below) == 1:
            (point,) = point.below
        if reach == math.inf or not page.ids[c] or self.end_of(page).locks[c]:
            return False
        if c == self.state:
            return point is not page
        return page.depth <= max(0, int(point.depth * self.page_size - reach) // self.page_size)

    def _evict_surplus(self, c: int, amount: int, told: Sequence[int], gone: list[list[int]]) -> None:
        while len(gone[c]) < amount and (surplus := [p for p in self.cached.values() if self.is_surplus(c, p)]):
            (first,) = [page for page in surplus if page.ids[c] == told[len(gone[c])]]
            end = self.end_of(first)
            part = [page for page in (self.run_of(end) if c in self.spanning else [end]) if page in surplus]
            assert part[0] is first
            if part[-1] is not end:
                self.cut(part[-1])
            for page in part:
                gone[c].append(page.ids[c])
                page.ids[c] = 0
            part[-1].known[c] = False

    # Changing.

    def starts(self, values: Sequence[Sequence[int]], owned: int, total: int) -> list[int] | None:
        """For each component, the page from which on it is offered; None if nothing is, at the end."""
        starts = []
        for c, component in enumerate(self.components):
            start = owned
            if c and component.spans:
                start = max([owned, *(at + 1 for at in range(owned, total) if not values[c][at])])
            elif c:
                start = owned if values[c] and values[c][0] else total
            if start == total > owned:
                return None
            starts.append(start)
        return starts

    def insert(
        self, space: bytes, elements: bytes, values: Sequence[Sequence[int]], owned: int, priority: int = 0
    ) -> tuple[list[list[int]], list[Page], list[Page]]:
        """Offers values that `starts` accepts; returns what is not needed, and the ends of runs healed and added."""
        total = len(elements) // self.page_bytes
        starts = self.starts(values, owned, total)
        assert starts is not None
        path = self.path(space, elements[: total * self.page_bytes])
        present = len(path)
        assert present >= owned, "a locked prefix has left the tree"
        if present:
            self.mark(path[-1])
        ends = [page for page in path if page.is_end]
        for end in ends:
            end.priority = max(end.priority, priority)
        spare: list[list[int]] = [list(values[0][owned:present])]
        healed: list[Page] = []
        for c in range(1, self.count):
            if c == self.state:
                spare.append(self._save(path, total, values[c]))
            else:
                spare.append(self._heal(c, path, values[c], owned, starts[c], healed))
        ends = [page for page in path if page.is_end]
        for c in range(1, self.count):
            self._touch(c, ends)
        added = self._add(space, elements, path, values, starts, priority)
        self._touch(0, added)
        self._touch(0, ends)
        return spare, healed, added

    def _save(self, path: list[Page], total: int, state: Sequence[int]) -> list[int]:
        if not state or not state[0] or len(path) < total:
            return []
        if not total or path[-1].ids[self.state]:
            return [state[0]]
        path[-1].ids[self.state] = state[0]
        if not path[-1].locks[self.state]:
            self._enter(self.state, path[-1])
        return []

    def _heal(
        self, c: int, path: list[Page], offered: Sequence[int], owned: int, start: int, healed: list[Page]
    ) -> list[int]:
        taken = set(range(max(start, len(path)), len(offered)))
        if owned < start < len(path) and not path[start - 1].ids[c] and not path[start].ids[c]:
            self.mark(path[start - 1])
        for end in [page for page in path[start:] if page.is_end and not page.ids[c]]:
            for page in self.run_of(end):
                page.ids[c] = offered[page.depth - 1]
                taken.add(page.depth - 1)
            if not end.locks[c]:
                self._enter(c, end)
            healed.append(end)
        total = max(start, len(path))
        return [offered[at] for at in range(owned, total) if offered[at] and at not in taken]

    def _add(
        self,
        space: bytes,
        elements: bytes,
        path: list[Page],
        values: Sequence[Sequence[int]],
        starts: list[int],
        priority: int,
    ) -> list[Page]:
        added: list[Page] = []
        total = len(elements) // self.page_bytes
        for at in range(len(path), total):
            prefix = elements[: (at + 1) * self.page_bytes]
            parent = path[-1] if path else None
            page = self.cached[space, prefix] = Page(space, prefix, parent, self.count)
            if parent is not None:
                parent.below.append(page)
            for c in self.spanning:
                if at >= starts[c]:
                    page.ids[c] = values[c][at]
            if at + 1 in starts or at + 1 == total:
                page.is_end, page.priority = True, priority
                added.append(page)
            path.append(page)
        if added and self.state:
            path[-1].ids[self.state] = values[self.state][0]
        for end in added:
            for c in range(self.count):
                if end.ids[c]:
                    self._enter(c, end)
        return added

    def lock(self, path: Sequence[Page]) -> list[list[Page]]:
        """Locks the stop at the end of `path`; returns the pages covered, for each component."""
        if not path:
            return [[] for _ in self.components]
        self.mark(path[-1])
        covered = []
        for component in self.components:
            if component.spans:
                first = self._needed(path, len(path), component.reach)[0]
                begin = self.run_of(self.end_of(first))[0].depth - 1
                covered.append(list(path[begin:]))
            else:
                covered.append([path[-1]])
        for c, pages in enumerate(covered):
            for page in pages:
                page.locks[c] += 1
        return covered

    def unlock(self, covered: list[list[Page]]) -> int:
        """Returns how many pages of the first component became evictable."""
        for c, pages in enumerate(covered):
            self._unlock(c, pages)
        return sum(not page.locks[0] for page in covered[0])

    def _unlock(self, c: int, pages: Sequence[Page]) -> None:
        freed = []
        for page in pages:
            page.locks[c] -= 1
            assert page.locks[c] >= 0
            if page.is_end and not page.locks[c] and page.ids[c]:
                freed.append(page)
        for end in freed[::-1] if c == 0 else freed:
            self._enter(c, end)

    def narrow(self, covered: list[list[Page]], stop: int) -> None:
        """Of the windows, a lock covers what a stop after `stop` tokens needs, and one page at least, and no more."""
        for c in self.spanning[1:]:
            reach = self.components[c].reach
            before = [page for page in covered[c][:-1] if page.depth * self.page_size <= stop - reach]
            if before:
                self.mark(before[-1])
                self._unlock(c, before)
                covered[c] = covered[c][len(before) :]

    def evict(self, c: int, amount: int, told: Sequence[int] = ()) -> list[list[int]]:
        """Lets go of at least `amount` values; `told` are those of this component that went, in order."""
        gone: list[list[int]] = [[] for _ in self.components]
        if c and self.has_requests and self.looked_up[0] >= 2 * self.looked_up[1]:
            self._evict_surplus(c, amount, told, gone)
        while len(gone[c]) < amount:
            candidates = [end for end in self.unlocked(c) if c or not end.below]
            if not candidates:
                break
            if self.order:
                order = self.order
                end = min(candidates, key=lambda end: order(end, c))
            else:
                (end,) = [end for end in candidates if told[len(gone[c])] in self.values(c, end)]
            if end.below:
                for page in self.run_of(end) if c in self.spanning else [end]:
                    gone[c].append(page.ids[c])
                    page.ids[c] = 0
                end.known[c] = False
            else:
                self._remove(end, gone)
        return gone

    def _remove(self, end: Page, gone: list[list[int]]) -> None:
        """A run that no page follows goes, and what led to it if that is no stop for all."""
        above: Page | None = end
        while above is not None and not above.below and (above is end or not self._is_kept(above)):
            run = self.run_of(above)
            for c in range(self.count):
                gone[c] += self.values(c, above)
            for page in run:
                del self.cached[page.space, page.prefix]
            above = run[0].parent
            if above is not None:
                above.below.remove(run[0])

    def _is_kept(self, end: Page) -> bool:
        return bool(end.locks[0]) or all(end.ids)

    def drop(self, space: bytes) -> list[list[int]] | None:
        """Lets go of a namespace; None if some of it is locked."""
        pages = [page for page in self.cached.values() if page.space == space]
        if any(page.locks[0] for page in pages):
            return None
        for page in pages:
            del self.cached[page.space, page.prefix]
        return [[page.ids[c] for page in pages if page.ids[c]] for c in range(self.count)]

    # Looking at.

    def ends(self) -> Iterator[Page]:
        return (page for page in self.cached.values() if page.is_end)

    def unlocked(self, c: int) -> list[Page]:
        """Ends of the runs that have component `c` and are not locked there."""
        return [end for end in self.ends() if end.ids[c] and not end.locks[c]]

    def values(self, c: int, end: Page) -> list[int]:
        """What the run that ends there has of component `c`."""
        if not end.ids[c]:
            return []
        return [page.ids[c] for page in self.run_of(end)] if c in self.spanning else [end.ids[c]]

    def run_of(self, end: Page) -> list[Page]:
        """The run that ends there, from its start."""
        run = [end]
        while (above := run[-1].parent) is not None and not above.is_end:
            run.append(above)
        return run[::-1]

    def end_of(self, page: Page) -> Page:
        """The end of the run that `page` is in."""
        while not page.is_end:
            (page,) = page.below
        return page
