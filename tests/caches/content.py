"""What is in every slot: requests run over fake stores, and all that a cache says is there is read back.

    full     store[slot]   what a full-attention layer writes for a token: a hash of all tokens up to it
    window   store[slot]   the same, in the window's own slots
    state    store[state]  a hash of all tokens that a linear-attention layer has read so far

A page that is freed is wiped. So a page freed too early, shared too far, moved to the wrong place, or a state at the
wrong position is a wrong number, in the tree or in front of a running request, after the very operation that did it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcache.caches.mamba_radix import MambaRadixCache
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.errors import LockedError
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.index.slots import expand_pages
from jaxcache.manager.audit import check_owners
from jaxcache.pages.allocator import PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.request import Request, RequestState
from jaxcache.tables.hybrid_table import HybridReqToTokenPool
from jaxcache.tables.request_table import ReqToTokenPool

MOD = (1 << 61) - 1
WIPED = -1
UNKNOWN = -2
MAX_CONTEXT = 256


def prefix_hashes(namespace: bytes, tokens: list[int]) -> list[int]:
    """`hashes[n]` stands for the first `n` tokens in the namespace of that encoding."""
    value = (1 + int.from_bytes(namespace, "little")) % MOD
    hashes = [value]
    for token in tokens:
        value = (value * 1_000_003 + token + 7) % MOD
        hashes.append(value)
    return hashes


@dataclass(frozen=True)
class Shape:
    """Of one life: which layers the model has, and how large its memory is."""

    page_size: int = 1
    window: float | None = None
    has_states: bool = False
    is_eagle: bool = False
    num_pages: int = 24
    num_windows: int = 16
    num_states: int = 8
    num_rows: int = 3
    policy: Policy = Policy.LRU
    disable: bool = False


def make_cache(shape: Shape) -> RadixCache:
    """The cache of a model with such layers."""
    size, page = shape.num_pages * shape.page_size, shape.page_size
    if shape.window is not None:
        allocator: Any = SWATokenToKVPoolAllocator(size, shape.num_windows * page, page)
    else:
        allocator = TokenToKVPoolAllocator(size) if page == 1 else PagedTokenToKVPoolAllocator(size, page)
    options: Any = dict(disable=shape.disable, policy=shape.policy, is_eagle=shape.is_eagle)
    if shape.has_states:
        table = HybridReqToTokenPool(shape.num_rows, MAX_CONTEXT, page)
        return MambaRadixCache(table, allocator, StateAllocator(shape.num_states), page, shape.window, **options)
    table = ReqToTokenPool(shape.num_rows, MAX_CONTEXT, page)
    if shape.window is not None:
        return SWARadixCache(table, allocator, shape.window, page, **options)
    return RadixCache(table, allocator, page, **options)


class ContentLife:
    """Requests of a model with such layers, and what is in its memory."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.cache = make_cache(shape)
        self.allocator: Any = self.cache.token_to_kv_pool_allocator
        self.table: Any = self.cache.req_to_token_pool
        self.states: Any = self.cache.state_allocator if isinstance(self.cache, MambaRadixCache) else None
        page = shape.page_size
        self.full = np.full((shape.num_pages + 1) * page, WIPED, np.int64)
        self.windows = np.full((shape.num_windows + 1) * page, WIPED, np.int64)
        self.state_store = np.full(shape.num_states + 1, WIPED, np.int64)
        self.running: list[Request] = []
        self.retracted: list[Request] = []
        self.locks: list[Any] = []
        self.count = 0
        self.hit_tokens = 0

    # ---- the life of a request -----------------------------------------------------------------------------------

    def admit(self, tokens: bytes, space: bytes = b"") -> bool:
        """A new request; False if it cannot run now."""
        self.count += 1
        return self._admit(Request(f"r{self.count}", list(tokens), space or None))

    def resume(self, pick: int) -> bool:
        if not self.retracted:
            return False
        request = self.retracted.pop(pick % len(self.retracted))
        if self._admit(request):
            return True
        self.retracted.append(request)
        return False

    def _admit(self, request: Request) -> bool:
        if not self.table.available_size() or request.num_tokens > self.longest:
            return False
        found = self.cache.match_prefix(request.key[: request.num_tokens - 1])
        self.check_match(request.key, found)
        lock = self.cache.inc_lock_ref(found)
        if self.states is not None and not self.cache.make_room(0, 1):
            self.cache.dec_lock_ref(lock)
            return False
        (row,) = self.table.alloc(1)
        request.enter(self.table, row)
        self.table.write_pages(row, 0, found.pages)
        request.kv_len, request.num_pages = found.prefix_len, len(found.pages)
        request.lock, request.state = lock, RequestState.RUNNING
        if self.states is not None:
            self.table.set_state(row, self.states.alloc_track_slot(), found.state)
        self.hit_tokens += found.prefix_len
        self.running.append(request)
        return True

    @property
    def longest(self) -> int:
        return min(MAX_CONTEXT, (self.shape.num_pages - 1) * self.shape.page_size)

    def compute(self, pick: int, count: int, token: int, save: bool, share: bool, drop: bool) -> bool:
        """A step of one request: `count` more tokens, sampled ones behind its prompt; then perhaps the bookkeeping.

        What it is about to read is read first: all full rows, the last window, the state.
        """
        if not self.running:
            return False
        request = self.running[pick % len(self.running)]
        count = min(count, self.longest - request.kv_len)
        while request.num_tokens < request.kv_len + count:
            request.output_ids.append(token)
        pages = -(-(request.kv_len + count) // self.shape.page_size) - request.num_pages
        if count <= 0 or not self.cache.make_room(pages):
            return False
        fresh = self.allocator.alloc_pages(pages)
        self.table.write_pages(request.req_pool_idx, request.num_pages, fresh)
        request.num_pages += pages
        self.write(request, count)
        if save and self.states is not None:
            self.save(request)
        if share:
            self.cache.cache_unfinished_req(request)
        if drop:
            self.cache.drop_out_of_window(request)
        return True

    def write(self, request: Request, count: int) -> None:
        self.check_readable(request)
        start, stop, row = request.kv_len, request.kv_len + count, request.req_pool_idx
        if self.shape.is_eagle and start > request.protected_len:
            start -= 1  # the draft model learns what comes after its last token only now
        slots = self.slots(request)[start:stop]
        own = self.allocator.owner_of(slots // self.shape.page_size) == PageState.PRIVATE
        assert own.all(), "a request writes where it is not alone"
        values = self.contents(request.key, stop)[start:stop]
        self.full[slots] = values
        if self.shape.window is not None:
            windows = self.allocator.translate_loc_from_full_to_swa(slots)
            assert (windows > 0).all(), "a token that is written has no window slot"
            self.windows[windows] = values
        if self.states is not None:
            hashes = prefix_hashes(request.key.namespace, list(request.key))
            for source, target in zip(*self.table.state_copies([row]), strict=True):
                self.state_store[target] = self.state_store[source] if source else hashes[0]
            self.table.copied([row])
            working = self.table.state[row]
            assert self.state_store[working] == hashes[request.kv_len], "the working state is of another prefix"
            self.state_store[working] = hashes[stop]
        request.kv_len = stop

    def save(self, request: Request) -> None:
        """A snapshot of the working state, where a page ends and there is room."""
        row = request.req_pool_idx
        if request.kv_len % self.shape.page_size or self.table.saved[row] or not self.cache.make_room(0, 1):
            return
        state = self.states.alloc_track_slot()
        self.state_store[state] = self.state_store[self.table.state[row]]
        self.table.set_saved(row, state, request.kv_len)

    def share(self, pick: int) -> None:
        if self.running:
            self.cache.cache_unfinished_req(self.running[pick % len(self.running)])

    def finish(self, pick: int, retract: bool = False) -> None:
        if not self.running:
            return
        request = self.running.pop(pick % len(self.running))
        self.cache.cache_finished_req(request)
        if retract:
            request.state = RequestState.RETRACTED
            self.retracted.append(request)

    # ---- without requests ----------------------------------------------------------------------------------------

    def match(self, tokens: bytes, space: bytes, keep: bool) -> None:
        key = RadixKey(list(tokens), space or None)
        found = self.cache.match_prefix(key)
        self.check_match(key, found)
        if keep:
            self.locks.append(self.cache.inc_lock_ref(found))

    def unlock(self, pick: int) -> None:
        if self.locks:
            self.cache.dec_lock_ref(self.locks.pop(pick % len(self.locks)))

    def insert(self, tokens: bytes, space: bytes, without_window: int = 0) -> None:
        """Somebody caches tokens without being a request."""
        page = self.shape.page_size
        key = RadixKey(list(tokens), space or None)
        length = max(len(tokens) - self.shape.is_eagle, 0) // page * page
        pages = length // page
        without_window = min(without_window, max(pages - 1, 0)) if self.shape.window is not None else 0
        states = int(self.states is not None)
        if not length or self.shape.disable or not self.cache.make_room(pages, states, without_window=without_window):
            return
        fresh = self.allocator.alloc_pages(*([pages, without_window] if without_window else [pages]))
        slots = expand_pages(fresh, page)
        self.full[slots] = self.contents(key, length)
        if self.shape.window is not None:
            windows = self.allocator.translate_loc_from_full_to_swa(slots)
            self.windows[windows] = np.where(windows > 0, self.full[slots], WIPED)
        state = 0
        if states:
            state = self.states.alloc_track_slot()
            self.state_store[state] = prefix_hashes(key.namespace, list(key))[length]
        cut = key[: length + self.shape.is_eagle]
        present = self.cache.insert_pages(cut, fresh, state)
        self.allocator.release(fresh[: present // page], PageState.PRIVATE)
        if state and self.states.owner_of([state])[0] == PageState.PRIVATE:
            self.states.free_track_slot(state)

    def evict(self, pages: int, windows: int, states: int) -> None:
        """Eviction frees what it was asked for, of each kind, or all there is of it."""
        page, cache = self.shape.page_size, self.cache
        before = (cache.evictable_size(), cache.swa_evictable_size(), cache.mamba_evictable_size())
        freed = cache.evict(pages * page, windows * page, states)
        after = (cache.evictable_size(), cache.swa_evictable_size(), cache.mamba_evictable_size())
        assert freed == before[0] - after[0]
        for asked, was, left in zip((pages * page, windows * page, states), before, after, strict=True):
            assert was - left >= min(asked, was)

    def drop(self, space: bytes) -> None:
        try:
            self.cache.drop(space or None)
        except LockedError:
            return
        assert space not in self.cache.tree.roots or space == b""

    def wind_down(self) -> None:
        while self.running:
            self.finish(0)
        while self.locks:
            self.unlock(0)
        self.check()
        huge = 10**6
        self.evict(huge, huge, huge)
        self.check()
        assert not list(self.cache.tree.nodes())
        assert self.allocator.full_available_size() == self.allocator.size
        if self.shape.window is not None:
            assert self.allocator.swa_available_size() == self.allocator.size_swa
        if self.states is not None:
            assert self.states.available_size() == self.states.size

    # ---- what must be there --------------------------------------------------------------------------------------

    def contents(self, key: RadixKey, stop: int) -> np.ndarray:
        """What layers write for the first `stop` tokens of `key`; those of a draft model know the next token too."""
        hashes = prefix_hashes(key.namespace, list(key))
        written = [*hashes[2:], UNKNOWN] if self.shape.is_eagle else hashes[1:]
        return np.array(written[:stop], np.int64)

    def slots(self, request: Request) -> np.ndarray:
        pages = self.table.row_pages(request.req_pool_idx, 0, request.num_pages)
        return expand_pages(pages, self.shape.page_size)

    def check_match(self, key: RadixKey, found: Any) -> None:
        """What a lookup found is what was computed for these very tokens."""
        length, slots = found.prefix_len, found.device_indices
        expected = self.contents(key, length)
        assert self.full[slots].tolist() == expected.tolist(), "a match leads to other tokens' rows"
        self.check_window(slots, expected, length)
        if self.states is not None:
            assert bool(found.state) == bool(length)
        if found.state:
            hashes = prefix_hashes(key.namespace, list(key))
            assert self.state_store[found.state] == hashes[length], "a match leads to the state of another prefix"
        branch = found.mamba_branching_seqlen
        cached = self.cache.tree.find(found.last_device_node.key)[1]
        assert branch == (cached if cached > length else None)

    def check_window(self, slots: np.ndarray, expected: np.ndarray, end: int) -> None:
        """Of the tokens in `slots`, those in the last window before `end` are there."""
        if self.shape.window is None:
            return
        first = 0 if self.shape.window == math.inf else max(end - int(self.shape.window), 0)
        windows = self.allocator.translate_loc_from_full_to_swa(slots[first:])
        assert self.windows[windows].tolist() == expected[first:].tolist(), (
            "the last window is not that of these tokens"
        )

    def check_readable(self, request: Request) -> None:
        """All that the next step of a request reads. A draft model writes its last token again in that step."""
        length = known = request.kv_len
        if self.shape.is_eagle and length > request.protected_len:
            known -= 1
        slots, expected = self.slots(request)[:known], self.contents(request.key, known)
        assert self.full[slots].tolist() == expected.tolist(), "a request would read other rows than its own"
        self.check_window(slots, expected, length)

    def check_tree(self) -> None:
        """Everything in the tree is what was computed for the tokens it stands under."""
        page = self.shape.page_size
        for namespace, root in self.cache.tree.roots.items():
            todo = [(child, b"") for child in root.children.values()]
            while todo:
                node, before = todo.pop()
                packed = before + node.key
                todo += [(child, packed) for child in node.children.values()]
                elements = np.frombuffer(packed, "<i4").reshape(node.end, -1)
                tokens = elements[:, 0].tolist() + elements[-1, 1:].tolist()
                hashes = prefix_hashes(namespace, tokens)
                expected = hashes[1 + self.shape.is_eagle :][node.start : node.end]
                assert self.full[expand_pages(node.value, page)].tolist() == expected
                for i, component in enumerate(self.cache.tree.components):
                    value = node.slot(i).value
                    if value is not None and component.name == "window":
                        assert self.windows[expand_pages(value, page)].tolist() == expected
                    if value is not None and component.name == "state":
                        assert self.state_store[value[0]] == hashes[node.end]

    def check(self) -> None:
        """Every book balances, and everything is what it should be."""
        self.wipe()
        self.cache.check()
        running = {request.req_pool_idx: request for request in self.running}
        check_owners(running, self.table, self.cache.components)
        self.check_tree()
        for request in self.running:
            self.check_readable(request)

    def wipe(self) -> None:
        """Whatever is free holds nothing any more."""
        self._wipe(self.full, self.allocator.states, self.shape.page_size)
        if self.shape.window is not None:
            self._wipe(self.windows, self.allocator.window.states, self.shape.page_size)
        if self.states is not None:
            self._wipe(self.state_store, self.states.states, 1)

    @staticmethod
    def _wipe(store: np.ndarray, states: np.ndarray, page_size: int) -> None:
        nobodys = np.isin(states, [PageState.FREE, PageState.PENDING, PageState.SINK])
        store[np.repeat(nobodys, page_size)] = WIPED
