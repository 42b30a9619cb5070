"""A batch of sequences in a memory manager that torch grows: what of them is cached, and which slot has which token.

Torch models see a batch as a rectangle. Padding on the left lets all sequences end in the same column:

    column      0   1   2   3   4   5 ...
    sequence 0  -   -   a   b   c   d        -: padding; its slot is 0, the sink
    sequence 1  e   f   g   h   i   j
                            |<- reused: so many columns need not be computed; a column is if any sequence lacks it

The requests are the manager's own, so what they need is evicted, audited and shared as for any engine's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jaxcache.errors import ArgumentError, CacheError, UnsupportedError
from jaxcache.index.key import Namespace, RadixKey
from jaxcache.manager.manager import MemoryManager
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.request import Request
from jaxcache.slots import pages_of
from torch_bridge.slots import slots_to_torch


class ShortageError(CacheError):
    """Memory is short, amid a call of another framework, which has no None to return."""


class Sequences:
    """The running requests of a batch. Make one; `grow` it with each forward pass and `confirm` that; `close` it.

    Args:
      memory: Where they live. Without recurrent states.
      device: Of the pool: where slots are wanted.
      tokens: `(batch, columns)` prompts.
      is_token: bool, likewise; False for padding, which comes first.
      extra_key: Namespace of the prompts.
      reuse: Whether columns that are cached need not be computed. Without it they all are.

    Attributes:
      prompt: As `tokens`.
      padding: int64 `(batch,)`, columns of padding of each sequence.
      reused: Columns whose KV is there already; less than all.
      length: Columns that have slots.
      confirmed: Columns whose KV is known to be that of tokens. Only these can stay.
      slots: int64 `(batch, length)`, on the device: where the KV of each token is; 0 for padding.
      fresh: int64 `(batch, n)`, on the device: where the KV of the columns of the last `grow` is to be written; 0, for
        nowhere, also where a sequence has it cached, as that is others' to read.
      window_slots: The same as `slots`, of the last columns, for the layers with windows: those of the last `grow` and
        what they attend to. Nothing in a memory without such layers.

    Raises:
      ArgumentError: The prompts are no such rectangle, or there are more or longer ones than fit.
      UnsupportedError: The model has recurrent states, which torch does not see.
      ShortageError: Other requests hold all rows. Nothing has changed.
    """

    def __init__(
        self,
        memory: MemoryManager,
        device: torch.device,
        tokens: np.ndarray,
        is_token: np.ndarray,
        extra_key: str | bytes | Namespace | None = None,
        reuse: bool = True,
    ):
        _require_prompts(memory, tokens, is_token)
        self._memory, self._device = memory, device
        self._windows = [memory.allocator] if isinstance(memory.allocator, SWATokenToKVPoolAllocator) else []
        self.padding = tokens.shape[1] - is_token.sum(axis=1)
        self.prompt = tokens
        keys = [RadixKey(row[padding:], extra_key) for row, padding in zip(tokens, self.padding, strict=True)]
        self._requests = [
            Request(f"sequence {i} of a batch", row[padding:], extra_key, logprob_start_len=limit)
            for i, (row, padding, limit) in enumerate(zip(tokens, self.padding, self._limits(keys, reuse), strict=True))
        ]
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for request in self._requests:
                if memory.admit(request) is None:
                    raise ShortageError(f"no row is left for {request.rid}: end other requests first")
            undo.pop_all()
        self._rows = np.array([request.req_pool_idx for request in self._requests], np.int32)
        self._cached = np.array([request.kv_len for request in self._requests], np.int64)
        self.length = self.reused = int((self.padding + self._cached).min()) if reuse else 0
        self.slots = slots_to_torch(self._slots_of(0, self.reused), device)
        self.fresh = self.slots[:, :0]
        self.window_slots = self.fresh
        self.confirmed = self.reused
        self._given = [tokens[:, : self.reused]]

    def _limits(self, keys: Sequence[RadixKey], reuse: bool) -> Sequence[int | None]:
        """How much of what is cached of each sequence it may use; None for all.

        All sequences are computed from the same column on, and one that has more cached reads that instead of what is
        computed again. In layers with windows it could not: only the windows before the end of what was found are sure
        to be there. So no sequence uses more than those windows reach back to. What is cached beyond is computed again.
        """
        window = self._memory.config.sliding_window_size
        if not self._windows or window is None:
            return [None] * len(keys)
        if not reuse:
            return [0] * len(keys)
        limits = [key.length - 1 for key in keys]
        while True:
            found = np.array(
                [
                    len(self._memory.cache.match_prefix(key[:limit]).device_indices)
                    for key, limit in zip(keys, limits, strict=True)
                ]
            )
            first = np.maximum((self.padding + found).min() - self.padding, 0)
            late = np.flatnonzero(np.maximum(first - (window - 1), 0) < np.maximum(found - window, 0))
            if not len(late):
                return limits
            for i in late.tolist():
                limits[i] = int(first[i])

    @property
    def batch(self) -> int:
        """How many there are."""
        return len(self._requests)

    def grow(self, columns: int) -> None:
        """Takes slots for the next columns, and evicts what is short. All before them are computed.

        Raises:
          ArgumentError: A sequence would be longer than `max_context_len`.
          ShortageError: Memory is short, though all that can be is evicted. Nothing has changed.
        """
        memory, last = self._memory, self.length + columns
        num_tokens = np.maximum(last - self.padding, 0)
        limit = memory.config.max_context_len
        if num_tokens.max() > limit:
            raise ArgumentError(
                f"a sequence would have {num_tokens.max()} tokens, max_context_len is {limit}: generate fewer"
            )
        self.require_new(columns)
        held = memory.req_to_token_pool.num_pages[self._rows]
        more = np.maximum(pages_of(num_tokens, memory.page_size) - held, 0).astype(np.int32)
        pages = memory.planner.take_pages(int(more.sum()))
        if pages is None:
            raise ShortageError(
                f"{more.sum()} pages of {memory.page_size} tokens are needed, and those of running requests cannot be "
                "evicted: make the memory larger, the batch smaller, or the prompt's chunks (prefill_chunk_size)"
            )
        memory.req_to_token_pool.append_pages(self._rows, pages, more)
        memory.runner.send_changes()
        first, self.length = self.length, last
        slots = self._slots_of(first, last)
        positions = np.arange(first, last) - self.padding[:, None]
        self.slots = torch.cat([self.slots, slots_to_torch(slots, self._device)], dim=1)
        self.fresh = slots_to_torch(np.where(positions < self._cached[:, None], 0, slots), self._device)
        for allocator in self._windows:
            attended = max(first - ((memory.config.sliding_window_size or 1) - 1), 0)
            slots = self._slots_of(attended, last)
            windows = allocator.require_window_slots("slots of a batch", slots.ravel()).reshape(slots.shape)
            self.window_slots = slots_to_torch(windows, self._device)

    def confirm(self, tokens: np.ndarray) -> None:
        """Tells that the next columns are computed, in every layer, of these `(batch, columns)` tokens.

        What of them is prompt can be shared from now on, and window pages are freed.
        """
        self._given.append(tokens)
        self.confirmed += tokens.shape[1]
        for request, padding in zip(self._requests, self.padding.tolist(), strict=True):
            request.kv_len = max(request.kv_len, min(self.confirmed - padding, request.prompt_len))

    def shrink(self, columns: int) -> None:
        """Forgets the last columns. Their slots will be taken up again.

        Raises:
          ArgumentError: They are not all behind the prompts.
        """
        most = self.length - self.prompt.shape[1]
        if not 0 <= columns <= max(most, 0):
            raise ArgumentError(
                f"{columns} columns cannot be taken back: {max(most, 0)} were generated, the rest is prompt"
            )
        self.length -= columns
        self.slots = self.slots[:, : self.length]
        self.confirmed = min(self.confirmed, self.length)
        self._given = [np.concatenate(self._given, axis=1)[:, : self.confirmed]]

    def keep(self, tokens: np.ndarray | None = None) -> None:
        """Lets others find what was generated, too. Without this, only the prompts are kept.

        Args:
          tokens: `(batch, columns)` tokens, beginning with the prompts: what is confirmed is kept as far as it is this.
            All of it by default.

        Raises:
          ArgumentError: They do not begin with the prompts.
        """
        width, given = self.prompt.shape[1], np.concatenate(self._given, axis=1)
        if tokens is not None:
            if tokens.shape[:1] != (self.batch,) or not np.array_equal(tokens[:, :width], self.prompt):
                raise ArgumentError(
                    f"tokens of shape {tokens.shape} must begin with the {self.batch} prompts of {width} columns, as "
                    "what generate() returns does"
                )
            given = given[:, : tokens.shape[1]]
            differs = (given != tokens[:, : given.shape[1]])[:, width:].any(axis=0)
            given = given[:, : width + int(differs.argmax())] if differs.any() else given
        for request, row in zip(self._requests, given, strict=True):
            request.output_ids += row[width:].tolist()
            request.kv_len = request.num_tokens if len(row) > width else request.kv_len

    def close(self) -> None:
        """Ends the requests. What is computed and known stays for others. Afterwards they own nothing."""
        with contextlib.ExitStack() as every:
            for request in self._requests:
                every.callback(self._memory.abort, request)

    def require_batch(self, rows: int) -> None:
        """Raises ArgumentError unless the model has a row for each sequence."""
        if rows != self.batch:
            raise ArgumentError(
                f"the session has {self.batch} sequences, the model {rows}: open it with the same input_ids, and "
                "use neither beams nor num_return_sequences (repeat the prompts instead)"
            )

    def require_new(self, columns: int) -> None:
        """Raises UnsupportedError if the next columns seem to be the whole prompt, behind those that are reused."""
        if 0 < self.reused == self.length and columns >= self.prompt.shape[1]:
            raise UnsupportedError(
                f"the model is given {columns} columns, the whole prompt, though {self.reused} of them are "
                "there: give it what comes after get_seq_length(), or open the session with reuse=False"
            )

    def require_prompt(self, tokens: np.ndarray) -> None:
        """Raises ArgumentError if `(batch, columns)` tokens of the next columns are not what the prompts have there."""
        prompt = self.prompt[:, self.length :][:, : tokens.shape[1]]
        is_token = np.arange(self.length, self.length + prompt.shape[1]) >= self.padding[:, None]
        if ((tokens[:, : prompt.shape[1]] != prompt) & is_token).any():
            raise ArgumentError(
                f"the model is given other tokens than the prompts have from column {self.length} on: open the session "
                "with the tokens that the model is given, and give it what comes after get_seq_length()"
            )

    def _slots_of(self, first: int, last: int) -> np.ndarray:
        """int32 `(batch, last - first)`: the slots of columns; 0 for padding."""
        size = self._memory.page_size
        positions = np.arange(first, last) - self.padding[:, None]
        inside = np.maximum(positions, 0)
        pages = self._memory.req_to_token_pool.pages[self._rows[:, None], inside // size]
        return np.where(positions < 0, 0, pages * size + inside % size).astype(np.int32)


def _require_prompts(memory: MemoryManager, tokens: Any, is_token: Any) -> None:
    """Raises unless these are prompts for `Sequences`."""
    if any(component.per_request for component in memory.cache.components):
        raise UnsupportedError("memory has recurrent states: torch models keep theirs outside of a jaxcache pool")
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ArgumentError(f"input_ids must be integers (batch, columns), got {tokens.dtype} {tokens.shape}")
    if is_token.shape != tokens.shape:
        raise ArgumentError(f"attention_mask must have the shape of input_ids, {tokens.shape}, got {is_token.shape}")
    if not is_token[:, -1].all() or (np.diff(is_token.astype(np.int8), axis=1) < 0).any():
        raise ArgumentError("attention_mask must be padded on the left: zeros, then ones; use padding_side='left'")
    if len(tokens) > memory.config.max_running:
        raise ArgumentError(f"input_ids: a batch of {len(tokens)}, max_running is {memory.config.max_running}")
