"""The one seam for kinds of memory: what cache, manager, audit, offload, snapshot and logs ask of each of them.

    component   file        value              lives in stack   the tree holds it    a running request needs
    full        full.py     a page of tokens   kv (or full)     a page each          pages
    window      window.py   a window page      window           a page each, holes   (comes with each page)
    state       state.py    a whole state      states           at the end of nodes  one to work on, a checkpoint

All others loop over components and ask no kind. To add one, write a file like these: a `TreeComponent` for
what a prefix cache holds by ids of its own, a `MemoryComponent` for what follows the full pages wherever they go.

A component says which rows of which stacks are concerned; it moves no bytes and decides nothing. So a second place for
its values, such as a host tier, needs the same answers and nothing new: `token_rows` of a prefix here, ids there.
"""

# ruff: noqa: B027  # what a component has no use for does nothing

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxcache.index.component import Component
from jaxcache.index.node import Insertion
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.sglang import PoolHolder as PoolHolder
from jaxcache.slots import page_slots
from jaxcache.state_dict import Columns, StateDict
from jaxcache.tables.changes import TableChanges

if TYPE_CHECKING:
    from jaxtyping import Int32

NOT_SHAREABLE = -1
"""Length of a request that has nothing to share yet: less than any prefix."""


class Evictor(Protocol):
    """What makes room for a component's values: the cache."""

    def make_room_for(self, amounts: Mapping[str, int]) -> bool:
        """Whether so many values of each component can be taken now, after evicting what is short."""
        ...


class DeviceMap(Protocol):
    """A map on the host with a copy in the pool: only what changed travels, with a step or ahead of it."""

    name: str

    def num_changed(self) -> int:
        """Entries that wait to be sent."""
        ...

    def take_changes(self, limit: int) -> TableChanges:
        """At most `limit` changed entries; they count as sent."""
        ...

    def give_back(self, changes: TableChanges) -> None:
        """Entries that were taken and did not reach the device wait again."""
        ...

    def send_all(self) -> None:
        """The device's copy is a new one, of zeros: every entry that is not waits."""
        ...

    @staticmethod
    def patched(pool: Any, index: Any, page: Any) -> Any:
        """The pool, consumed, with entries overwritten; an index past the end is padding. Can be traced."""
        ...


