"""The request table of a hybrid model: beside its pages, each row has its states.

    set_state ──► state, state_from ── state_copies ──► copied by a step ── copied ──► state
    set_saved ──► saved, saved_len  ── take_saved   ──► the prefix cache          (or save_working, at the end)
                  state, saved      ── take_states  ──► their allocator, and then the row may be freed

States are ids from a `StateAllocator`, 1 or more; they have nothing to do with rows, which begin at 0.

Source: SGLang 0.5.2 memory_pool.py, HybridReqToTokenPool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from jaxcache.errors import ArgumentError, OwnershipError, RequestStateError, shown
from jaxcache.pools.mamba import reading_order
from jaxcache.tables.request_table import ReqToTokenPool
from jaxcache.tables.row_arguments import of_rows

if TYPE_CHECKING:
    from jaxtyping import Int32

    Rows: TypeAlias = Sequence[int] | Int32[np.ndarray, " rows"]

NO_COPY = -1
"""`state_from` of a row whose working state holds what it should."""


class HybridReqToTokenPool(ReqToTokenPool):
    """Rows of the request table, each with a working state and at most one checkpoint.

    A row owns the states that it names: no other row may name them, and it cannot be freed before they were taken back.
    Another working state makes stamps of the row outdated, as another page does. `clear` forgets all states: clear
    their allocator as well.
    """

    def clear(self) -> None:
        """Gives every row back and forgets its states."""
        super().clear()
        self._state, self._saved, self._saved_len = np.zeros((3, self.size), np.int32)
        self._state_from = np.full(self.size, NO_COPY, np.int32)

    @property
    def state(self) -> Int32[np.ndarray, " size"]:
        """Working state of each row, which steps read and write; 0 = none. A live, read-only view, like the others."""
        return _read_only(self._state)

    @of_rows
    def states_of(self, rows: Int32[np.ndarray, " rows"]) -> Int32[np.ndarray, " rows"]:
        """Working state of each of these rows, as a copy."""
        return self._state[rows]

    @property
    def state_from(self) -> Int32[np.ndarray, " size"]:
        """State to be copied into the working state before the next step: a cached one, 0 = emptied, or `NO_COPY`."""
        return _read_only(self._state_from)

    @property
    def saved(self) -> Int32[np.ndarray, " size"]:
        """State with a checkpoint that may be offered to the prefix cache; 0 = none."""
        return _read_only(self._saved)

    @property
    def saved_len(self) -> Int32[np.ndarray, " size"]:
        """Tokens that the checkpoint stands for: whole pages."""
        return _read_only(self._saved_len)

    @property
    def held_states(self) -> Int32[np.ndarray, " held"]:
        """Every state that a row owns, ascending: what an audit compares with the allocator's PRIVATE states."""
        held = np.concatenate([self._state, self._saved])
        return np.sort(held[held != 0])

    def set_state(self, row: int, state: int, source: int) -> None:
        """Gives a row its working state.

        Args:
          row: A row in use, without one.
          state: A PRIVATE state; the row owns it from now on.
          source: What it is to hold: a cached state to be copied into it, which must stay until it has been; 0 for the
            empty prefix; or `NO_COPY` if it holds what it should, as when a request comes back with its state.

        Raises:
          ArgumentError: The row is not in use, or no such states.
          RequestStateError: The row has a working state.
          OwnershipError: A row owns this state.
        """
        self._require_in_use(row)
        self._require_unowned("state", state)
        if self._state[row]:
            raise RequestStateError(f"row {row} has working state {self._state[row]}: take_states first")
        if not _is_int(source) or not NO_COPY <= source < 2**31 or source == state:
            raise ArgumentError(f"source must be another state than {state}, 0 or NO_COPY, got {shown(source)}")
        self._state[row], self._state_from[row] = state, source
        self.touch(row)

    @of_rows
    def state_copies(self, rows: Rows) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """The copies that must happen before a step over `rows`, for `MambaPool.copy_states`.

        Returns:
          `(src, dst)` int32, in an order in which they can be carried out one after the other. Until `copied` they are
          asked for again.

        Raises:
          ArgumentError: as `reading_order`.
        """
        index = np.asarray(rows, np.intp)  # `of_rows` made an array of them
        waiting = index[self._state_from[index] != NO_COPY]
        return reading_order(self._state_from[waiting], self._state[waiting])

    @of_rows
    def copied(self, rows: Rows) -> None:
        """The step that makes these copies was dispatched: the working states hold what they should."""
        self._state_from[np.asarray(rows, np.intp)] = NO_COPY

    def set_saved(self, row: int, state: int, length: int) -> None:
        """Records a checkpoint of a row's working state.

        Args:
          row: A row in use with a working state, and without a checkpoint.
          state: The PRIVATE state into which the working state was copied; the row owns it from now on.
          length: Tokens that the working state had read by then: whole pages, as only there a match can stop.

        Raises:
          ArgumentError: The row is not in use, no such state, or the length is not one of whole pages that it has.
          RequestStateError: The row has no working state, or one to be filled yet, or has a checkpoint.
          OwnershipError: A row owns this state.
        """
        self._require_unowned("state", state)
        self._require_savable(row, length)
        self._saved[row], self._saved_len[row] = state, length

    def save_working(self, row: int, length: int) -> None:
        """The working state itself becomes the checkpoint, without a copy: for a request that ends.

        Raises:
          ArgumentError, RequestStateError: as `set_saved`.
        """
        self._require_savable(row, length)
        self._saved[row], self._saved_len[row], self._state[row] = self._state[row], length, 0
        self.touch(row)

    def take_saved(self, row: int) -> tuple[int, int]:
        """The checkpoint of a row and its length, which the caller owns now; (0, 0) if there is none.

        Raises:
          ArgumentError: The row is not in use.
        """
        self._require_in_use(row)
        checkpoint = int(self._saved[row]), int(self._saved_len[row])
        self._saved[row] = self._saved_len[row] = 0
        return checkpoint

    def take_states(self, row: int) -> Int32[np.ndarray, " states"]:
        """All states of a row, which the caller owns now: none, the working state, the checkpoint, or both.

        Raises:
          ArgumentError: The row is not in use.
        """
        saved, _ = self.take_saved(row)
        states = np.array([state for state in (self._state[row], saved) if state], np.int32)
        self._state[row], self._state_from[row] = 0, NO_COPY
        self.touch(row)
        return states

    def free(self, free_index: int | Sequence[int]) -> None:
        """Gives rows back, whose states must have been taken.

        Raises:
          ArgumentError: A row is out of range or named twice.
          DoubleFreeError: A row is free already.
          RequestStateError: A row owns a state, which would be lost. Nothing changes.
        """
        rows = self._rows_to_free(free_index)
        owners = rows[(self._state[rows] != 0) | (self._saved[rows] != 0)]
        if len(owners):
            raise RequestStateError(
                f"row {owners[0]} owns states, which would be lost: take_states, and free them, first"
            )
        super().free(free_index)

    def _require_savable(self, row: int, length: int) -> None:
        self._require_in_use(row)
        if not self._state[row] or self._state_from[row] != NO_COPY:
            raise RequestStateError(f"row {row} has no working state that a step has filled: there is nothing to save")
        if self._saved[row]:
            raise RequestStateError(f"row {row} has a checkpoint in state {self._saved[row]}: take_saved first")
        if not _is_int(length) or length % self.page_size or not 0 < length <= self.max_context_len:
            raise ArgumentError(
                f"length must be a multiple of page_size = {self.page_size} in (0, {self.max_context_len}], "
                f"got {shown(length)}"
            )

    def _require_unowned(self, name: str, state: int) -> None:
        if not _is_int(state) or not 0 < state < 2**31:
            raise ArgumentError(f"{name} must be a state, 1 or more, got {shown(state)}")
        owners = np.flatnonzero((self._state == state) | (self._saved == state))
        if len(owners):
            raise OwnershipError(f"{name} {state} is owned by row {owners[0]}: a state has one owner")


def _is_int(value: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view
