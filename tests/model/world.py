"""The oracle: what has to be true of a cache, an allocator and a request table, one page at a time.

Written from the rules, not from the code. There are no nodes here and nothing is split: every cached page is an `Entry`
under the whole prefix it ends, and the boundaries that the rules speak of are marks on entries.

  * A prefix is cached when each of its whole pages is; a match is the longest such prefix.
  * An insert keeps the pages that are there and takes those that are not. It leaves a mark where the two meet, and at
    its end; a lock leaves one at its end. The run of entries between two marks is used, locked and evicted as one.
  * A use of a path makes its runs the youngest, the run next to the root the youngest of all. A match uses the runs it
    covers whole. A run that loses its last lock, or is cut off by a mark, has just been used.
  * A lookup finds the runs it covers whole; a run cut off by a mark was found where the cut left it. It keeps the hits
    and the age of what it was part of.
  * The victim is a run that no cached page follows and no lock covers: the first by the order of the policy (`ORDERS`).
    Where the order is no simple rule, the victims are told, and each must be such a run and still needed.
  * Pages are taken from the front of the free list. Pages of several slots go back to its front, ascending within one
    call; pages of one slot go to its back. Inside a free group they wait, and go back together.

Tokens are bytes here, one a token, so that a prefix is a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

FREE, PRIVATE, TREE, PENDING, SINK = 0, 1, 2, 5, 6

ORDERS: dict[str, Callable[[Entry], tuple[int, ...]]] = {
    "lru": lambda end: (end.used,),
    "mru": lambda end: (-end.used,),
    "lfu": lambda end: (end.hits, end.used),
    "fifo": lambda end: (end.born, end.used),
    "filo": lambda end: (-end.born, end.used),
    "priority": lambda end: (end.priority, end.used),
}


class Entry:
    """One cached page."""

    __slots__ = ("born", "children", "hits", "is_end", "locks", "page", "parent", "prefix", "priority", "space", "used")

    def __init__(self, space: bytes, prefix: bytes, page: int, parent: Entry | None):
        self.space, self.prefix, self.page, self.parent = space, prefix, page, parent
        self.children = self.locks = self.priority = self.used = self.born = self.hits = 0
        self.is_end = False

    def __repr__(self) -> str:
        return f"Entry({self.space!r}, {list(self.prefix)}, page={self.page}, locks={self.locks}, end={self.is_end})"


class World:
    """The state, and every operation on it. An operation that the rules forbid is an AssertionError of the caller."""

    def __init__(self, page_size: int, num_pages: int, num_rows: int, policy: str = "lru", disable: bool = False):
        self.page_size, self.num_pages, self.num_rows = page_size, num_pages, num_rows
        self.first, self.disable = ORDERS.get(policy), disable
        self.reset()

    def reset(self) -> None:
        self.cached: dict[tuple[bytes, bytes], Entry] = {}
        self.evictable = self.protected = 0
        self.clock = 0
        self.free = list(range(1, self.num_pages + 1))
        self.pending: list[int] = []
        self.depth = 0
        self.owner = bytearray([SINK] + [FREE] * self.num_pages)
        self.rows = list(range(self.num_rows))

    # Pages.

    def alloc(self, n: int) -> list[int] | None:
        if len(self.free) < n <= len(self.free) + len(self.pending):
            self.join()
        if n > len(self.free):
            return None
        pages, self.free = self.free[:n], self.free[n:]
        for page in pages:
            assert self.owner[page] == FREE
            self.owner[page] = PRIVATE
        return pages

    def release(self, pages: Iterable[int], owner: int) -> None:
        for page in pages:
            assert self.owner[page] == owner, f"page {page} is {self.owner[page]}, not {owner}"
            self.owner[page] = PENDING
            self.pending.append(page)
        if not self.depth:
            self.join()

    def join(self) -> None:
        pages, self.pending = self.pending, []
        for page in pages:
            self.owner[page] = FREE
        self.free = sorted(pages) + self.free if self.page_size > 1 else self.free + pages

    def group(self, step: int) -> None:
        self.depth += step
        if not self.depth:
            self.join()

    # Prefixes.

    def match(self, space: bytes, tokens: bytes) -> list[Entry]:
        """The longest cached prefix, an entry a page. Reading only: `use` is apart."""
        path: list[Entry] = []
        if self.disable:
            return path
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            entry = self.cached.get((space, tokens[:end]))
            if entry is None:
                break
            path.append(entry)
        return path

    def use(self, path: list[Entry]) -> None:
        """Uses the runs that `path` covers whole."""
        for entry in reversed(path):
            if entry.is_end:
                self.clock += 1
                entry.used = self.clock

    def find(self, path: list[Entry]) -> None:
        """A lookup ended at the end of `path`."""
        for entry in path:
            entry.hits += entry.is_end
        self.use(path)

    def mark(self, entry: Entry) -> None:
        if not entry.is_end:
            rest = self.end_of(entry)
            entry.is_end = True
            entry.born, entry.hits = rest.born, rest.hits + 1
            self.use([entry])

    def insert(
        self, space: bytes, tokens: bytes, pages: list[int], owned: int, priority: int
    ) -> tuple[list[Entry], list[int]]:
        """Caches whole pages of `tokens`; `owned` of them are the tree's already. Returns path and spare pages."""
        path = self.match(space, tokens)
        assert len(path) >= owned, "a locked prefix has left the tree"
        spare = pages[owned : len(path)]
        if path:
            self.mark(path[-1])
        for i in range(len(path), len(tokens) // self.page_size):
            parent = path[-1] if path else None
            prefix = tokens[: (i + 1) * self.page_size]
            entry = self.cached[space, prefix] = Entry(space, prefix, pages[i], parent)
            if parent is not None:
                parent.children += 1
            assert self.owner[pages[i]] == PRIVATE
            self.owner[pages[i]] = TREE
            self.evictable += 1
            path.append(entry)
        if path and not path[-1].is_end:
            path[-1].is_end = True
            self.clock += 1
            path[-1].born = self.clock
        for entry in path:
            entry.priority = max(entry.priority, priority)
        self.use(path)
        return path, spare

    def lock(self, path: list[Entry]) -> None:
        if path:
            self.mark(path[-1])
        for entry in path:
            if not entry.locks:
                self.evictable -= 1
                self.protected += 1
            entry.locks += 1

    def unlock(self, path: list[Entry]) -> int:
        """Returns how many pages became evictable."""
        freed = 0
        for entry in reversed(path):
            entry.locks -= 1
            assert entry.locks >= 0
            if not entry.locks:
                freed += 1
                if entry.is_end:
                    self.use([entry])
        self.evictable += freed
        self.protected -= freed
        return freed

    def evict(self, n: int, told: Iterable[int] = ()) -> list[Entry]:
        """At least `n` entries, run by run in order of eviction, unless fewer can go; each run from its start.

        `told` are the pages that went, in order, for a policy whose order is not known here.
        """
        gone: list[Entry] = []
        entries = {entry.page: entry for entry in self.cached.values()}
        follow = iter(told)
        while len(gone) < n:
            leaves = [
                entry for entry in self.cached.values() if entry.is_end and not entry.children and not entry.locks
            ]
            if not leaves:
                break
            if self.first:
                run = self.run_of(min(leaves, key=self.first))
            else:
                run = self.run_of(self.end_of(entries[next(follow)]))
                assert run[-1] in leaves, f"{run[-1]} was evicted, but is locked or no leaf"
                assert [next(follow) for _ in run[1:]] == [entry.page for entry in run[1:]], f"{run} did not go whole"
            for entry in run:
                del self.cached[entry.space, entry.prefix]
            if run[0].parent is not None:
                run[0].parent.children -= 1
            gone += run
        assert self.first or not list(follow), "more was evicted than was asked for"
        self.evictable -= len(gone)
        self.release([entry.page for entry in gone], TREE)
        return gone

    def order(self) -> Iterator[Entry]:
        """The ends of all unlocked runs, the one used longest ago first."""
        ends = [entry for entry in self.cached.values() if entry.is_end and not entry.locks]
        return iter(sorted(ends, key=lambda entry: entry.used))

    def run_of(self, end: Entry) -> list[Entry]:
        """The run that ends there, from its start."""
        run = [end]
        while run[-1].parent is not None and not run[-1].parent.is_end:
            run.append(run[-1].parent)
        return run[::-1]

    def end_of(self, entry: Entry) -> Entry:
        """The end of the run that `entry` is in."""
        ends = [e for e in self.cached.values() if e.is_end and e.space == entry.space]
        return min((e for e in ends if e.prefix.startswith(entry.prefix)), key=lambda e: len(e.prefix))