class MemoryComponent(ABC):
    """One kind of memory, as the other rooms see it.

    Attributes:
      name: Short and unique in a cache.
      stack_names: The stacks of a pool that hold its values; all of them have the same rows.
      per_page: Values that a page of a request needs: 1, or 0 if it has no ids of its own.
      per_request: Values that a running request needs beside its pages. Those with some take part in each step.
      maps: What the device must know to find its values.
    """

    name: str
    stack_names: tuple[str, ...] = ()
    per_page: int = 0
    per_request: int = 0
    maps: tuple[DeviceMap, ...] = ()

    # ---- where its values lie ------------------------------------------------------------------------------------

    @abstractmethod
    def rows_in_use(self) -> Int32[np.ndarray, " rows"]:
        """Rows of its stacks that hold something, ascending. O(values)."""

    @abstractmethod
    def token_rows(
        self, row: int, pages: Int32[np.ndarray, " pages"], start: int, stop: int
    ) -> Int32[np.ndarray, " tokens"]:
        """Row of each token in `[start, stop)` of a request; 0 for a token without one of its own.

        A value that stands for a prefix counts as that of its last token.

        Args:
          row: The request's row in the request table.
          pages: Its full pages, from that of token `start` on.
          start: First token; a page begins there.
          stop: End, at most the tokens with KV.
        """

    def restorable_tokens(self, num_tokens: int, limit: int) -> int:
        """How many of `num_tokens` copied tokens are of use to a request that may have at most `limit`."""
        return min(num_tokens, limit)

    # ---- requests ------------------------------------------------------------------------------------------------

    def reserve(self, cache: Evictor) -> int | None:
        """Takes what a request needs beside its pages, evicting if need be; None if memory is short."""
        raise NotImplementedError(f"{self.name}: only asked where per_request is not 0")

    def cancel_reservation(self, value: int) -> None:
        """Gives back what `reserve` took."""

    def start_request(self, row: int, value: int, source: int | None) -> None:
        """The request in `row` owns what was reserved for it.

        Args:
          row: Its row in the request table.
          value: From `reserve`.
          source: Cached value that its own has to become a copy of before its first step, 0 for an empty one; None if
            it holds what it should.
        """

    def restart_request(self, row: int, source: int) -> None:
        """The request in `row` resumes from a cached prefix instead of from what it computed.

        Args:
          row: Its row in the request table.
          source: Cached value that its own has to become a copy of before its next step.
        """

    def release_request(self, row: int, own_pages: Int32[np.ndarray, " pages"]) -> None:
        """The request in `row` ends: frees what it owns, be it `own_pages` or what it has beside them."""

    def before_step(self, rows: Int32[np.ndarray, " requests"], device: PoolHolder) -> None:
        """The requests in these rows are about to compute: makes the copies that wait for it."""

    def waits(self, rows: Int32[np.ndarray, " requests"]) -> bool:
        """Whether copies wait that `before_step` of these rows has to make."""
        return False

    def copy(self, device: PoolHolder, source: Int32[np.ndarray, " n"], target: Int32[np.ndarray, " n"]) -> None:
        """Copies values, after what was dispatched before and before what is dispatched next.

        Args:
          device: Holds the pool.
          source: Values to read; 0 empties the target.
          target: Values to overwrite, distinct.
        """
        raise NotImplementedError(f"{self.name}: only asked where per_request is not 0")

    def after_step(
        self,
        rows: Int32[np.ndarray, " requests"],
        seq_len: Int32[np.ndarray, " requests"],
        is_prompt: bool,
        cache: Evictor,
        device: PoolHolder,
    ) -> None:
        """A step was dispatched that brings the requests in these rows to `seq_len` tokens."""

    def next_stop(self, kv_len: int, end: int, num_tokens: int, branching_len: int) -> int:
        """Where a chunk from `kv_len` that could reach `end` should stop, so that what it leaves can be shared.

        Args:
          kv_len: Tokens with KV.
          end: Furthest stop.
          num_tokens: Tokens of the request.
          branching_len: Tokens whose pages are cached, though no request can resume there; 0 for none.
        """
        return end

    # ---- device --------------------------------------------------------------------------------------------------

    def warmed_up(self, pool: Any, max_running: int) -> Any:
        """The pool, consumed and given back unchanged, with what steps of so many requests need compiled."""
        return pool

    # ---- bookkeeping ---------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Frees every value, as if new."""

    def private_problems(self, pages: Int32[np.ndarray, " pages"]) -> Iterator[str]:
        """Where what requests own differs from what the owner of the values says, one sentence each.

        Args:
          pages: Every full page that a running request owns.
        """
        return iter(())

    def read_problems(self, row: int, pages: Int32[np.ndarray, " pages"], kv_len: int) -> Iterator[str]:
        """What the next token of the request in `row` attends to and is not there, one sentence each.

        Args:
          row: Its row in the request table.
          pages: Its full pages.
          kv_len: Tokens in them.
        """
        return iter(())

    def device_problems(self, pool: Any) -> Iterator[str]:
        """Where the device's copies of its maps differ from the host's. Reads them back."""
        return iter(())

    def state_dict(self) -> StateDict:
        """Who owns which value, for a snapshot of the whole cache. O(values).

        Raises:
          SnapshotError: A running request or a copy in flight owns some.
        """
        return {}

    def load_state_dict(self, columns: Columns) -> None:
        """Becomes what the component with this state dict was; this one is new.

        Raises:
          SnapshotError: It is not one of such a component. This one is of no use then.
        """

    def digest(self) -> tuple[Any, ...]:
        """What equals after equal calls, for a fingerprint: anything whose `repr` says all of it. O(values)."""
        return ()


