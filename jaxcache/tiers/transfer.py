"""Values between the device's pool and host memory, in batches, while the engine computes.

    ticket = transfers.backup(pool, moves)       gathered: the device ids may be freed, the pool may be donated
    ticket = transfers.load(moves)               on its way: the pool is not touched yet
    pool, ended = transfers.poll(pool)           every iteration: what has arrived is written, what has ended is told

A transfer goes by way of blocks of device memory, at most `staging_bytes` of them in each direction: a backup gathers
pages into one, from where the link takes them to their places; a load has the link fill one and writes it to the pool
only when it is there, so that no step waits for the link. Shapes are padded to powers of two: few compile.

Source: SGLang 0.5.2 cache_controller.py, which calls a transfer complete when it is enqueued.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from jaxcache.errors import ArgumentError, BrokenInvariantError, OwnershipError, TransferError
from jaxcache.pools.stack import MemoryPool
from jaxcache.tiers.blocks import blocks_like, gathered, scattered, stack_names
from jaxcache.tiers.host_memory import HostMemory
from jaxcache.tiers.host_pool import HostPool
from jaxcache.tiers.host_states import HostState
from jaxcache.tiers.link import Pending

if TYPE_CHECKING:
    from jaxtyping import Int32

PoolT = TypeVar("PoolT", bound=MemoryPool)

BLOCKS = 4
"""Blocks that the staging memory of one direction is cut into: while one is on the link, others are filled."""


class Direction(enum.Enum):
    """Where a transfer goes."""

    BACKUP = "backup"
    LOAD = "load"


@dataclass(frozen=True, eq=False)
class Move:
    """Which values of one component go where.

    Attributes:
      component: Its name.
      device_ids: int32 ids on the device: pages, window pages or states.
      host_ids: int32, as many ids of its `HostPool`.
    """

    component: str
    device_ids: Int32[np.ndarray, " n"]
    host_ids: Int32[np.ndarray, " n"]


@dataclass(eq=False)
class Ticket:
    """A transfer that was started.

    Attributes:
      direction: Where it goes.
      moves: What it moves.
      error: Why it failed; None if it did not. Then a backup's host ids are RESERVED again, and a load's BACKUP; what
        the device ids of a failed load hold is undefined.
      is_done: Whether it has ended, in either way.
    """

    direction: Direction
    moves: tuple[Move, ...]
    error: TransferError | None = None
    is_done: bool = False
    blocks_left: int = field(default=0, repr=False)


@dataclass(eq=False)
class _Block:
    """A part of a transfer: values of one component, as many as staging memory has room for.

    Attributes:
      ticket: The transfer.
      pool: Where its host ids are.
      device_ids: Padded with zeros to a power of two.
      host_ids: Ascending, so that neighbours travel together.
      num_bytes: Staging memory that it takes.
      arrays: That memory, while it is in flight.
      pending: What is in flight.
    """

    ticket: Ticket
    pool: HostPool
    device_ids: np.ndarray
    host_ids: np.ndarray
    num_bytes: int
    arrays: Sequence[Any] = ()
    pending: Pending | None = None


class Transfers:
    """All transfers between a pool and its host memory. Its owner calls it from one thread.

    Args:
      memory: The host pools.
    """

    def __init__(self, memory: HostMemory):
        self._memory, self._link = memory, memory.link
        self._saving: deque[_Block] = deque()
        self._fetching: deque[_Block] = deque()
        self._queued: deque[_Block] = deque()  # loads that wait for staging memory
        self._open: list[Ticket] = []  # in the order in which they were started

    @property
    def device_bytes(self) -> int:
        """Most device memory that transfers hold at a time, on each device."""
        return 2 * self._memory.config.staging_bytes

    @property
    def in_flight(self) -> int:
        """Transfers that have not been told as ended."""
        return len(self._open)

    def room_for_backup(self, component: str) -> int:
        """Values of a component that a backup can take now without waiting for staging memory: a power of two, or 0.

        Raises:
          ArgumentError: It has no host memory.
        """
        pool = self._pool_of(component)
        left = self._memory.config.staging_bytes - self._bytes(self._saving)
        return min(1 << (left // pool.block_bytes).bit_length() >> 1, self._most_ids(pool) * BLOCKS)

    # ---- starting ------------------------------------------------------------------------------------------------

    def backup(self, pool: MemoryPool, moves: Iterable[Move]) -> Ticket:
        """Starts to copy values from the device to host memory.

        Args:
          pool: The device's; read, not consumed. When this returns it may be donated, and the device ids freed.
          moves: At most one for each component; host ids are RESERVED and become PROTECTED, then SYNCED.

        Raises:
          StalePoolError: The pool was consumed.
          ArgumentError, OwnershipError, DoubleFreeError: Moves that do not fit. Nothing has changed.

        Cost: a jitted gather a block. Waits if earlier backups hold all of the staging memory.
        """
        pool.require_live()
        ticket, blocks = self._ticket(Direction.BACKUP, moves, HostState.RESERVED)
        for block in blocks:
            while self._saving and self._bytes(self._saving) + block.num_bytes > self._memory.config.staging_bytes:
                self._wait(self._saving[0])
                self._settle()
            if ticket.error is None:
                self._start_saving(pool, block)
            else:
                ticket.blocks_left -= 1
        self._end_if_done(ticket)
        return ticket

    def load(self, moves: Iterable[Move]) -> Ticket:
        """Starts to copy values from host memory to the device. The pool changes in `poll`.

        Args:
          moves: At most one for each component; host ids are BACKUP and become PROTECTED, then SYNCED. Steps must not
            read the device ids until the ticket has ended.

        Raises:
          ArgumentError, OwnershipError, DoubleFreeError: Moves that do not fit. Nothing has changed.
        """
        ticket, blocks = self._ticket(Direction.LOAD, moves, HostState.BACKUP)
        self._queued.extend(blocks)
        self._end_if_done(ticket)
        return ticket

    # ---- going on ------------------------------------------------------------------------------------------------

    def poll(self, pool: PoolT) -> tuple[PoolT, list[Ticket]]:
        """Advances what is in flight, and waits for nothing.

        Args:
          pool: The device's; consumed if a load has something to write.

        Returns:
          The pool; and the tickets that have ended, in the order in which they were started, each once. What a load
          brought can be read by every step that is dispatched from now on.

        Raises:
          StalePoolError, BorrowedError: The pool cannot be donated. Nothing is lost: poll again.
        """
        self._settle()
        self._start_fetching(pool)
        pool = self._land(pool)
        self._start_fetching(pool)
        ended = [ticket for ticket in self._open if ticket.is_done]
        self._open = [ticket for ticket in self._open if not ticket.is_done]
        return pool, ended

    def wait(self, pool: PoolT, tickets: Collection[Ticket] | None = None) -> tuple[PoolT, list[Ticket]]:
        """`poll` until these transfers, by default all, have ended.

        Raises:
          ArgumentError: One was started by another object. Nothing has changed.
          StalePoolError, BorrowedError: As `poll`.
        """
        waited_for = list(self._open if tickets is None else tickets)
        for ticket in waited_for:
            if not ticket.is_done and ticket not in self._open:
                raise ArgumentError(f"tickets must be of transfers that were started here, got {ticket}")
        pool, ended = self.poll(pool)
        while left := [ticket for ticket in waited_for if not ticket.is_done]:
            queue = self._saving if left[0].direction is Direction.BACKUP else self._fetching
            if not queue:
                raise BrokenInvariantError(f"nothing is in flight that could end {left[0]}")
            self._wait(queue[0])
            pool, more = self.poll(pool)
            ended += more
        return pool, ended

    def close(self, pool: PoolT) -> PoolT:
        """Waits for all transfers."""
        return self.wait(pool)[0]

    def warmed_up(self, pool: PoolT) -> PoolT:
        """The pool, consumed and given back unchanged, with the steps for every size of block compiled."""
        nothing = np.zeros(0, np.int32)
        for host in self._memory.values():
            names, mesh = stack_names(host), pool.mesh
            for power in range(self._most_ids(host).bit_length()):
                ids = np.zeros(1 << power, np.int32)
                gathered(pool, ids, names=names, layout=host.layout, mesh=mesh)
                arrays, pending = self._link.fetch(host, nothing, *blocks_like(pool, host, len(ids)))
                pending.wait()
                pool = scattered(pool, ids, *arrays, names=names, layout=host.layout, mesh=mesh)
        return pool

    # ---- tickets and blocks --------------------------------------------------------------------------------------

    def _ticket(self, direction: Direction, moves: Iterable[Move], state: HostState) -> tuple[Ticket, list[_Block]]:
        """A ticket whose host ids are PROTECTED, and its blocks; or an error, and nothing has changed."""
        ticket = Ticket(direction, tuple(moves))
        names = [move.component for move in ticket.moves]
        if len(set(names)) < len(names):
            raise ArgumentError(f"moves must have one move a component, got {names}: put its ids together")
        for move in ticket.moves:
            self._check(move, state)
        blocks = []
        for move in ticket.moves:
            pool = self._memory[move.component]
            pool.start_transfer(move.host_ids, state)
            blocks += self._blocks(ticket, pool, move)
        ticket.blocks_left = len(blocks)
        self._open.append(ticket)
        return ticket, blocks

    def _check(self, move: Move, state: HostState) -> None:
        pool = self._pool_of(move.component)
        host_ids, device_ids = pool.require("host_ids", move.host_ids, state), np.asarray(move.device_ids)
        if device_ids.shape != host_ids.shape or not np.issubdtype(device_ids.dtype, np.integer):
            raise ArgumentError(
                f"device_ids must be as many integers as host_ids, {len(host_ids)}, got "
                f"{device_ids.dtype}{list(device_ids.shape)}"
            )
        last = pool.device_ids
        outside = (device_ids < 1) | (device_ids > last)
        if outside.any():
            raise OwnershipError(
                f"device_ids of {move.component!r}: each must be in [1, {last}], got {device_ids[outside.argmax()]}"
            )
        if len(np.unique(device_ids)) < len(device_ids):
            raise OwnershipError(f"device_ids of {move.component!r}: each must be named once, got {device_ids}")

    def _pool_of(self, component: str) -> HostPool:
        if component not in self._memory:
            raise ArgumentError(
                f"component must be one that has host memory, {sorted(self._memory)}, got {component!r}"
            )
        return self._memory[component]

    def _blocks(self, ticket: Ticket, pool: HostPool, move: Move) -> Iterator[_Block]:
        order = np.argsort(move.host_ids)
        host_ids = np.asarray(move.host_ids, np.int32)[order]
        device_ids = np.asarray(move.device_ids, np.int32)[order]
        most = self._most_ids(pool)
        for start in range(0, len(order), most):
            part = host_ids[start : start + most]
            padded = np.zeros(1 << (len(part) - 1).bit_length(), np.int32)
            padded[: len(part)] = device_ids[start : start + most]
            yield _Block(ticket, pool, padded, part, len(padded) * pool.block_bytes)

    def _most_ids(self, pool: HostPool) -> int:
        """Ids of the largest block: a power of two, at least 1, and no more than there are on the device."""
        most = max(1, self._memory.config.staging_bytes // BLOCKS // pool.block_bytes)
        return 1 << (min(most, 1 << (pool.device_ids - 1).bit_length()).bit_length() - 1)

    def _start_saving(self, pool: MemoryPool, block: _Block) -> None:
        host = block.pool
        try:
            block.arrays = gathered(pool, block.device_ids, names=stack_names(host), layout=host.layout, mesh=pool.mesh)
            block.pending = self._link.save(block.arrays, host, block.host_ids)
        except (jax.errors.JaxRuntimeError, TransferError) as error:
            self._fail(block.ticket, error)
            self._end_block(block)
        else:
            self._saving.append(block)

    def _start_fetching(self, pool: MemoryPool) -> None:
        """Starts the loads that wait, as far as there is staging memory."""
        while self._queued:
            block = self._queued[0]
            used = self._bytes(self._fetching)
            if used and used + block.num_bytes > self._memory.config.staging_bytes:
                return
            self._queued.popleft()
            if block.ticket.error is None:
                try:
                    shapes, where = blocks_like(pool, block.pool, len(block.device_ids))
                    block.arrays, block.pending = self._link.fetch(block.pool, block.host_ids, shapes, where)
                except (jax.errors.JaxRuntimeError, TransferError) as error:
                    self._fail(block.ticket, error)
                else:
                    self._fetching.append(block)
                    continue
            self._end_block(block)

    def _settle(self) -> None:
        """Takes the backups that are done, oldest first."""
        while self._saving and self._is_done(self._saving[0]):
            self._end_block(self._saving.popleft())

    def _land(self, pool: PoolT) -> PoolT:
        """Writes what has arrived, oldest first."""
        while self._fetching and self._is_done(self._fetching[0]):
            block = self._fetching[0]
            if block.ticket.error is None:
                host, mesh = block.pool, pool.mesh
                pool = scattered(
                    pool, block.device_ids, *block.arrays, names=stack_names(host), layout=host.layout, mesh=mesh
                )
            self._end_block(self._fetching.popleft())
        return pool

    def _is_done(self, block: _Block) -> bool:
        if block.pending is None:
            return True
        try:
            return block.pending.is_done()
        except (jax.errors.JaxRuntimeError, TransferError) as error:
            self._fail(block.ticket, error)
            return True

    def _wait(self, block: _Block) -> None:
        if block.pending is not None:
            try:
                block.pending.wait()
            except (jax.errors.JaxRuntimeError, TransferError) as error:
                self._fail(block.ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if ticket.error is None:
            ticket.error = TransferError(f"a {ticket.direction.value} failed: {error}")

    def _end_block(self, block: _Block) -> None:
        block.arrays, block.pending = (), None
        block.ticket.blocks_left -= 1
        self._end_if_done(block.ticket)

    def _end_if_done(self, ticket: Ticket) -> None:
        if ticket.blocks_left or ticket.is_done:
            return
        ticket.is_done = True
        before = HostState.RESERVED if ticket.direction is Direction.BACKUP else HostState.BACKUP
        for move in ticket.moves:
            self._memory[move.component].end_transfer(
                move.host_ids, HostState.SYNCED if ticket.error is None else before
            )

    @staticmethod
    def _bytes(blocks: Iterable[_Block]) -> int:
        return sum(block.num_bytes for block in blocks)
