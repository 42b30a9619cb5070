"""Caches that share nothing: a request's pages are its own and are freed when it ends."""

from __future__ import annotations

import math

from jaxcache.arguments import as_count, require_kind
from jaxcache.caches.radix import RadixCache
from jaxcache.caches.swa_radix import SWARadixCache
from jaxcache.errors import ArgumentError
from jaxcache.guard import exclusive
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.request import Request
from jaxcache.tables.request_table import ReqToTokenPool


class ChunkCache(RadixCache):
    """A prefix cache that finds nothing and keeps nothing.

    Args:
      req_to_token_pool: As for `RadixCache`.
      token_to_kv_pool_allocator: As for `RadixCache`.
      page_size: As for `RadixCache`.

    Source: SGLang 0.5.2 chunk_cache.py, ChunkCache.
    """

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
    ):
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size, disable=True)


class SWAChunkCache(SWARadixCache):
    """The same where some layers have a window, or attend within chunks of a fixed size only.

    Args:
      req_to_token_pool: As for `RadixCache`.
      token_to_kv_pool_allocator: Owner of full and window pages.
      page_size: As for `RadixCache`.
      sliding_window_size: For `drop_out_of_window`; infinite if it is chunks that limit attention (`evict_swa`).

    Source: SGLang 0.5.2 chunk_cache.py, SWAChunkCache.
    """

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: SWATokenToKVPoolAllocator,
        page_size: int,
        sliding_window_size: float = math.inf,
    ):
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, sliding_window_size, page_size, disable=True)

    @exclusive
    def evict_swa(self, req: Request, prelen: int, attention_chunk_size: int) -> None:
        """Frees the window pages of a running request before the chunk that token `prelen` is in.

        Token `prelen` and those after it attend, in local layers, no further back than the start of that chunk.

        Args:
          req: Running, with at least `prelen` tokens computed.
          prelen: Tokens computed: the prefix when a prefill starts, all but the last while it decodes.
          attention_chunk_size: Tokens a chunk. Where that is no multiple of the page size, a page that two chunks share
            is kept for the second one.

        Raises:
          ArgumentError: `prelen` is longer than what is computed, or a chunk has no tokens.
        """
        require_kind("req", req, Request)
        chunk = as_count("attention_chunk_size", attention_chunk_size)
        if not chunk or as_count("prelen", prelen) > req.kv_len:
            raise ArgumentError(
                f"evict_swa needs chunks of at least one token and prelen <= {req.kv_len}, the tokens computed, got "
                f"attention_chunk_size = {chunk}, prelen = {prelen}"
            )
        self._trim_before(req, prelen // chunk * chunk)
