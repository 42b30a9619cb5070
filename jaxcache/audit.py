"""Do the books balance? Every page, window page, state and row has exactly one owner, by identity, not by count.

Source: SGLang 0.5.2 scheduler, check_memory, which compares counts when idle.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxcache.errors import BrokenInvariant
from jaxcache.pages.base import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.pages.swa import SWATokenToKVPoolAllocator
from jaxcache.pools.hybrid import HybridKVPool
from jaxcache.pools.hybrid_requests import HybridReqToTokenPool
from jaxcache.pools.requests import ReqToTokenPool, RequestTable
from jaxcache.pools.stack import MemoryPool
from jaxcache.pools.swa import SWAKVPool
from jaxcache.request import Request


def check_owners(
    running: Mapping[int, Request],
    table: ReqToTokenPool,
    allocator: BaseTokenToKVPoolAllocator,
    states: StateAllocator | None = None,
) -> None:
    """What is private is exactly what running requests own; locked prefixes are the tree's; rows are running or free.

    Args:
      running: Running requests by row.
      table: The request table.
      allocator: Owner of the pages and, where there are some, of the window pages.
      states: Owner of the states, where there are some; the table then knows whose they are.

    Raises:
      BrokenInvariant: says which book does not balance.
    """
    private = [np.empty(0, np.int32)]
    for row, request in running.items():
        pages = table.row_pages(row, 0, request.num_pages)
        private.append(pages[request.protected_len // table.page_size :])
        _check_shared(request, pages[: request.protected_len // table.page_size])
    owned = np.concatenate(private)
    _check_private("pages", owned, allocator)
    if isinstance(allocator, SWATokenToKVPoolAllocator):
        windows = allocator.window_pages(owned)
        _check_private("window pages", windows[windows > 0], allocator.window)
    if sorted([*running, *table.free_rows]) != list(range(table.size)):
        raise BrokenInvariant(f"rows: {sorted(running)} are running, {sorted(table.free_rows)} are free")
    if states is not None and isinstance(table, HybridReqToTokenPool):
        _check_private("states", table.held_states, states)
        sources = table.state_from[table.state_from > 0]
        if (states.owner_of(sources) != PageState.TREE).any():
            raise BrokenInvariant(f"states: {sources} are to be copied, but not all of them are the tree's")


def check_windows(
    running: Mapping[int, Request], table: ReqToTokenPool, allocator: SWATokenToKVPoolAllocator, window: int
) -> None:
    """The next token of each running request finds the window pages of all that it attends to; none is read as page 0.

    Args:
      running: Running requests by row.
      table: The request table.
      allocator: Owner of the window pages.
      window: Tokens that a layer attends to, the new one included.

    Raises:
      BrokenInvariant: names the request and a page.
    """
    for row, request in running.items():
        first = max(request.kv_len - (window - 1), 0) // table.page_size
        pages = table.row_pages(row, first, -(-request.kv_len // table.page_size))
        is_gone = allocator.window_pages(pages) == 0
        if is_gone.any():
            raise BrokenInvariant(
                f"row {row} of request {request.rid}: its next token, {request.kv_len}, attends to the window page of "
                f"page {pages[is_gone.argmax()]}, which is gone"
            )


def _check_private(what: str, owned: np.ndarray, allocator: BaseTokenToKVPoolAllocator) -> None:
    """`owned`, the property of requests, must be each private page of the allocator once."""
    expected = np.flatnonzero(allocator.states == PageState.PRIVATE)
    if not np.array_equal(np.sort(owned), expected):
        odd = np.setxor1d(owned, expected)[:5]
        raise BrokenInvariant(
            f"private {what}: requests own {len(owned)}, the allocator says {len(expected)}; see {odd}"
        )


def _check_shared(request: Request, pages: np.ndarray) -> None:
    """The part of a row that its lock covers must be the tree's pages for the request's own tokens."""
    values: list[np.ndarray] = [np.empty(0, np.int32)]
    keys: list[bytes] = []
    key = request.key
    if request.lock is not None and request.lock.tree.element_bytes != key.element_bytes:
        key = key.bigrams()
    node = request.lock.node if request.lock is not None else None
    while node is not None and node.parent is not None:
        values.insert(1, node.value)
        keys.insert(0, node.key)
        node = node.parent
    is_same = np.array_equal(np.concatenate(values), pages)
    if not is_same or b"".join(keys) != key.packed[: key.element_bytes * request.protected_len]:
        raise BrokenInvariant(
            f"row {request.req_pool_idx} of request {request.rid}: "
            f"its first {request.protected_len} tokens are not the tree's pages"
        )


def check_device_table(running: Mapping[int, Request], table: ReqToTokenPool, device_table: RequestTable) -> None:
    """The rows of running requests are the same on the device. Reads the device table back.

    Raises:
      BrokenInvariant: names the row that differs.
    """
    device = np.asarray(device_table.pages)
    for row, request in running.items():
        if not np.array_equal(device[row, : request.num_pages], table.row_pages(row, 0, request.num_pages)):
            raise BrokenInvariant(f"row {row} of request {request.rid}: the device table differs from the host's")


def check_device_map(pool: MemoryPool, allocator: SWATokenToKVPoolAllocator) -> None:
    """The map from full to window pages is the same on the device. Reads it back.

    Raises:
      BrokenInvariant: names a page that differs.
    """
    kv = pool.kv if isinstance(pool, HybridKVPool) else pool
    if isinstance(kv, SWAKVPool):
        differs = np.flatnonzero(np.asarray(kv.full_to_window) != allocator.full_to_window)
        if len(differs):
            raise BrokenInvariant(f"full page {differs[0]}: the device's map to window pages differs from the host's")
