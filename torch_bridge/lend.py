"""A pool in torch's hands: for a block, or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxcache.donation import DevicePool
from torch_bridge.pool import torch_pool


@contextlib.contextmanager
def borrow(pool: DevicePool) -> Iterator[Any]:
    """Torch tensors over a pool's memory for the length of a `with` block, to read and to write.

        with borrow(pool) as kv:
            kv.get_key_buffer(3)[slots] = keys

    At the start torch comes after everything that JAX was given, at the end JAX comes after what torch was given; the
    pool is the same object, with what torch wrote in it. In between it can be read, but not donated. However the block
    ends, the borrow does, and every tensor that it gave is dead: using one, or a slice of one, raises.

    Args:
      pool: Any pool on one device.

    Yields:
      A `TorchMHAPool` or `TorchMLAPool` for such pools, with SGLang's methods; for other pools a `TorchPool`.

    Raises:
      StalePoolError: if the pool was consumed.
      ShardingError: if it lies on several devices.
      ArgumentError: if it is being traced, or holds what torch has no dtype for.
      UnsupportedError: if torch cannot reach its device.
      BorrowedError: (from JAX's side, in the block) if the pool is donated, by `donating` or a pool method; nothing is
        lost. A jit of your own that donates it is refused by JAX on a GPU, and on a CPU copies the pool.

    Cost: some 50 us, whatever the size of the pool.
    """
    kv = torch_pool(pool)
    kv.fence()
    holds = [buffer.__dlpack__() for buffer in pool.buffers]  # a GPU refuses to donate what somebody holds
    pool.mark_borrowed()
    try:
        yield kv
    finally:
        pool.unmark_borrowed()
        holds.clear()
        kv.close()


def share(pool: DevicePool) -> Any:
    """Torch tensors over a pool's memory that stay valid while JAX updates the pool in place.

        kv = share(pool)
        pool = step(pool, ...)                       # made by donating: JAX comes after torch, torch after the step
        attend(q, kv.get_key_buffer(3))              # sees what the step wrote

    Every step made by `donating`, and every pool method, waits for torch, is waited for, and is followed: `kv.pool` is
    the pool of this moment. A step that does not leave the pool in its memory ends the view: torch's next use of it
    raises DeadViewError and names the step; the pool that the step returned is unharmed. A jit of your own is not
    seen: donate through `donating`, and put `kv.fence()` around one that only reads.

    The memory lives as long as any of the tensors. `kv.close()`, or a `with` block, ends the view.

    Args:
      pool: Any pool on one device.

    Returns:
      As `borrow`.

    Raises:
      StalePoolError, ShardingError, ArgumentError, UnsupportedError: as `borrow`.

    Cost: some 50 us, and at each step some 20 us for torch to wait, 100 more if torch is still busy.
    """
    kv = torch_pool(pool)
    kv.fence()
    return kv
