"""Which allocator keeps pages of a size: those of one slot and those of many are recycled in different orders."""

from __future__ import annotations

from jaxcache.pages.allocator import FreeListAllocator
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator


def allocator_of(size: int, page_size: int, *, need_sort: bool = False) -> FreeListAllocator:
    """An allocator of `size` slots in pages of `page_size`; see `BaseTokenToKVPoolAllocator`.

    Raises:
      ArgumentError: `size` is no positive multiple of `page_size`, or slots would not fit int32.
    """
    if page_size == 1:
        return TokenToKVPoolAllocator(size, need_sort=need_sort)
    return PagedTokenToKVPoolAllocator(size, page_size, need_sort=need_sort)
