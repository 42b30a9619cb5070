"""Slots and tokens between torch callers and the host: allocators and prefix caches that take and return tensors.

The host owns allocation, in NumPy and int32; torch callers of SGLang hold int64 tensors on the device. Bringing a
tensor to the host waits for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from jaxcache.arguments import as_int32
from jaxcache.caches.base import MatchResult
from jaxcache.errors import ArgumentError
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator


def slots_to_torch(slots: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Slots of the host as an int64 tensor on `device`, a copy."""
    return torch.from_numpy(slots.astype(np.int64)).to(device)


def slots_to_host(name: str, slots: Any) -> np.ndarray:
    """Slots, lengths or tokens in a tensor, or in anything NumPy takes, as int32 on the host.

    Raises:
      ArgumentError: if they are not one-dimensional integers, or do not fit int32.
    """
    if isinstance(slots, torch.Tensor):
        if slots.is_floating_point() or slots.is_complex():
            raise ArgumentError(f"{name} must hold integers, got {slots.dtype}: convert it with .long()")
        slots = slots.detach().cpu().numpy()
    return as_int32(name, slots)


class TorchAllocator:
    """An allocator whose slots are int64 tensors on a device. See `BaseTokenToKVPoolAllocator` for each method.

    Args:
      host: The allocator; use it for everything that is not here.
      device: Where slots are wanted.

    Attributes:
      host: As given.
      device: As given.
    """

    def __init__(self, host: BaseTokenToKVPoolAllocator, device: torch.device | str):
        self.host = host
        self.device = torch.device(device)

    def available_size(self) -> int:
        """Slots that `alloc` could hand out now."""
        return self.host.available_size()

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Slots of fresh pages, or None if there are too few."""
        return self._to_torch(self.host.alloc(need_size))

    def alloc_extend(
        self, prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_loc: torch.Tensor, extend_num_tokens: int
    ) -> torch.Tensor | None:
        """Slots of the tokens that extend each request, or None if there are too few pages."""
        prefixes, lens = slots_to_host("prefix_lens", prefix_lens), slots_to_host("seq_lens", seq_lens)
        last = slots_to_host("last_loc", last_loc)
        return self._to_torch(self.host.alloc_extend(prefixes, lens, last, extend_num_tokens))

    def alloc_decode(self, seq_lens: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
        """Slot of one more token for each request, or None if there are too few pages."""
        lens, last = slots_to_host("seq_lens", seq_lens), slots_to_host("last_loc", last_loc)
        return self._to_torch(self.host.alloc_decode(lens, last))

    def free(self, free_index: torch.Tensor) -> None:
        """Frees the pages of these slots."""
        self.host.free(slots_to_host("free_index", free_index))

    def _to_torch(self, slots: np.ndarray | None) -> torch.Tensor | None:
        return None if slots is None else slots_to_torch(slots, self.device)


class TorchMatch(NamedTuple):
    """What a lookup found.

    Attributes:
      device_indices: int64 slot of each token of the prefix, on the device.
      host: The result as the cache gave it: what to lock, and what a host tier has.
    """

    device_indices: torch.Tensor
    host: MatchResult


class TorchPrefixCache:
    """A prefix cache whose keys and slots may be tensors. See `RadixCache` for each method.

    Args:
      host: The cache; use it for everything that is not here, requests included.
      device: Where slots are wanted.

    Attributes:
      host: As given.
      device: As given.
    """

    def __init__(self, host: Any, device: torch.device | str):
        self.host = host
        self.device = torch.device(device)

    def match_prefix(self, key: Any) -> TorchMatch:
        """The longest cached prefix of `key`: tokens in a tensor, or what `RadixCache.match_prefix` takes."""
        found = self.host.match_prefix(_key(key))
        return TorchMatch(slots_to_torch(found.device_indices, self.device), found)

    def insert(self, key: Any, value: torch.Tensor) -> int:
        """Caches `key` under the slots in `value`; returns the tokens that were cached already."""
        return self.host.insert(_key(key), slots_to_host("value", value))


def _key(key: Any) -> Any:
    return slots_to_host("key", key) if isinstance(key, torch.Tensor) else key
