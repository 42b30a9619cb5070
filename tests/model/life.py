"""One life of the real allocator, cache and request table beside the oracle: every operation, and every comparison.

An operation takes plain numbers (an index is taken modulo what there is), does the same to both sides and compares what
comes back. `check` then compares the books, `check_all` everything. Nothing here is random, so a driver and Hypothesis
can both choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcache.caches.radix import RadixCache
from jaxcache.errors import CacheError, DoubleFreeError, OwnershipError, ReceiptError, SnapshotError
from jaxcache.events.events import AllBlocksCleared, BlockRemoved, BlockStored, block_name
from jaxcache.index.check import problems
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.index.node import Eviction, Match
from jaxcache.index.page_hashes import namespace_seed, page_hashes
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.request import Request, RequestState
from jaxcache.tables.request_table import ReqToTokenPool
from tests.model.world import PRIVATE, TREE, Entry, World
from tests.pages.model import three_part_extend


@dataclass(frozen=True)
class Shape:
    """What a life is played in."""

    page_size: int = 4
    num_pages: int = 16
    num_rows: int = 4
    policy: Policy = Policy.LRU
    events: bool = False
    disable: bool = False
    max_pages: int = 32


@dataclass(eq=False)
class Live:
    """A running request: the real one, and what the oracle says it has."""

    request: Request
    space: bytes
    tokens: bytes
    pages: list[int] = field(default_factory=list)
    lock: list[Entry] = field(default_factory=list)
    row: int = -1


@dataclass(eq=False)
class Held:
    """A lock, or a match that may become one, of somebody who is no request."""

    space: bytes
    tokens: bytes
    match: Match
    pages: list[int]
    receipt: Receipt | None = None
    lock: list[Entry] = field(default_factory=list)


def same(real: object, oracle: object, what: str, about: object = "") -> None:
    if real != oracle:
        raise AssertionError(f"{what} {about}: the stack says {real}, the oracle {oracle}")


class Life:
    """See the module. `running`, `waiting`, `held` and `matches` are what operations choose from."""

    def __init__(self, shape: Shape):
        self.shape = shape
        page_size, size = shape.page_size, shape.page_size * shape.num_pages
        self.allocator = (
            TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
        )
        self.table = ReqToTokenPool(shape.num_rows, shape.max_pages * page_size, page_size)
        self.cache = RadixCache(
            self.table,
            self.allocator,
            page_size,
            disable=shape.disable,
            enable_kv_cache_events=shape.events,
            policy=shape.policy,
        )
        self.world = World(page_size, shape.num_pages, shape.num_rows, shape.policy.value, shape.disable)
        self.told: list[int] = []
        self._listen()
        self.names: dict[bytes, bytes] = {b"": b""}
        self.resident: set[int] = set()
        self.count = 0
        self.forget()

    def forget(self) -> None:
        self.running: list[Live] = []
        self.waiting: list[Live] = []
        self.held: list[Held] = []
        self.matches: list[Held] = []

    def _listen(self) -> None:
        """Hears which pages the tree lets go, in order."""
        tree, evict = self.cache.tree, self.cache.tree.evict

        def heard(amount: int, component: int = 0) -> Eviction:
            gone = evict(amount, component)
            self.told += gone.values[0].tolist()
            return gone

        tree.evict = heard  # type: ignore[method-assign]

    # Requests.

    def admit(self, tokens: bytes, space: bytes, priority: int, cap: int) -> None:
        self.count += 1
        request = Request(str(self.count), list(tokens), extra_key=space or None, priority=priority)
        self._start(Live(request, self._name(space, request.key), tokens), cap)

    def resume(self, index: int, cap: int) -> None:
        if self.waiting:
            self._start(self.waiting.pop(index % len(self.waiting)), cap)

    def _start(self, live: Live, cap: int) -> None:
        request = live.request
        cap = min(cap, len(live.tokens) - 1)
        found = self.cache.match_prefix(request.key[:cap])
        path = self.world.match(live.space, live.tokens[:cap])
        self.world.find(path)
        same(found.pages.tolist(), [entry.page for entry in path], "matched pages")
        same(found.prefix_len, len(path) * self.shape.page_size, "matched tokens")
        rows = self.table.alloc(1)
        if not self.world.rows:
            same(rows, None, "rows of a full table")
            return
        live.row = self.world.rows.pop(0)
        same(rows, [live.row], "row")
        request.lock = self.cache.inc_lock_ref(found)
        self.world.lock(path)
        self.table.write_pages(live.row, 0, found.pages)
        live.lock, live.pages = path, [entry.page for entry in path]
        request.enter(self.table, live.row)
        request.state = RequestState.RUNNING
        request.num_pages, request.kv_len = len(path), found.prefix_len
        self.running.append(live)

    def extend(self, picks: Sequence[int], counts: Sequence[int], how: int, share: bool, compute: bool = True) -> None:
        """Computes some tokens of a batch, in whichever way of allocating; uncomputed pages are given back."""
        work = []
        for live, count in zip(self._batch(picks), counts, strict=False):
            missing = len(live.tokens) - live.request.kv_len
            if missing:
                work.append((live, live.request.kv_len + 1 + count % missing))
        if not work or not self._grow(work, how):
            return
        for live, target in work:
            if compute:
                live.request.kv_len = target
                if share:
                    self._share(live)
            else:
                keep = -(-live.request.kv_len // self.shape.page_size)
                extra, live.pages = live.pages[keep:], live.pages[:keep]
                live.request.num_pages = keep
                self.allocator.release(extra, PageState.PRIVATE)
                self.world.release(extra, PRIVATE)

    def decode(self, picks: Sequence[int], token: int, share: bool) -> None:
        """Samples a token for every request that is computed, and computes it."""
        room = self.shape.max_pages * self.shape.page_size
        batch = [live for live in self._batch(picks) if live.request.kv_len == len(live.tokens) < room]
        for live in batch:
            live.request.output_ids.append(token)
            live.tokens += bytes([token])
        if not batch or not self._grow([(live, len(live.tokens)) for live in batch], how=3):
            return
        for live in batch:
            live.request.kv_len += 1
            if share:
                self._share(live)

    def share(self, index: int) -> None:
        if self.running:
            self._share(self.running[index % len(self.running)])

    def finish(self, index: int, retract: bool = False) -> None:
        """Ends a request wherever it is: done, aborted half-way, or retracted to go on later."""
        if not self.running:
            return
        live = self.running.pop(index % len(self.running))
        self._end(live)
        live.request.state = RequestState.RETRACTED if retract else RequestState.DONE
        if retract:
            self.waiting.append(live)

    # The cache without requests.

    def match(self, tokens: bytes, space: bytes, keep: bool) -> None:
        key = RadixKey(list(tokens), space or None)
        name = self._name(space, key)
        found = self.cache.match_prefix(key)
        path = self.world.match(name, tokens)
        self.world.find(path)
        same(found.device_indices.tolist(), self._slots([entry.page for entry in path]), "matched slots")
        if keep and len(self.matches) < 4:
            pages = [entry.page for entry in path]
            self.matches.append(Held(name, tokens[: found.prefix_len], found.last_device_node, pages))

    def lock(self, index: int) -> None:
        """Locks what was matched some time ago: either it is all there still, or the lock is refused."""
        if not self.matches:
            return
        held = self.matches.pop(index % len(self.matches))
        path = self.world.match(held.space, held.tokens)
        try:
            held.receipt = self.cache.inc_lock_ref(held.match)
        except ReceiptError:
            assert [entry.page for entry in path] != held.pages, "a lock on what is still there was refused"
            return
        same(held.pages, [entry.page for entry in path], "locked pages")
        same(held.receipt.length, len(held.tokens), "locked tokens")
        self.world.lock(path)
        held.lock = path
        self.held.append(held)

    def unlock(self, index: int) -> None:
        if not self.held:
            return
        held = self.held.pop(index % len(self.held))
        assert held.receipt is not None
        freed = self.cache.dec_lock_ref(held.receipt)
        same(freed, self.world.unlock(held.lock) * self.shape.page_size, "tokens unlocked")
        self._refuses(ReceiptError, lambda: self.cache.dec_lock_ref(held.receipt))  # type: ignore[arg-type]

    def insert(self, tokens: bytes, space: bytes) -> None:
        """Caches tokens under fresh slots; the caller frees its duplicates, and a tail that is no whole page."""
        if self.shape.disable:
            return
        key = RadixKey(list(tokens), space or None)
        name = self._name(space, key)
        page_size = self.shape.page_size
        need = -(-len(tokens) // page_size)
        slots = self.allocator.alloc(need * page_size)
        pages = self.world.alloc(need)
        same(None if slots is None else slots.tolist(), None if pages is None else self._slots(pages), "slots")
        if slots is None or pages is None:
            return
        whole = len(tokens) // page_size
        _, spare = self.world.insert(name, tokens[: whole * page_size], pages[:whole], 0, 0)
        present = self.cache.insert(key, slots)
        same(present, len(spare) * page_size, "tokens that were cached already")
        mine = np.concatenate([slots[:present], slots[whole * page_size :]])
        self.allocator.free(mine)
        self.world.release(self._pages(mine), PRIVATE)

    def evict(self, tokens: int) -> None:
        self.told.clear()
        freed = self.cache.evict(tokens)
        gone = self.world.evict(-(-tokens // self.shape.page_size), self.told)
        same(freed, len(gone) * self.shape.page_size, "tokens evicted")

    def group(self) -> None:
        """Opens a free group, or closes the innermost one."""
        if self.world.depth == 2 or (self.world.depth and len(self.world.pending) % 2):
            self.allocator.free_group_end()
            self.world.group(-1)
        else:
            self.allocator.free_group_begin()
            self.world.group(1)

    def speculate(self, n: int, free_one: bool) -> None:
        """Takes pages and takes it back; refused when a page was freed in between."""
        if self.world.depth:
            return
        before = list(self.world.free)
        snapshot = self.allocator.backup_state()
        for count in (n, 1):
            real, pages = self.allocator.alloc_pages(count), self.world.alloc(count)
            same(None if real is None else real.tolist(), pages, "pages")
        taken = before[: len(before) - len(self.world.free)]
        if free_one and taken:
            self.allocator.release(taken[-1:], PageState.PRIVATE)
            self._refuses(SnapshotError, lambda: self.allocator.restore_state(snapshot))
            self.allocator.release(taken[:-1], PageState.PRIVATE)
            self.world.release(taken[-1:], PRIVATE)
            self.world.release(taken[:-1], PRIVATE)
        else:
            self.allocator.restore_state(snapshot)
            self.world.free = before
            for page in taken:
                self.world.owner[page] = 0

    def misuse(self, kind: int, index: int) -> None:
        """A wrong use is a typed error, and `check` sees that nothing changed."""
        page = 1 + index % self.shape.num_pages
        owner = self.world.owner[page]
        slot = page * self.shape.page_size
        if kind == 0:
            if owner != PRIVATE:
                error = OwnershipError if owner == TREE else DoubleFreeError
                self._refuses(error, lambda: self.allocator.free([slot]))
        elif kind == 1:
            if owner != TREE:
                self._refuses(OwnershipError, lambda: self.allocator.release([page], PageState.TREE))
        elif kind == 2:
            if self.world.rows:
                row = self.world.rows[index % len(self.world.rows)]
                self._refuses(DoubleFreeError, lambda: self.table.free(row))
        elif kind == 3:
            if owner != PRIVATE and not self.shape.disable:
                key = [200] * self.shape.page_size  # a token that no key has
                self._refuses(OwnershipError, lambda: self.cache.insert(key, self._slot_array([page])))
        else:
            self._refuses(CacheError, lambda: self.allocator.release([0], PageState.PRIVATE))

    def reset(self) -> None:
        """Everything is forgotten; receipts from before are refused."""
        receipts = [held.receipt for held in self.held if held.receipt is not None]
        receipts += [live.request.lock for live in self.running if live.request.lock is not None]
        self.cache.reset()
        self.allocator.clear()
        self.table.clear()
        self.world.reset()
        self.forget()
        for receipt in receipts:
            self._refuses(ReceiptError, lambda receipt=receipt: self.cache.dec_lock_ref(receipt))

    # What operations are made of.

    def _batch(self, picks: Sequence[int]) -> list[Live]:
        chosen = {pick % len(self.running): None for pick in picks} if self.running else {}
        return [self.running[i] for i in chosen]

    def _grow(self, work: list[tuple[Live, int]], how: int) -> bool:
        """Pages for every request of a batch, after evicting what is short; all of them or none."""
        size = self.shape.page_size
        prefix, target = [live.request.kv_len for live, _ in work], [end for _, end in work]
        counts = [-(-end // size) - len(live.pages) for live, end in work]
        short = sum(counts) * size - self.allocator.available_size()
        if short > 0:
            self.evict(short)
        pages = self.world.alloc(sum(counts))
        last = [
            self._slots(live.pages)[start - 1] if start else -1 for (live, _), start in zip(work, prefix, strict=True)
        ]
        got = self._alloc(how, prefix, target, last, sum(counts))
        if pages is None:
            same(got, None, "pages that are not there")
            return False
        slots = three_part_extend(prefix, target, last, pages, size)
        same(got, pages if how < 2 else slots, "pages or slots taken, way", how)
        for (live, _), count in zip(work, counts, strict=True):
            fresh, pages = pages[:count], pages[count:]
            self.table.write_pages(live.row, len(live.pages), np.array(fresh, np.int32))
            live.pages = live.pages + fresh
            live.request.num_pages = len(live.pages)
        return True

    def _alloc(self, how: int, prefix: list[int], target: list[int], last: list[int], n: int) -> list[int] | None:
        if how == 0:
            got = self.allocator.alloc_pages(n)
        elif how == 1:
            got = self.allocator.extend_pages(prefix, target)
        elif how == 2:
            got = self.allocator.alloc_extend(prefix, target, last, sum(target) - sum(prefix))
        else:
            got = self.allocator.alloc_decode(target, last)
        return None if got is None else got.tolist()

    def _share(self, live: Live) -> None:
        self.cache.cache_unfinished_req(live.request)
        if self.shape.disable:
            return
        path = self._adopt(live, live.request.kv_len)
        self.world.lock(path)
        self.world.unlock(live.lock)
        live.lock = path

    def _adopt(self, live: Live, computed: int) -> list[Entry]:
        """What the whole pages of the `computed` tokens of a request become."""
        whole = computed // self.shape.page_size
        tokens = live.tokens[: whole * self.shape.page_size]
        path, spare = self.world.insert(live.space, tokens, live.pages[:whole], len(live.lock), live.request.priority)
        if spare:
            self.world.release(spare, PRIVATE)
        live.pages[:whole] = [entry.page for entry in path]
        return path

    def _end(self, live: Live) -> None:
        computed = live.request.kv_len
        self.cache.cache_finished_req(live.request)
        whole = 0
        if not self.shape.disable:
            whole = len(self._adopt(live, computed))
        if live.pages[whole:]:
            self.world.release(live.pages[whole:], PRIVATE)
        self.world.rows.append(live.row)
        self.world.unlock(live.lock)
        live.pages, live.lock, live.row = [], [], -1
        same((live.request.req_pool_idx, live.request.lock, live.request.num_pages), (None, None, 0), "a request's end")

    def _refuses(self, error: type[CacheError], call: Callable[[], object]) -> None:
        try:
            call()
        except error:
            return
        raise AssertionError(f"{error.__name__} was to be raised")

    def _name(self, space: bytes, key: RadixKey) -> bytes:
        self.names[key.namespace] = space
        return key.namespace

    def _slots(self, pages: Sequence[int]) -> list[int]:
        size = self.shape.page_size
        return [page * size + k for page in pages for k in range(size)]

    def _slot_array(self, pages: Sequence[int]) -> np.ndarray:
        return np.array(self._slots(pages), np.int32)

    def _pages(self, slots: np.ndarray) -> list[int]:
        pages = (slots // self.shape.page_size).tolist()
        return pages if self.shape.page_size == 1 else sorted(set(pages))

    # Comparing.

    def check(self) -> None:
        """The books, after every operation: one owner a page and the right one, the free list, all sizes, all rows."""
        world, size = self.world, self.shape.page_size
        if self.allocator.states.tobytes() != world.owner:
            same(self.allocator.states.tolist(), list(world.owner), "owners")
        same(self.allocator.free_pages.tolist(), world.free, "free list")
        same(self.allocator.available_size(), (len(world.free) + len(world.pending)) * size, "available")
        same(self.cache.evictable_size(), world.evictable * size, "evictable")
        same(self.cache.protected_size(), world.protected * size, "protected")
        same(self.table.available_size(), len(world.rows), "free rows")
        table = self.table.pages
        for live in self.running:
            same(table[live.row, : len(live.pages)].tolist(), live.pages, "row", live.row)
            same(live.request.protected_len, len(live.lock) * size, "tokens a request has locked")

    def check_all(self) -> None:
        """And the tree: well formed, cached what the oracle caches, locked and ordered as it says; and the events."""
        self.check()
        for problem in problems(self.cache.tree):
            raise AssertionError(f"{problem}\n{self.cache.draw()}")
        self._check_owners()
        self._check_tree()
        self._check_events()

    def _check_owners(self) -> None:
        world = self.world
        same(sorted(entry.page for entry in world.cached.values()), self._owned_by(TREE), "pages of the tree")
        private = [page for live in self.running for page in live.pages[len(live.lock) :]]
        same(sorted(private), self._owned_by(PRIVATE), "pages of requests")
        taken = [live.row for live in self.running]
        same(sorted(world.rows + taken), list(range(self.shape.num_rows)), "rows")

    def _owned_by(self, owner: int) -> list[int]:
        return [page for page, has in enumerate(self.world.owner) if has == owner]

    def _check_tree(self) -> None:
        size, world = self.shape.page_size, self.world
        tree = self.cache.tree
        ends: dict[object, Entry] = {}
        todo = [(child, root.namespace, b"") for root in tree.roots.values() for child in root.children.values()]
        while todo:
            node, space, before = todo.pop()
            prefix = before + np.frombuffer(node.key, "<i4").astype(np.uint8).tobytes()
            entry = world.cached.get((space, prefix))
            if entry is None or not entry.is_end:
                raise AssertionError(f"{node} ends where the oracle has no mark\n{self.cache.draw()}")
            run = world.run_of(entry)
            same(node.value.tolist(), [e.page for e in run], "pages of", node)  # type: ignore[union-attr]
            same(len(prefix) - len(before), len(run) * size, "length of", node)
            same({node.locks}, {e.locks for e in run}, "locks of", node)
            same({node.priority}, {e.priority for e in run}, "priority of", node)
            ends[node] = entry
            todo += [(child, space, prefix) for child in node.children.values()]
        same(len(ends), sum(entry.is_end for entry in world.cached.values()), "nodes")
        if self.shape.policy is Policy.LRU:
            real = [ends[node] for node in tree.policies[0]]
            same(real, list(world.order()), "order of eviction")

    def _check_events(self) -> None:
        """A consumer of the events knows exactly the pages that are cached, whatever the nodes were."""
        for event in self.cache.take_events():
            if isinstance(event, BlockStored):
                assert event.parent_block_hash is None or event.parent_block_hash in self.resident
                assert not self.resident.intersection(event.block_hashes)
                same(len(event.token_ids), event.block_size * len(event.block_hashes), "tokens of an event")
                self.resident.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                assert self.resident.issuperset(event.block_hashes)
                self.resident.difference_update(event.block_hashes)
            else:
                assert isinstance(event, AllBlocksCleared)
                self.resident.clear()
        if self.shape.events:
            same(self.resident, {self._block_name(entry) for entry in self.world.cached.values()}, "resident blocks")

    def _block_name(self, entry: Entry) -> int:
        seed = namespace_seed(Namespace(extra_key=self.names[entry.space] or None).encode())
        tokens = np.frombuffer(entry.prefix, np.uint8).astype("<i4").tobytes()
        return block_name(page_hashes(tokens, 4 * self.shape.page_size, seed)[-1])

    def wind_down(self) -> None:
        """Ends everything: what is left is the tree's, nothing is locked, and evicting it frees every page."""
        while self.running:
            self.finish(0)
        while self.held:
            self.unlock(0)
        while self.world.depth:
            self.allocator.free_group_end()
            self.world.group(-1)
        self.check_all()
        same(self.cache.protected_size(), 0, "protected at the end")
        self.evict(self.allocator.size)
        self.check_all()
        same(self.allocator.available_size(), self.allocator.size, "available at the end")
        same(self.cache.tree.roots, {}, "roots at the end")
