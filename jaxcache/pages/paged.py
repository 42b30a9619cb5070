"""Pages of many slots, recycled last in, first out.

Source: SGLang 0.5.2 allocator.py (PagedTokenToKVPoolAllocator).
"""

from __future__ import annotations

from jaxcache.pages.allocator import FreeListAllocator
from jaxcache.pages.free_list import FreeOrder


class PagedTokenToKVPoolAllocator(FreeListAllocator):
    """Allocates whole pages of `page_size` slots: what was freed last is reused first, ascending inside one call.

    The arguments are those of `BaseTokenToKVPoolAllocator`.

    >>> allocator = PagedTokenToKVPoolAllocator(36, 4)
    >>> allocator.alloc_extend(prefix_lens=[0, 0], seq_lens=[5, 3], last_loc=[-1, -1], extend_num_tokens=8)
    array([ 4,  5,  6,  7,  8, 12, 13, 14], dtype=int32)
    >>> allocator.alloc_decode(seq_lens=[6, 4], last_loc=[8, 14])
    array([ 9, 15], dtype=int32)
    >>> allocator.free([12, 5])
    >>> allocator.free_pages
    array([1, 3, 4, 5, 6, 7, 8, 9], dtype=int32)
    """

    @property
    def free_order(self) -> FreeOrder:
        return FreeOrder.LIFO


AscendPagedTokenToKVPoolAllocator = PagedTokenToKVPoolAllocator
"""SGLang's allocator without a kernel. No allocator here has one: the host decides, for whatever device."""
