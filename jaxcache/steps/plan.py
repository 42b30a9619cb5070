"""Step plans: everything a step needs from the host, in one int32 vector of a static shape.

    host                                              device, inside the jitted step
    StepPlan.pack()  ── one upload ──►  packed  ──►  unpack(packed, bucket)  ──►  Batch: tokens, positions, slots, ...
                                                     and the request table, with its changed entries patched in

Shapes come from a short list of buckets, so after warm-up no step compiles. Slots never travel: the device expands them
from the pages (`kernels/alloc_pages`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.request import Request
from jaxcache.steps.buckets import Bucket
from jaxcache.tables.changes import TableChanges
from jaxcache.tables.request_table import RowStamp

if TYPE_CHECKING:
    from jaxtyping import Int32


NO_PAGES = np.empty(0, np.int32)
NO_CHANGES = TableChanges(np.empty(0, np.int32), np.empty(0, np.int32))
NO_MAPS: Mapping[str, TableChanges] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step's host inputs, unpadded.

    Attributes:
      bucket: Where it is padded to.
      requests: The batch, in order.
      row, prefix_len, seq_len, last_loc, tag: One integer a request: its table row; tokens it had and will have; the
        slot of its last token (-1 for none); a number of the engine's own, such as its adapter.
      tokens: int32 token ids computed, request by request; `PENDING_TOKEN` for what is in the register of its row.
      new_pages: int32 fresh pages, in the order the requests take them.
      state: int32 recurrent state of each request; empty without states.
      stamp: The rows as the plan leaves them: once they change, it is outdated. None for padding.
      shared_pages: int32, pages that one request of the plan computes and others read: PLANNED until it runs.
      takers: Those others.
    """

    bucket: Bucket
    requests: tuple[Request, ...]
    row: np.ndarray
    prefix_len: np.ndarray
    seq_len: np.ndarray
    last_loc: np.ndarray
    tag: np.ndarray
    tokens: np.ndarray
    new_pages: np.ndarray
    state: np.ndarray
    stamp: RowStamp | None = None
    shared_pages: np.ndarray = field(default_factory=lambda: NO_PAGES)
    takers: tuple[Request, ...] = ()

    @property
    def num_computed(self) -> Int32[np.ndarray, " requests"]:
        """Tokens that each request computes: where others compute some of what was asked for, fewer than that."""
        return self.seq_len - self.prefix_len

    @classmethod
    def empty(cls, bucket: Bucket) -> StepPlan:
        """A plan of padding alone, to compile a bucket."""
        none = np.empty(0, np.int32)
        return cls(bucket, (), none, none, none, none, none, none, none, none)

    def pack(
        self,
        changes: TableChanges,
        map_changes: Mapping[str, TableChanges] = NO_MAPS,
        out: Int32[np.ndarray, " size"] | None = None,
    ) -> Int32[np.ndarray, " size"]:
        """The one vector that is uploaded, changes of the request table and of the pool's maps included.

        Padding is 0; padding of table changes is out of range, which drops them.

        Raises:
          ArgumentError: Something does not fit the bucket.
        """
        parts = vars(self) | vars(changes)
        for name in self.bucket.maps:
            of_map = map_changes.get(name, NO_CHANGES)
            parts |= {f"{name}_index": of_map.index, f"{name}_page": of_map.page}
        return self.bucket.packing.pack(parts, out)
