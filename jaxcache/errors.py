"""Every error a user can see. Shortage is not an error: it is a returned `None`.

Wrong use raises before anything has changed, and the message names the argument, the rule, the value and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_MESSAGE = 1000


class CacheError(Exception):
    """Base of everything jaxcache raises on purpose. Its message is bounded, whatever value it names."""

    def __init__(self, *args: object):
        super().__init__(*(_bounded(arg) if isinstance(arg, str) else arg for arg in args))


def _bounded(message: str) -> str:
    """The beginning and the end of a long message: its end has the rule or the remedy."""
    half = _MAX_MESSAGE // 2
    return message if len(message) <= _MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def shown(value: object, show: Callable[[object], str] = repr) -> str:
    """A value for a message: its `repr`, or its type where it has none, as a deleted array."""
    try:
        return show(value)
    except RuntimeError:
        return f"a {type(value).__name__} that cannot be read"


class ArgumentError(CacheError, ValueError):
    """An argument has the wrong type, dtype, shape, range or alignment."""


class OwnershipError(CacheError):
    """A page or state is used by another than its owner, or is none that can be owned."""


class DoubleFreeError(OwnershipError):
    """A page is freed that is free already."""


class ReceiptError(CacheError):
    """A lock's receipt was given back twice, to another tree, or after a reset."""


class LockedError(CacheError):
    """A locked entry would be evicted or dropped."""


class SnapshotError(CacheError):
    """A mark of an allocator is not valid any more, or a saved cache is damaged or does not match this config."""


class RequestStateError(CacheError):
    """A call is not allowed in the request's present state, or its plan is outdated."""


class TransferError(CacheError):
    """A transfer between the device and host memory failed; what it was to fill holds nothing."""


class StalePoolError(CacheError):
    """A pool was used after a donated step consumed it."""


class ReleasedError(CacheError):
    """The pool is needed, but its device memory was released and not resumed yet."""


class BorrowedError(CacheError):
    """A pool would be donated, or its memory released, while another framework has a view of it."""


class DeadViewError(CacheError):
    """Another framework's view of a pool was used after it was closed, or after the pool moved."""


class ShardingError(CacheError):
    """A sharded pool is used outside the `jax.shard_map` over its axis, or is cut differently from its config."""


class NotInPlaceError(CacheError):
    """A step copies a buffer that it should update in place."""


class UnsupportedError(CacheError):
    """An implementation cannot run here; the message says what is missing."""


class ThreadError(CacheError):
    """A call from a thread that does not own the manager or cache; nothing has changed."""


class TraceError(CacheError):
    """A trace file is missing or malformed; the message names the file and the line."""


class BrokenInvariantError(CacheError):
    """Internal consistency is lost: a bug in jaxcache, or code that changed its state without asking it."""