class TreeComponent(MemoryComponent):
    """A component whose values the prefix tree holds, by ids: it takes them over, and returns them when it evicts.

    Attributes:
      component: What the tree has to know of it. Its name is this one's.
    """

    component: Component

    @abstractmethod
    def available(self) -> int:
        """Values that could be taken now. O(1)."""

    @abstractmethod
    def size(self) -> int:
        """Values in all."""

    @abstractmethod
    def candidates(self, pages: Int32[np.ndarray, " pages"], value: int) -> Int32[np.ndarray, " values"]:
        """Ids to offer the tree for these private pages: one a page, 0 = none; or the one `value`, where it is that."""

    @abstractmethod
    def adopt(
        self,
        pages: Int32[np.ndarray, " pages"],
        value: int,
        inserted: Insertion,
        spare: Int32[np.ndarray, " values"],
    ) -> None:
        """Transfers ownership of inserted ids to the tree.

        Args:
          pages: As for `candidates`.
          value: As for `candidates`.
          inserted: What the tree did.
          spare: Of its candidates, those that the tree did not take.
        """

    @abstractmethod
    def free(self, values: Int32[np.ndarray, " values"]) -> None:
        """Frees values that the tree gave up."""

    def require_insertable(
        self, num_tokens: int, page_size: int, pages: Int32[np.ndarray, " pages"], value: int
    ) -> None:
        """Refuses an insert that a caller makes for no request. Nothing has changed then.

        Args:
          num_tokens: Tokens of the key.
          page_size: Tokens a page.
          pages: Its whole pages.
          value: As for `candidates`.

        Raises:
          ArgumentError, OwnershipError: There is nothing to insert, or it is not the caller's.
        """

    def shareable(self, row: int, length: int) -> tuple[int, int]:
        """How far the request in `row` can be shared, and the value that stands for that prefix.

        Args:
          row: Its row in the request table.
          length: How far other components allow.

        Returns:
          `(value, length)`; value 0 where there is one a page, length `NOT_SHAREABLE` if nothing can be shared.
        """
        return 0, length

    def release_checkpoint(self, row: int) -> None:
        """The value that stands for a prefix was inserted: the request in `row` has it no more; frees a duplicate."""

    def checkpoint_working(self, row: int, kv_len: int) -> None:
        """The request in `row` ends after `kv_len` tokens: what it worked on stands for them, if a page ends there."""

    def keep_stop(self, row: int, stop: int, keep: bool) -> int:
        """Where the request in `row`, which needs to stop at `stop` or later only, has to be able to stop as well.

        Args:
          row: Its row in the request table.
          stop: A page ends there.
          keep: Whether a value for an earlier prefix is kept; else it is freed.
        """
        return stop

    def trim(self, pages: Int32[np.ndarray, " pages"]) -> None:
        """Frees its values of private pages that stay: no token will need them again."""

    @abstractmethod
    def problems(self, pages: Int32[np.ndarray, " pages"], values: Int32[np.ndarray, " values"]) -> Iterator[str]:
        """Where the owner of the values and the tree disagree, one sentence each.

        Args:
          pages: Every page of the tree.
          values: What the tree holds of this component: an id for each of these pages, or 0; or every value.
        """


# ---- what components have in common ----------------------------------------------------------------------------------


def used_slots(allocator: BaseTokenToKVPoolAllocator) -> Int32[np.ndarray, " slots"]:
    """Slots of all pages that are not free, ascending. O(pages)."""
    used = np.flatnonzero(~np.isin(allocator.states, (PageState.FREE, PageState.SINK)))
    return page_slots(used.astype(np.int32), allocator.page_size)


def are_all_of(allocator: BaseTokenToKVPoolAllocator, pages: Int32[np.ndarray, " pages"]) -> bool:
    """Whether `pages` are exactly the tree's pages, each once."""
    return np.array_equal(np.sort(pages), np.flatnonzero(allocator.states == PageState.TREE))


def private_problem(
    what: str, owned: Int32[np.ndarray, " owned"], allocator: BaseTokenToKVPoolAllocator
) -> Iterator[str]:
    """A sentence unless `owned`, the property of requests, is each private page of the allocator once."""
    expected = np.flatnonzero(allocator.states == PageState.PRIVATE)
    if not np.array_equal(np.sort(owned), expected):
        odd = np.setxor1d(owned, expected)[:5]
        yield f"private {what}: requests own {len(owned)}, the allocator says {len(expected)}; see {odd}"


def allocator_digest(allocator: BaseTokenToKVPoolAllocator) -> tuple[Any, ...]:
    """Owners of all pages and the order in which free ones will be taken. O(pages)."""
    return allocator.states.tolist(), allocator.free_pages.tolist(), allocator.release_pages.tolist()
