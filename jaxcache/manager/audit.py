"""An exact audit: every value of every component, and every row, has exactly one owner, by identity, not by count.

Source: SGLang 0.5.2 scheduler, check_memory, which compares counts when idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.components.base import MemoryComponent
from jaxcache.device.placing import on_host
from jaxcache.errors import BrokenInvariantError
from jaxcache.index.media import marks_of
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pools.stack import MemoryPool
from jaxcache.request import Request
from jaxcache.tables.device_table import RequestTable
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


_NO_PAGES = np.empty(0, np.int32)


def check_owners(
    running: Mapping[int, Request],
    table: ReqToTokenPool,
    components: Sequence[MemoryComponent],
    planned: Int32[np.ndarray, " pages"] = _NO_PAGES,
) -> None:
    """What is private is exactly what running requests own; locked prefixes are the tree's; rows are running or free.

    Args:
      running: Running requests by row.
      table: The request table.
      components: Of the cache.
      planned: Pages that several requests of a plan have.

    Raises:
      BrokenInvariantError: names what has no owner, or two.
    """
    private = [np.empty(0, np.int32)]
    for row, request in running.items():
        if request.req_pool_idx != row:
            raise BrokenInvariantError(f"row {row} is that of request {request.rid}, which has {request.req_pool_idx}")
        if request.lock is None:
            raise BrokenInvariantError(f"row {row} of request {request.rid}: it runs without a lock")
        if request.kv_len > request.num_pages * table.page_size:
            held = f"{request.num_pages} pages hold {request.kv_len} tokens"
            raise BrokenInvariantError(f"row {row} of request {request.rid}: {held}")
        pages = table.row_pages(row, 0, request.num_pages)
        private.append(pages[request.protected_len // table.page_size :])
        _check_shared(request, pages[: request.protected_len // table.page_size])
    owned = np.concatenate(private)
    owned = owned[~np.isin(owned, planned)]
    for component in components:
        for problem in component.private_problems(owned):
            raise BrokenInvariantError(problem)
    if sorted([*running, *table.free_rows]) != list(range(table.size)):
        raise BrokenInvariantError(f"rows: {sorted(running)} are running, {sorted(table.free_rows)} are free")


def check_planned(planned: Int32[np.ndarray, " pages"], allocator: BaseTokenToKVPoolAllocator) -> None:
    """The pages that several requests of a plan have are exactly those that the allocator says.

    Raises:
      BrokenInvariantError: names some that are not.
    """
    odd = np.setxor1d(planned, np.flatnonzero(allocator.states == PageState.PLANNED))
    if len(odd) or len(set(planned.tolist())) != len(planned):
        raise BrokenInvariantError(f"planned pages: plans share {planned}, the allocator says otherwise of {odd[:5]}")


def check_readable(
    running: Mapping[int, Request], table: ReqToTokenPool, components: Sequence[MemoryComponent]
) -> None:
    """The next token of each running request finds all that it attends to, in every component.

    Args:
      running: Running requests by row.
      table: The request table.
      components: Of the cache.

    Raises:
      BrokenInvariantError: names the request and what is gone.
    """
    for row, request in running.items():
        pages = table.row_pages(row, 0, -(-request.kv_len // table.page_size))
        for component in components:
            for problem in component.read_problems(row, pages, request.kv_len):
                raise BrokenInvariantError(f"row {row} of request {request.rid}: {problem}")


def _check_shared(request: Request, pages: np.ndarray) -> None:
    """The part of a row that its lock covers must be the tree's pages for the request's own tokens."""
    values: list[np.ndarray] = [np.empty(0, np.int32)]
    keys: list[bytes] = []
    key = request.key
    if request.lock is not None and request.lock.tree.element_bytes != key.element_bytes:
        key = key.bigrams()
    node = request.lock.node if request.lock is not None else None
    media: dict[int, bytes] = {}
    while node is not None and node.parent is not None:
        values.insert(1, node.value)
        keys.insert(0, node.key)
        if node.media:
            media[node.start] = node.media
        node = node.parent
    is_same = np.array_equal(np.concatenate(values), pages)
    if request.lock is not None:
        marks = marks_of(key.media, request.lock.tree.page_size)
        is_same = is_same and media == {at: mark for at, mark in marks.items() if at < request.protected_len}
    if not is_same or b"".join(keys) != key.packed[: key.element_bytes * request.protected_len]:
        raise BrokenInvariantError(
            f"row {request.req_pool_idx} of request {request.rid}: "
            f"its first {request.protected_len} tokens are not the tree's pages"
        )


def check_device_table(running: Mapping[int, Request], table: ReqToTokenPool, device_table: RequestTable) -> None:
    """The rows of running requests are the same on the device. Reads the device table back.

    Raises:
      BrokenInvariantError: names the row that differs.
    """
    device = on_host(device_table.pages)
    for row, request in running.items():
        if not np.array_equal(device[row, : request.num_pages], table.row_pages(row, 0, request.num_pages)):
            raise BrokenInvariantError(f"row {row} of request {request.rid}: the device table differs from the host's")


def check_device_maps(pool: MemoryPool, components: Sequence[MemoryComponent]) -> None:
    """The maps of all components are the same on the device. Reads them back.

    Raises:
      BrokenInvariantError: names an entry that differs.
    """
    for component in components:
        for problem in component.device_problems(pool):
            raise BrokenInvariantError(problem)
