"""The request table on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcache.device.pool import DevicePool
from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Integer

PENDING_TOKEN = -(2**31)
"""Stands in a plan for a token that was sampled on the device and is in the register of its row; no token is it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RequestTable(DevicePool):
    """Device twin of the request table: `pages[row, i]` holds tokens `[i * P, (i + 1) * P)` of the request in `row`.

    Attributes:
      pages: (rows, max_pages) int32.
      next_token: (rows,) int32, a register for each row: the token behind those with KV, where the step that computed
        the last of these sampled it. None for a table that has none.
    """

    pages: Int32[Array, "rows max_pages"]
    next_token: Int32[Array, " rows"] | None = None

    def patched(self, index: Int32[ArrayLike, " entries"], page: Int32[ArrayLike, " entries"]) -> RequestTable:
        """Overwrites entries by flat index; an index past the end is padding. In place where the table is donated."""
        flat = self.pages.reshape(-1).at[index].set(page, mode="drop")
        return RequestTable(flat.reshape(self.pages.shape), self.next_token)

    def known(self, tokens: Int32[Array, " tokens"], row: Int32[Array, " tokens"]) -> Int32[Array, " tokens"]:
        """The tokens, where `PENDING_TOKEN` stands for what the register of its row holds."""
        if self.next_token is None:
            return tokens
        return jnp.where(tokens == PENDING_TOKEN, self.next_token.at[row].get(mode="clip"), tokens)

    def sampled(self, row: Int32[Array, " requests"], tokens: Integer[Array, " requests"]) -> RequestTable:
        """The table, consumed, with tokens in the registers of these rows; a row past the end, of padding, has none."""
        if self.next_token is None:
            raise ArgumentError("sampled: this table has no registers: take that of a memory")
        if tokens.shape != row.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            rule = f"must be integers, one a request of the batch: {row.shape}"
            raise ArgumentError(f"sampled {rule}; got {tokens.dtype}{list(tokens.shape)}")
        return RequestTable(self.pages, self.next_token.at[row].set(tokens.astype(jnp.int32), mode="drop"))

    def slots(
        self, row: Int32[Array, "*#tokens"], position: Int32[Array, "*#tokens"], page_size: int
    ) -> Int32[Array, "*tokens"]:
        """Slot of each (row, position). Positions past a request's end give stale slots: mask them.

        A row past the end, as padding has, gives the slots of another row.
        """
        page = self.pages.at[row, position // page_size].get(mode="clip")
        return page * page_size + position % page_size

    def block_table(
        self,
        row: Int32[Array, " requests"],
        seq_len: Int32[Array, " requests"],
        page_size: int,
        context: int | None = None,
    ) -> Int32[Array, "requests pages"]:
        """The pages of some rows, those behind the last one of `seq_len` tokens being 0, the sink.

        Args:
          row: Which rows. One past the end, as padding has, must have a `seq_len` of 0.
          seq_len: Tokens of each.
          page_size: Tokens a page.
          context: Most tokens that any of them has: the table is cut to so many. By default it is not cut.

        Cost: a copy of so many rows.
        """
        width = self.pages.shape[1] if context is None else min(self.pages.shape[1], -(-context // page_size))
        pages = self.pages[:, :width].at[row].get(mode="clip")
        first = jnp.arange(width, dtype=jnp.int32) * page_size
        return jnp.where(first[None] < seq_len[:, None], pages, 0)
