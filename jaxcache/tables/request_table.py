"""The request table: which page holds which part of which request. The host decides, the device follows.

`ReqToTokenPool` is the truth, in NumPy. `RequestTable` is its twin on the device, a donated pytree, which follows by
`jaxcache.tables.changes`: only entries that changed travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcache.arguments import as_count, as_flag, as_int32, as_integer, as_integers, require_kind
from jaxcache.device.placing import on_device
from jaxcache.errors import ArgumentError, DoubleFreeError, shown
from jaxcache.slots import whole_pages
from jaxcache.state_dict import Columns, StateDict
from jaxcache.tables.changes import ChangeLog, TableChanges
from jaxcache.tables.device_table import RequestTable
from jaxcache.tables.page_list import PageList
from jaxcache.tables.row_arguments import of_rows, one_a_row

if TYPE_CHECKING:
    from jaxtyping import Int, Int32


@dataclass(frozen=True, eq=False)
class RowStamp:
    """What rows of a table were at some moment, without a copy of them: `ReqToTokenPool.is_current` tells.

    Attributes:
      table: Whose rows.
      rows: Which.
      clock: The moment, counted in changes of the table.
    """

    table: ReqToTokenPool
    rows: np.ndarray
    clock: int


class ReqToTokenPool:
    """Rows of the request table, on the host.

    Args:
      size: Requests that can run at once. Rows start at 0 and there is no padding row.
      max_context_len: Longest request, in tokens.
      page_size: Tokens an entry. With 1 it is SGLang's table of one slot a token.

    Rows are handed out first in, first out. A freed row keeps its old entries, which are not to be read. Not
    thread-safe: its manager's thread owns it.

    Attributes:
      kv_len: int32 (size,), tokens of the request in each row whose KV is in the pool.
      num_pages: int32 (size,), entries of each row in use.
      has_next: bool (size,), whether the register of each row on the device holds the token behind those with KV.

    Source: SGLang 0.5.2 memory_pool.py, ReqToTokenPool.
    """

    def __init__(self, size: int, max_context_len: int, page_size: int = 1):
        sizes = size, max_context_len, page_size
        if not all(isinstance(value, (int, np.integer)) for value in sizes) or min(sizes) < 1:
            raise ArgumentError(f"size, max_context_len and page_size must be integers, at least 1, got {shown(sizes)}")
        self.size = size
        self.max_context_len = max_context_len
        self.page_size = page_size
        self.max_pages = -(-max_context_len // page_size)
        if size * self.max_pages >= 2**31:
            raise ArgumentError(f"size * max_pages = {size * self.max_pages} entries do not fit int32 indices")
        self._pages = np.zeros((size, self.max_pages), np.int32)
        self._flat = self._pages.reshape(-1)
        self._changes = ChangeLog(self._pages)
        self.kv_len = np.zeros(size, np.int32)
        self.num_pages = np.zeros(size, np.int32)
        self.has_next = np.zeros(size, bool)
        self._changed_at = np.zeros(size, np.int64)
        self._clock = 0
        self.clear()

    def clear(self) -> None:
        """Gives every row back. Entries stay as they are."""
        self._free = deque(range(self.size))
        self._is_free = np.ones(self.size, bool)
        self._changes.forget()
        self.touch(slice(None))

    def available_size(self) -> int:
        """Free rows."""
        return len(self._free)

    @property
    def free_rows(self) -> list[int]:
        """The free rows, in the order in which they will be handed out."""
        return list(self._free)

    @property
    def req_to_token(self) -> Int32[np.ndarray, "rows max_context_len"]:
        """The table with one slot a token, expanded. O(size * max_context_len): for looking, not for stepping."""
        offsets = np.arange(self.page_size, dtype=np.int32)
        slots = self._pages[:, :, None] * self.page_size + offsets
        return slots.reshape(self.size, -1)[:, : self.max_context_len]

    def alloc(self, need_size: int) -> list[int] | None:
        """`need_size` rows, or None if fewer are free."""
        if as_count("need_size", need_size) > len(self._free):
            return None
        rows = [self._free.popleft() for _ in range(need_size)]
        self._is_free[rows] = self.has_next[rows] = False
        self.touch(rows)
        return rows

    def free(self, free_index: int | Sequence[int]) -> None:
        """Gives rows back.

        Raises:
          ArgumentError: A row is out of range or named twice.
          DoubleFreeError: A row is free already. Nothing changes.
        """
        rows = self._rows_to_free(free_index)
        self._is_free[rows] = True
        self.touch(rows)
        self._free.extend(rows.tolist())

    def _rows_to_free(self, free_index: int | Sequence[int]) -> np.ndarray:
        """The rows that `free` was given, checked: distinct and in use."""
        is_one = isinstance(free_index, (int, np.integer, np.ndarray))
        rows = as_int32("free_index", np.atleast_1d(free_index) if is_one else free_index)
        if rows.size == 0:
            return np.empty(0, np.intp)
        if rows.min() < 0 or rows.max() >= self.size:
            raise ArgumentError(f"free_index must be rows in [0, {self.size}), got {shown(free_index)}")
        if len(set(rows.tolist())) != len(rows):
            raise ArgumentError(f"free_index names a row twice: {shown(free_index)}")
        if self._is_free[rows].any():
            raise DoubleFreeError(f"free_index: row {rows[self._is_free[rows]][0]} is free already")
        return rows

    def write(self, indices: tuple[int, slice], values: np.ndarray) -> None:
        """SGLang's write: `values` are the slots of the tokens in `indices = (row, slice)`.

        Raises:
          ArgumentError: The slice does not start at a page, or the slots are not int32, from 0 on, and consecutive
            within pages.
        """
        row, columns = indices if isinstance(indices, tuple) and len(indices) == 2 else (None, None)
        if not isinstance(row, (int, np.integer)) or not isinstance(columns, slice):
            raise ArgumentError(f"indices must be (row, slice), one row at a time, got {shown(indices)}")
        start, stop, step = columns.indices(self.max_context_len)
        values = as_int32("values", values)
        if step != 1 or len(values) != stop - start:
            raise ArgumentError(f"values: {len(values)} slots do not fit columns {start}:{stop}:{step}")
        if start % self.page_size:
            raise ArgumentError(f"indices: the slice must start at a page of {self.page_size} slots, got {start}")
        pages = whole_pages("values", values, self.page_size, last_may_end=True)
        self.write_pages(int(row), start // self.page_size, pages)

    def write_pages(self, row: int, first: int, pages: Int32[np.ndarray, " pages"], on_device: bool = False) -> None:
        """Entries `[first, first + len(pages))` of `row` become `pages`; the device learns of it with the next patch.

        Args:
          row: A row in use.
          first: Entry to start at.
          pages: What to write.
          on_device: The device has written these entries itself: nothing is sent.

        Raises:
          ArgumentError: The row is not in use, the entries do not fit, or `pages` are not integers.
        """
        self._require_in_use(row)
        first, pages = as_integer("first", first, 32), as_int32("pages", pages)
        stop = first + len(pages)
        if first < 0 or stop > self.max_pages:
            raise ArgumentError(
                f"entries {first}:{stop} do not fit a row of {self.max_pages} pages: raise max_context_len"
            )
        if len(pages):
            if not on_device:  # first, so that none is ever missing
                base = row * self.max_pages
                self._changes.mark(np.arange(base + first, base + stop, dtype=np.int32))
            self._pages[row, first:stop] = pages
            self.touch(row)

    def _require_in_use(self, row: int) -> None:
        if not isinstance(row, (int, np.integer)) or not 0 <= row < self.size or self._is_free[row]:
            raise ArgumentError(f"row {shown(row)} is not in use: allocate it first")

    @of_rows
    def append_pages(
        self,
        rows: Int[np.ndarray, " rows"],
        pages: Int32[np.ndarray, " pages"],
        counts: Int32[np.ndarray, " rows"] | None = None,
        on_device: bool = False,
    ) -> None:
        """The next `counts[i]` of `pages`, by default one, go behind the last page in use of `rows[i]`, for all rows.

        The rows must be in use and distinct. `on_device`: as for `write_pages`.

        Raises:
          ArgumentError: There are no such rows, or one has no room; or the numbers of rows, counts and pages do not
            agree. Nothing has changed.

        Cost: some NumPy calls, whatever the number of rows.
        """
        pages = as_int32("pages", pages)
        if not len(pages):
            return
        held = self.num_pages[rows]
        first = rows * self.max_pages + held
        if counts is not None:
            counts = one_a_row("counts", counts, rows)
        try:
            index = (first if counts is None else _runs(first, counts)).astype(np.int32)
        except ValueError as error:
            raise ArgumentError(f"counts must not be negative, got {shown(counts)}") from error
        if len(index) != len(pages):
            raise ArgumentError(f"pages must be {len(index)}, as many as the rows get, got {len(pages)}")
        held = held + (1 if counts is None else counts)
        if held.max() > self.max_pages:  # what is too much would be written into the next row
            raise ArgumentError(f"a row has room for {self.max_pages} pages, not {held.max()}: raise max_context_len")
        if not on_device:
            self._changes.mark(index)
        self._flat[index] = pages
        self.num_pages[rows] = held
        self.touch(rows)

    @of_rows
    def cut_spare_pages(self, rows: Int[np.ndarray, " rows"]) -> Int32[np.ndarray, " pages"]:
        """Takes the pages behind those of the tokens with KV from distinct rows; the caller frees them.

        Returns:
          A copy of them, row after row. Cost: as `append_pages`.
        """
        keep = -(-self.kv_len[rows] // self.page_size)
        counts = self.num_pages[rows] - keep
        longer = np.flatnonzero(counts)
        rows, keep, counts = rows[longer], keep[longer], counts[longer]
        pages = self._pages[np.repeat(rows, counts), _runs(keep, counts)]
        self.num_pages[rows] = keep
        self.touch(rows)
        return pages

    @of_rows
    def commit(
        self, rows: Int[np.ndarray, " rows"], kv_len: Int32[np.ndarray, " rows"], has_next: bool = False
    ) -> None:
        """These rows have so many tokens with KV from now on, and perhaps the next one in their registers."""
        kv_len, has_next = one_a_row("kv_len", kv_len, rows), as_flag("has_next", has_next)
        self.kv_len[rows], self.has_next[rows] = kv_len, has_next
        self.touch(rows)

    def touch(self, rows: int | slice | Sequence[int] | np.ndarray) -> None:
        """The owner, the length or the pages of these rows changed: stamps of before are no longer current.

        Called wherever the table changes; so does a caller that writes to `kv_len` or `num_pages`.
        """
        if not isinstance(rows, (int, np.integer, slice)):
            rows = as_integers("rows", rows)
        try:
            self._changed_at[rows] = self._clock + 1
        except IndexError as error:
            raise ArgumentError(f"rows must be in [0, {self.size}): {error}") from error
        self._clock += 1

    @of_rows
    def stamp(self, rows: Int[np.ndarray, " rows"]) -> RowStamp:
        """Remembers these rows as they are. O(1)."""
        return RowStamp(self, rows, self._clock)

    def is_current(self, stamp: RowStamp) -> bool:
        """Whether its rows are this table's and have not changed since, not even to and fro.

        Cost: O(1) if no row has, else three calls.
        """
        require_kind("stamp", stamp, RowStamp)
        if stamp.table is not self:
            return False
        return stamp.clock == self._clock or bool((self._changed_at[stamp.rows] <= stamp.clock).all())

    @of_rows
    def last_slots(
        self, rows: Int[np.ndarray, " rows"], lengths: Int32[np.ndarray, " rows"] | None = None
    ) -> Int32[np.ndarray, " rows"]:
        """Slot of the last of `lengths` tokens, by default of those with KV, of each row; -1 where there is none."""
        if lengths is not None:
            lengths = one_a_row("lengths", lengths, rows)
        last = (self.kv_len[rows] if lengths is None else lengths) - 1
        slots = self._pages[rows, last // self.page_size] * np.int32(self.page_size) + last % self.page_size
        return np.where(last < 0, np.int32(-1), slots)

    def row_pages(self, row: int, first: int, stop: int) -> Int32[np.ndarray, " pages"]:
        """Entries `[first, stop)` of `row`, as a view that the next write changes."""
        if not isinstance(row, (int, np.integer)) or not 0 <= row < self.size:
            raise ArgumentError(f"row must be in [0, {self.size}), got {shown(row)}")
        return self._pages[row, first:stop]

    @of_rows
    def page_list(self, rows: Int32[np.ndarray, " rows"], seq_len: Int32[np.ndarray, " rows"]) -> PageList:
        """The pages of the first `seq_len` tokens of some rows in one list, for kernels that are planned on the host.

        Raises:
          ArgumentError: A row has no pages for so many tokens.

        Cost: some NumPy calls, and a copy of the pages.
        """
        seq_len = one_a_row("seq_len", seq_len, rows)
        counts = -(-seq_len // self.page_size)
        if (counts > self.num_pages[rows]).any() or (seq_len < 0).any():
            raise ArgumentError(f"seq_len must be tokens that rows have pages for, got {seq_len} for rows {rows}")
        indptr = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=indptr[1:])
        indices = self._pages[np.repeat(rows, counts), _runs(np.zeros_like(counts), counts)]
        return PageList(indptr, indices, seq_len - np.maximum(counts - 1, 0) * self.page_size)

    @of_rows
    def states_of(self, rows: Int32[np.ndarray, " rows"]) -> Int32[np.ndarray, " states"]:
        """Working state of each of these rows; empty, as rows have none here."""
        return np.empty(0, np.int32)

    @property
    def pages(self) -> Int32[np.ndarray, "rows max_pages"]:
        """The whole host table, read-only."""
        view = self._pages.view()
        view.setflags(write=False)
        return view

    def state_dict(self) -> StateDict:
        """The free rows, in the order in which they will be handed out. What is in rows is not kept."""
        return {"free_rows": np.array(self._free, np.int64)}

    def load_state_dict(self, columns: Columns) -> None:
        """Hands out rows as the table with this state dict would have; a larger one, those it has more after them.

        Raises:
          SnapshotError: It is not that of a table without running requests.
        """
        require_kind("columns", columns, Columns)
        order = columns.distinct("free_rows", high=2**31 - 1).tolist()
        known = set(order)
        self._free = deque(row for row in order if row < self.size)
        self._free.extend(row for row in range(self.size) if row not in known)

    def num_changed(self) -> int:
        """Entries waiting to be sent to the device."""
        return len(self._changes)

    def take_changes(self, limit: int) -> TableChanges:
        """At most `limit` changed entries with their values of this moment; they count as sent."""
        return self._changes.take(limit)

    def give_back(self, changes: TableChanges) -> None:
        """Changes that were taken and did not reach the device wait again."""
        self._changes.give_back(changes)

    def device_table(self, mesh: Mesh | None = None) -> RequestTable:
        """A new device twin with all present entries, beside a pool on `mesh` with a copy on each of its devices."""
        if mesh is not None:
            require_kind("mesh", mesh, Mesh)
        self._changes.forget()
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        parts = (on_device(part, everywhere) for part in (self._pages, np.zeros(self.size, np.int32)))
        return RequestTable(*jax.jit(_copies, out_shardings=everywhere)(*parts))


def _copies(*parts: jax.Array) -> tuple[jax.Array, ...]:
    """What the device may keep and update: a CPU device may have been given memory of the host."""
    return tuple(jnp.copy(part) for part in parts)


def _runs(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts[i]` consecutive numbers from `first[i]` on, one run after the other."""
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)
