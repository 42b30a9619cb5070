"""Device memory as frozen pytrees: what donation and other frameworks ask of a pool."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, Self

import jax
from jax.core import Tracer

from jaxcache.errors import BorrowedError, StalePoolError


class PoolView(Protocol):
    """A view of a pool's memory that another framework keeps, be it across donated steps. None of these may raise."""

    def before_step(self) -> Any:
        """An array that is ready when what the other framework was given is done: JAX's next step waits for it."""

    def after_step(self, step: str, returned: Sequence[DevicePool]) -> None:
        """JAX was given a step that consumed the pool; the memory is now that of one of `returned`, or lost."""

    def after_read(self, done: jax.Array) -> None:
        """JAX was given a step that reads the memory until `done` is ready: the other framework comes after it."""


class DevicePool:
    """Base of every pytree whose arrays live on the device and are updated by donation.

    Subclasses are frozen dataclasses registered as pytrees: the arrays are the leaves, everything else is static. An
    update returns a new pool and consumes the old one, whose arrays are gone from then on (`is_stale`).

    The borrow mark belongs to the instance and is no part of the pytree: it changes no tree structure, causes no
    retrace, and does not travel through a jit. Code that hands a view of the arrays to another framework marks the pool
    for as long. A pool may consist of pools: a mark on the whole is one on each of them, and a mark on one of them
    forbids donating the whole.
    """

    borrow_count: ClassVar[int] = 0  # an instance gets its own through object.__setattr__: the dataclass is frozen
    views: ClassVar[tuple[weakref.ref[PoolView], ...]] = ()  # likewise
    last_read: ClassVar[jax.Array | None] = None  # likewise; ready when the last step made by `reading` is done

    @property
    def buffers(self) -> tuple[Any, ...]:
        """The arrays. They belong to the pool: a donated step consumes them."""
        return tuple(jax.tree_util.tree_leaves(self))

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays, padding included; over all shards, a copy on several devices counted once."""
        return sum(math.prod(buffer.shape) * buffer.dtype.itemsize for buffer in self.buffers)

    @property
    def is_stale(self) -> bool:
        """True once a donated step consumed the arrays of this pool."""
        return any(map(_is_deleted, self.buffers))

    def require_live(self) -> None:
        """Raises StalePoolError if a donated step consumed this pool."""
        if self.is_stale:
            raise StalePoolError(
                f"this {type(self).__name__} was consumed by an earlier donated step and its arrays are gone: "
                "use the pool which that step returned"
            )

    def require_donatable(self) -> None:
        """Raises StalePoolError if this pool was consumed, BorrowedError if it or a part of it is borrowed."""
        self.require_live()
        self.require_unborrowed()

    @property
    def is_shared(self) -> bool:
        """Whether another framework has borrowed, or looks into, this pool or a part of it."""
        return any(part.borrow_count or part.views for part in self.with_parts())

    def require_unborrowed(self) -> None:
        """Raises BorrowedError if this pool or a part of it is borrowed."""
        for part in self.with_parts():
            if part.borrow_count:
                raise BorrowedError(
                    f"this {type(part).__name__} is borrowed {part.borrow_count} time(s) and its memory must not "
                    "change: end the borrow first"
                )

    def replaced(self, **parts: Any) -> Self:
        """This pool with other parts. Who sees the memory of the arrays that stay is told of their steps as before."""
        pool = dataclasses.replace(self, **parts)  # pyright: ignore[reportArgumentType]
        object.__setattr__(pool, "views", self.views)
        return pool

    def add_view(self, view: PoolView) -> None:
        """Has `donating` and `reading` tell `view` of each step on this pool, for as long as `view` is alive."""
        kept = tuple(ref for ref in self.views if ref() is not None) if self.views else ()
        object.__setattr__(self, "views", (*kept, weakref.ref(view)))

    def remove_view(self, view: PoolView) -> None:
        """Unregisters a view that has ended: it gets no further notice."""
        kept = tuple(ref for ref in self.views if ref() not in (None, view))
        object.__setattr__(self, "views", kept)

    def require_unshared(self) -> None:
        """Raises as `require_donatable` does, or BorrowedError if any framework has a view of the memory."""
        self.require_donatable()
        if _views_of(self.with_parts()):
            raise BorrowedError(
                f"this {type(self).__name__} is shared with another framework, whose tensors would lie in memory that "
                "is gone: close the share first, and share the pool again afterwards"
            )

    def mark_borrowed(self) -> None:
        """Forbids donating this pool until `unmark_borrowed` was called as often. O(1)."""
        for pool in self.with_parts():
            object.__setattr__(pool, "borrow_count", pool.borrow_count + 1)

    def unmark_borrowed(self) -> None:
        """Takes one borrow mark back. Raises BorrowedError if there is none."""
        pools = self.with_parts()
        if any(pool.borrow_count == 0 for pool in pools):
            raise BorrowedError(
                f"this {type(self).__name__} is not borrowed: call unmark_borrowed once for each mark_borrowed, "
                "on the same pool object"
            )
        for pool in pools:
            object.__setattr__(pool, "borrow_count", pool.borrow_count - 1)

    def with_parts(self) -> list[DevicePool]:
        """This pool, and those of its attributes that are pools, with theirs."""
        pools: list[DevicePool] = [self]
        for value in vars(self).values():
            if isinstance(value, DevicePool):
                pools += value.with_parts()
        return pools


def _views_of(parts: Iterable[DevicePool]) -> list[PoolView]:
    """The views of these pools that are still alive."""
    return [view for part in parts for ref in part.views if (view := ref()) is not None]


def _is_deleted(leaf: Any) -> bool:
    """True for an array whose memory is gone; tracers, shapes and NumPy arrays cannot be deleted."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()
