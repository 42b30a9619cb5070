"""RadixCache: a prefix cache that is driven by requests.

    admit      match_prefix, inc_lock_ref             the request's prefix is the tree's, and locked
    run        cache_unfinished_req                   what it computed is shared, and locked for it
               drop_out_of_window                     what no later token attends to is freed
    finish     cache_finished_req                     all of it is shared; the request owns nothing

`PrefixCache` does the sharing; this file knows what a request owns in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxcache.arguments import require_kind
from jaxcache.caches.base import BasePrefixCache, MatchResult
from jaxcache.caches.prefix import PrefixCache
from jaxcache.components.base import MemoryComponent, TreeComponent
from jaxcache.components.full import FullPages
from jaxcache.errors import ArgumentError, BrokenInvariantError
from jaxcache.guard import Told, exclusive
from jaxcache.index.key import RadixKey
from jaxcache.index.node import Insertion
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.request import Request
from jaxcache.tables.request_table import ReqToTokenPool


class RadixCache(PrefixCache, BasePrefixCache):
    """Prefix cache for full attention; with further components, for models whose layers keep other things too.

    Args:
      req_to_token_pool: The request table. None for a cache that sees no requests (insert, match, evict, lock only).
      token_to_kv_pool_allocator: Owner of the pages. None for tests and simulations: nothing is checked or freed.
      page_size: Tokens a page; must be the allocator's.
      disable: Share nothing: every lookup misses, finished requests free their pages.
      enable_kv_cache_events: Keep page hashes and queue events for `take_events`.
      policy: Eviction order, the same for every component.
      is_eagle: Keys are pairs of neighbouring tokens, as the KV of an EAGLE draft model depends on both. The pair of a
        request's last token is not known, so its KV stays private.
      full: The component of the full pages; by default one over the allocator.
      components: What else the tree holds, such as window pages (`SWARadixCache`) or states (`MambaRadixCache`).
      followers: What follows the full pages wherever they go.

    Attributes:
      full, components, tree, events, observer, guard: See `PrefixCache`; for threads, too.

    Raises:
      ArgumentError: The page sizes of cache, allocator and table differ.

    Source: SGLang 0.5.2 radix_cache.py; behaviour of each method as there, without its sharp edges.
    """

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool = False,
        enable_kv_cache_events: bool = False,
        policy: Policy = Policy.LRU,
        is_eagle: bool = False,
        *,
        full: FullPages | None = None,
        components: Sequence[TreeComponent] = (),
        followers: Sequence[MemoryComponent] = (),
    ):
        for name, part in (("req_to_token_pool", req_to_token_pool), ("allocator", token_to_kv_pool_allocator)):
            if part is not None and part.page_size != page_size:
                raise ArgumentError(
                    f"page_size is {page_size}, but that of {name} is {part.page_size}: use one for all"
                )
        super().__init__(
            FullPages(token_to_kv_pool_allocator) if full is None else full,
            page_size,
            components=components,
            followers=followers,
            disable=disable,
            enable_kv_cache_events=enable_kv_cache_events,
            policy=policy,
            is_eagle=is_eagle,
        )
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator
        self._windows = tuple(part for part in self._further if part.component.spans)
        self._checkpointed = tuple(part for part in self._further if not part.component.spans)

    @exclusive
    def cache_unfinished_req(self, req: Request, chunked: bool = False) -> None:
        """Shares what a running request has computed, up to its last whole page or checkpoint, and locks it for it.

        Pages another request cached first are freed and the row points at the tree's instead. What comes after stays
        the request's own. Afterwards `req.lock` covers all that is shared; where the cache keeps states and the request
        has taken no checkpoint since, nothing changes.

        Args:
          req: Running; `req.kv_len` tokens are computed.
          chunked: Accepted for SGLang's callers; a chunk is treated like any other stop.
        """
        inserted = self._share(req)
        if inserted is None:
            return
        for component in self._checkpointed:
            component.release_checkpoint(_row_of(req))
        self._exchange_lock(req, self.tree.lock(inserted))

    @exclusive
    def cache_finished_req(self, req: Request) -> None:
        """Shares what a request computed, frees the rest of its pages and its row, and releases its lock.

        Where the cache keeps states, what is shared ends at its checkpoint and, if the request ends where a page does,
        at its end. Afterwards the request owns nothing; what it computed is evictable unless others lock it.
        """
        table, _ = self._parts()
        row = _row_of(req)
        for component in self._checkpointed:
            self.cache_unfinished_req(req)
            component.checkpoint_working(row, req.kv_len)
        inserted = self._share(req)
        shared = req.protected_len if inserted is None else inserted.length
        own_pages = table.row_pages(row, shared // self.page_size, req.num_pages)
        for component in self.components:
            component.release_request(row, own_pages)
        table.free(row)
        req.leave()
        if req.lock is not None:
            self.tree.unlock(req.lock)
            req.lock = None

    def key_of(self, req: Request, length: int) -> RadixKey:
        """The first `length` tokens of a request as the tree has them: as pairs, where it keeps those."""
        require_kind("req", req, Request)
        return self._as_key(req.key[:length])

    # ---- what others compute while a request runs ------------------------------------------------------------------

    @exclusive
    def longer_prefix(self, req: Request) -> MatchResult | None:
        """What is cached by now of a running request, if that is more than it has computed; else None.

        It leaves a token to compute. Counts as a use only if there is something. Cost: a lookup.
        """
        require_kind("req", req, Request)
        limit = req.matchable_len
        if self.disable or limit // self.page_size * self.page_size <= req.kv_len:
            return None
        if self.tree.find(self.key_of(req, limit))[2] <= req.kv_len:
            return None
        return self.match_prefix(req.key[:limit])

    @exclusive
    def resume_from(self, req: Request, found: MatchResult, lock: Receipt) -> None:
        """A running request resumes from a longer cached prefix: its own pages so far are freed.

        Args:
          req: Running, without pages for a step that has not run.
          found: Longer than what it has computed.
          lock: On that; the request's from now on.
        """
        table, allocator = self._parts()
        row, first = _row_of(req), req.protected_len // self.page_size
        allocator.release(table.row_pages(row, first, req.num_pages).copy(), PageState.PRIVATE)
        table.write_pages(row, first, found.pages[first:])
        self._count_found(req, found.prefix_len - req.kv_len)
        req.kv_len, req.num_pages = found.prefix_len, len(found.pages)
        req.branching_len = found.mamba_branching_seqlen or 0
        self._exchange_lock(req, lock)
        for component in self.components:
            component.restart_request(row, found.state)

    @exclusive
    def lock_taken(self, req: Request, length: int) -> None:
        """A step ran in which a request read pages that it computed for another one, which are the tree's by now.

        Args:
          req: Running; the row has the pages that the step read.
          length: Tokens in front of those that the request itself computed: whole pages.

        Raises:
          BrokenInvariantError: They are not the tree's.
        """
        require_kind("req", req, Request)
        table, _ = self._parts()
        first = req.protected_len // self.page_size
        found = self.tree.match(self._as_key(req.computed_key)[:length])
        if found.length != length:
            raise BrokenInvariantError(f"request {req.rid}: {found.length} of {length} planned tokens are the tree's")
        table.write_pages(_row_of(req), first, found.pages[first:])
        self._count_found(req, length - req.protected_len)
        self._exchange_lock(req, self.tree.lock(found))

    def _count_found(self, req: Request, tokens: int) -> None:
        is_hit = req.count_found(tokens)
        if self.observer is not None:
            with Told(self.observer):
                if is_hit:
                    self.observer.admitted(0, tokens)
                else:
                    self.observer.resumed(tokens, 0)

    def _exchange_lock(self, req: Request, lock: Receipt) -> None:
        old, req.lock = req.lock, lock
        if old is not None:
            self.tree.unlock(old)

    @exclusive
    def drop_out_of_window(self, req: Request, keep_checkpoint: bool = True) -> None:
        """Frees the window pages of a running request that no later token attends to, and no later stop needs.

        Its own are free then. Those in the tree that it locks become evictable.

        Args:
          req: Running.
          keep_checkpoint: Keep the windows before its checkpoint, without which that is of no use. Otherwise a
            checkpoint that keeps any is freed too.

        Cost: O(nodes it locks in its window).
        """
        if not self._windows:
            return
        require_kind("req", req, Request)
        stop = max(req.kv_len - self.is_eagle, 0) // self.page_size * self.page_size
        for component in self._checkpointed:
            stop = component.keep_stop(_row_of(req), stop, keep_checkpoint)
        if req.lock is not None:
            self.tree.narrow(req.lock, stop)
        reach = max(component.component.reach for component in self._windows)
        if stop > reach:
            self._trim_before(req, int(stop - reach))

    def _trim_before(self, req: Request, length: int) -> None:
        """Frees the window pages of the request's own that lie within its first `length` tokens."""
        first = max(req.protected_len, req.evicted_seqlen_local) // self.page_size
        last = length // self.page_size
        if first < last:
            table, _ = self._parts()
            for component in self._windows:
                component.trim(table.row_pages(_row_of(req), first, last))
            req.evicted_seqlen_local = last * self.page_size

    def _share(self, req: Request) -> Insertion | None:
        """Offers to the tree what `req` computed, as far as it can be stopped at, and settles who owns which page.

        Returns:
          What the tree did; None if there is nothing to offer.
        """
        table, allocator = self._parts()
        row = _row_of(req)
        size = self.page_size
        if self.disable:
            return None
        key = self._as_key(req.computed_key)
        length, values = key.length, []
        for component in self._further:
            value, length = component.shareable(row, length)
            values.append(value)
        if not req.protected_len <= length <= key.length:
            return None
        pages = table.row_pages(row, 0, length // size)
        inserted = self._insert(key[:length], pages, values, req.lock, req.priority)
        duplicates = inserted.spare[0]
        if len(duplicates):
            allocator.release(duplicates.copy(), PageState.PRIVATE)
            table.write_pages(row, inserted.present // size - len(duplicates), inserted.kept)
        return inserted

    def _parts(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        if self.req_to_token_pool is None or self.token_to_kv_pool_allocator is None:
            raise ArgumentError("req: this cache was built without a request table or allocator; it takes no requests")
        return self.req_to_token_pool, self.token_to_kv_pool_allocator


def _row_of(req: Request) -> int:
    require_kind("req", req, Request)
    if req.req_pool_idx is None:
        raise ArgumentError(f"request {req.rid} has no row in the request table: it is {req.state.value}")
    return req.req_pool_idx
