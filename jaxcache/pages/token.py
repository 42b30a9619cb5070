"""Pages of one slot, recycled first in, first out.

Source: SGLang 0.5.2 allocator.py (TokenToKVPoolAllocator).
"""

from __future__ import annotations

from jaxcache.pages.allocator import FreeListAllocator
from jaxcache.pages.free_list import FreeOrder
from jaxcache.pages.sglang import CpuCopyable


class TokenToKVPoolAllocator(FreeListAllocator):
    """Allocates single slots (`page_size` 1): a page is a slot, and slots are reused in the order they were freed.

    Args:
      size: Usable slots, 1 .. `size`; slot 0 is the sink.
      kvcache: As in `BaseTokenToKVPoolAllocator`.
      need_sort: As in `BaseTokenToKVPoolAllocator`.

    >>> allocator = TokenToKVPoolAllocator(6)
    >>> allocator.alloc(4)
    array([1, 2, 3, 4], dtype=int32)
    >>> allocator.free([2, 3])
    >>> allocator.alloc(3)
    array([5, 6, 2], dtype=int32)
    >>> allocator.alloc(2) is None
    True
    """

    @property
    def free_order(self) -> FreeOrder:
        return FreeOrder.FIFO

    def __init__(self, size: int, *, kvcache: CpuCopyable | None = None, need_sort: bool = False) -> None:
        super().__init__(size, 1, kvcache=kvcache, need_sort=need_sort)
