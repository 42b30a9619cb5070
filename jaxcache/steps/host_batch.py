"""A plan as NumPy arrays, for engines whose step, or whose pool, is their own.

    plan = memory.extend(work)                    or decode
    batch = memory.host_batch(plan)               what `Batch` says in a jitted step, and states are filled
    ... the engine's own step ...
    memory.commit(plan)                           in place of `memory.run(step, plan)`

On a pool of the memory's own, that step takes `memory.pool` and, after `memory.runner.send_changes()`, `memory.table`,
and the pool that it returns is put back: `memory.pool = pool`. With `host_only=True` there is no pool.

Source: jaxcache's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.pages.expand import extend_slots
from jaxcache.steps.buckets import StepKind
from jaxcache.steps.plan import StepPlan
from jaxcache.tables.page_list import PageList
from jaxcache.tables.request_table import ReqToTokenPool

if TYPE_CHECKING:
    from jaxtyping import Int32


@dataclass(frozen=True, eq=False)
class HostBatch:
    """What a step is told, in NumPy arrays that are the caller's own. There is no padding.

    Attributes:
      kind: Extend or decode.
      tokens, positions, slots, request: int32, one a token; see `Batch`. A token that was sampled and is not in
        `output_ids` (see `MemoryManager.commit`) is `PENDING_TOKEN`.
      row, prefix_len, seq_len, tag, last: int32, one a request; see `Batch`.
      state: int32 recurrent state of each request; empty without states.
      cu_q: int32, where the tokens of each request begin, and where the last one's end.
      block_table: int32, the pages of each request in the order of its tokens; 0 behind its last one.
      pages: The same as one list.
    """

    kind: StepKind
    tokens: Int32[np.ndarray, " tokens"]
    positions: Int32[np.ndarray, " tokens"]
    slots: Int32[np.ndarray, " tokens"]
    request: Int32[np.ndarray, " tokens"]
    row: Int32[np.ndarray, " requests"]
    prefix_len: Int32[np.ndarray, " requests"]
    seq_len: Int32[np.ndarray, " requests"]
    tag: Int32[np.ndarray, " requests"]
    state: Int32[np.ndarray, " states"]
    cu_q: Int32[np.ndarray, " requests+1"]
    block_table: Int32[np.ndarray, "requests pages"]
    pages: PageList

    @property
    def last(self) -> Int32[np.ndarray, " requests"]:
        """Index of each request's last token among `tokens`."""
        return self.cu_q[1:] - 1


def host_batch(plan: StepPlan, table: ReqToTokenPool) -> HostBatch:
    """The arrays of a plan. Cost: some NumPy calls; O(tokens + pages of its requests)."""
    counts = plan.seq_len - plan.prefix_len
    cu_q = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=cu_q[1:])
    request = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    positions = np.arange(cu_q[-1], dtype=np.int32) + np.repeat(plan.prefix_len - cu_q[:-1], counts)
    slots = extend_slots(plan.prefix_len, plan.seq_len, plan.last_loc, plan.new_pages, table.page_size)
    num_pages = -(-plan.seq_len // table.page_size)
    width = int(num_pages.max(initial=0))
    block_table = np.where(np.arange(width) < num_pages[:, None], table.pages[plan.row, :width], np.int32(0))
    return HostBatch(
        plan.bucket.kind,
        tokens=plan.tokens.copy(),
        positions=positions,
        slots=slots,
        request=request,
        row=plan.row.astype(np.int32),
        prefix_len=plan.prefix_len.copy(),
        seq_len=plan.seq_len.copy(),
        tag=plan.tag.copy(),
        state=plan.state.copy(),
        cu_q=cu_q,
        block_table=block_table,
        pages=table.page_list(plan.row, plan.seq_len),
    )
