"""A pool in torch's hands: for a block, or for good."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from jaxcache.device.pool import DevicePool
from torch_bridge.pool import torch_pool


def borrow(pool: DevicePool) -> Borrow:
    """Torch tensors over a pool's memory for the length of a `with` block, to read and to write.

        with borrow(pool) as kv:
            kv.get_key_buffer(3)[slots] = keys

    At the start torch comes after the steps that made the pool and after what its own methods read, at the end all of
    JAX comes after what torch was given; the pool is the same object, with what torch wrote in it. In between it can be
    read, but not donated. However the block ends, the borrow does, and every tensor that it gave is dead: using one, or
    a slice of one, raises. (A jit of your own that only reads, and may still be at it when torch writes, is not known
    here: call `kv.fence()` first.)

    Args:
      pool: Any pool on one device.

    Returns:
      A context manager. It gives a `TorchMHAPool` or `TorchMLAPool` for such pools, with SGLang's methods; for other
      pools a `TorchPool`.

    Raises:
      StalePoolError: (entering) if the pool was consumed.
      ShardingError: if it lies on several devices.
      ArgumentError: if it is being traced, or holds what torch has no dtype for.
      UnsupportedError: if torch cannot reach its device.
      BorrowedError: (from JAX's side, in the block) if the pool is donated, by `donating` or a pool method; nothing is
        lost. A jit of your own that donates it is refused by JAX on a GPU, and on a CPU copies the pool.

    Cost: some 50 us of the host on a GPU, whatever the size of the pool, and no wait.
    """
    return Borrow(pool)


class Borrow:
    """The block of a `borrow`."""

    def __init__(self, pool: DevicePool):
        self._pool = pool

    def __enter__(self) -> Any:
        self._kv = torch_pool(self._pool)
        self._holds = self._kv.torch_after_jax()  # a GPU refuses to donate what is held elsewhere
        self._pool.mark_borrowed()
        return self._kv

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.unmark_borrowed()
        self._holds.clear()
        self._kv.close()


def share(pool: DevicePool) -> Any:
    """Torch tensors over a pool's memory that stay valid while JAX updates the pool in place.

        kv = share(pool)
        pool = step(pool, ...)                       # made by donating: JAX comes after torch, torch after the step
        attend(q, kv.get_key_buffer(3))              # sees what the step wrote

    Every step made by `donating`, and every pool method, waits for torch, is waited for, and is followed: `kv.pool` is
    the pool of this moment. A step that does not leave the pool in its memory ends the view: torch's next use of it
    raises DeadViewError and names the step; the pool that the step returned is unharmed. A jit of your own is not
    seen: put `kv.fence()` around one that only reads. If it donates the pool, the methods of `kv` say so afterwards,
    but on a GPU tensors kept from before cannot know that the memory has another owner.

    The memory lives as long as any of the tensors. `kv.close()`, or a `with` block, ends the view.

    Args:
      pool: Any pool on one device.

    Returns:
      As `borrow`.

    Raises:
      StalePoolError, ShardingError, ArgumentError, UnsupportedError: as `borrow`.

    Steps of a shared pool take one more argument, which they wait for, so they are compiled again: share the pool
    before `warm_up`.

    Cost: some 50 us of the host on a GPU; at each step some 30 us, and some 50 where torch works between the steps.
    """
    kv = torch_pool(pool)
    kv.torch_after_jax()
    return kv
