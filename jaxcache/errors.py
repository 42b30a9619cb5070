"""Every error a user can see. Shortage is not an error: it is a returned `None`.

Wrong use raises before anything has changed, and the message names the argument, the rule, the value and the remedy.
"""


class CacheError(Exception):
    """Base of everything jaxcache raises on purpose."""


class ArgumentError(CacheError, ValueError):
    """An argument has the wrong type, dtype, shape, range or alignment."""


class OwnershipError(CacheError):
    """A page was used by somebody who does not own it, or is not a page that can be owned."""


class DoubleFreeError(OwnershipError):
    """A page was freed that is free already."""


class ReceiptError(CacheError):
    """A lock receipt was given back twice, to another tree, or after a reset."""


class LockedError(CacheError):
    """Something was to be let go that a lock covers."""


class SnapshotError(CacheError):
    """A snapshot cannot be restored: one of an allocator any more, a saved cache not here or not at all."""


class RequestStateError(CacheError):
    """A request was asked for something its present state does not allow."""


class StalePoolError(CacheError):
    """A pool was used after a donated step consumed it."""


class ReleasedError(CacheError):
    """Something needs the pool, whose device memory was released and not resumed yet."""


class BorrowedError(CacheError):
    """A pool was to be donated, or its memory released, while another framework holds a view of it."""


class DeadViewError(CacheError):
    """Another framework's view of a pool was used after its time: it was closed, or the pool is elsewhere."""


class ShardingError(CacheError):
    """A sharded pool was used outside the `jax.shard_map` over its axis, or was cut differently from its config."""


class NotInPlaceError(CacheError):
    """A step copies a buffer that it was supposed to update in place."""


class UnsupportedError(CacheError):
    """An implementation cannot run here; the message says what is missing."""


class TraceError(CacheError):
    """A trace file is missing or malformed; the message names the file and the line."""


class BrokenInvariantError(CacheError):
    """Internal consistency is lost: a bug in jaxcache, or code that changed its state without asking it."""


BrokenInvariant = BrokenInvariantError
