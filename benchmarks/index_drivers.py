"""One request through a prefix cache, in the four steps that are timed; a driver for each cache and kind of key.

    prepare   (not timed)  the prompt, and the sequence (prompt and answer), in the form that the cache takes
    match                  longest cached prefix of the prompt
    make_room              evict until the whole sequence would fit
    allocate               fresh pages for the whole sequence
    insert                 offer them
    free_duplicates        give back those the cache had already

No lock is held between the steps, so `make_room` may take what `match` found: the sequence gets fresh pages throughout.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from benchmarks.sglang_tree import SGLangClasses
from jaxcache.caches.radix import RadixCache
from jaxcache.index.key import RadixKey
from jaxcache.index.policies.registry import Policy
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator


class Driver(abc.ABC):
    """A cache with room for `device_tokens` tokens."""

    @abc.abstractmethod
    def prepare(self, prompt: np.ndarray, sequence: np.ndarray) -> None:
        """Takes the next request's tokens, int32."""

    @abc.abstractmethod
    def match(self) -> int:
        """Tokens found."""

    @abc.abstractmethod
    def make_room(self) -> bool:
        """True if something had to go."""

    @abc.abstractmethod
    def allocate(self) -> None: ...

    @abc.abstractmethod
    def insert(self) -> None: ...

    @abc.abstractmethod
    def free_duplicates(self) -> None: ...


class Packed(Driver):
    """RadixCache with its real allocator; keys are packed once a request, before the clock starts."""

    prompt: Any
    sequence: Any
    values: Any
    tokens: int
    present: int

    def __init__(self, device_tokens: int, page_size: int, policy: Policy = Policy.LRU):
        size = device_tokens // page_size * page_size
        self.allocator: BaseTokenToKVPoolAllocator = (
            TokenToKVPoolAllocator(size) if page_size == 1 else PagedTokenToKVPoolAllocator(size, page_size)
        )
        self.cache = RadixCache(None, self.allocator, page_size, policy=policy)
        self.page_size = page_size

    def prepare(self, prompt: np.ndarray, sequence: np.ndarray) -> None:
        self.tokens = len(sequence) // self.page_size * self.page_size
        self.prompt, self.sequence = self.as_key(prompt), self.as_key(sequence)

    def as_key(self, tokens: np.ndarray) -> Any:
        """Tokens as this driver's caller has them."""
        return RadixKey(tokens)

    def match(self) -> int:
        return self.cache.match_prefix(self.prompt).prefix_len

    def make_room(self) -> bool:
        short = self.tokens - self.allocator.available_size()
        return short > 0 and self.cache.evict(short) > 0

    def allocate(self) -> None:
        self.values = self.allocator.alloc_pages(self.tokens // self.page_size)

    def insert(self) -> None:
        self.present = self.cache.insert_pages(self.sequence, self.values)

    def free_duplicates(self) -> None:
        if self.present:
            self.allocator.release(self.values[: self.present // self.page_size], PageState.PRIVATE)


class NumPyKeys(Packed):
    """Keys are int32 arrays: `match` and `insert` convert them, each."""

    def as_key(self, tokens: np.ndarray) -> np.ndarray:
        return tokens


class ListKeys(Packed):
    """Keys are Python lists: `match` and `insert` convert them, each."""

    def as_key(self, tokens: np.ndarray) -> list[int]:
        return tokens.tolist()


class Slots(Packed):
    """Packed keys; a match is expanded to one slot a token, and insert is given slots and checks them."""

    def match(self) -> int:
        return len(self.cache.match_prefix(self.prompt).device_indices)

    def allocate(self) -> None:
        self.values = self.allocator.alloc(self.tokens)

    def insert(self) -> None:
        self.present = self.cache.insert(self.sequence, self.values)

    def free_duplicates(self) -> None:
        if self.present:
            self.allocator.free(self.values[: self.present])


class TreeAlone(Packed):
    """Packed keys in a RadixCache without an allocator: pages are numbers that nobody checks or keeps a list of."""

    def __init__(self, device_tokens: int, page_size: int):
        super().__init__(device_tokens, page_size)
        self.available = self.allocator.size
        self.cache = RadixCache(None, None, page_size)
        self._numbers = np.arange(device_tokens, dtype=np.int32)

    def make_room(self) -> bool:
        short = self.tokens - self.available
        if short <= 0:
            return False
        self.available += self.cache.evict(short)
        return True

    def allocate(self) -> None:
        self.available -= self.tokens
        self.values = self._numbers[: self.tokens // self.page_size].copy()

    def free_duplicates(self) -> None:
        self.available += self.present


class SGLang(Driver):
    """SGLang's RadixCache and allocator, given what they take natively: lists, and int64 slots as a tensor."""

    allocator: Any

    def __init__(self, sglang: SGLangClasses, device_tokens: int, page_size: int):
        import torch

        torch.set_num_threads(1)
        self.page_size = page_size
        self._make_allocator(sglang, device_tokens // page_size * page_size)
        self.cache = sglang.radix_cache(None, self.allocator, page_size)

    def _make_allocator(self, sglang: SGLangClasses, size: int) -> None:
        import torch

        rest = {"dtype": torch.bfloat16, "device": "cpu", "kvcache": None, "need_sort": False}
        if self.page_size == 1:
            self.allocator = sglang.token_allocator(size, **rest)
        else:
            self.allocator = sglang.paged_allocator(size, self.page_size, **rest)

    def prepare(self, prompt: np.ndarray, sequence: np.ndarray) -> None:
        self.tokens = len(sequence) // self.page_size * self.page_size
        self.prompt, self.whole_pages = prompt.tolist(), sequence[: self.tokens].tolist()

    def match(self) -> int:
        return len(self.cache.match_prefix(self.prompt).device_indices)

    def make_room(self) -> bool:
        short = self.tokens - self.allocator.available_size()
        if short <= 0:
            return False
        self.cache.evict(short)
        return True

    def allocate(self) -> None:
        self.slots = self.allocator.alloc(self.tokens)

    def insert(self) -> None:
        self.present = self.cache.insert(self.whole_pages, self.slots)

    def free_duplicates(self) -> None:
        self.allocator.free(self.slots[: self.present])


class SGLangTreeAlone(SGLang):
    """SGLang's RadixCache with an allocator that only counts, so that nothing but the tree is timed."""

    def _make_allocator(self, sglang: SGLangClasses, size: int) -> None:
        self.allocator = CountingAllocator(size)


class CountingAllocator:
    """As much of an allocator as SGLang's tree needs: it knows how many slots are free, not which."""

    device = "cpu"

    def __init__(self, size: int):
        import torch

        self._available = size
        self._slots = torch.arange(size, dtype=torch.int64)

    def available_size(self) -> int:
        """Free slots."""
        return self._available

    def alloc(self, need_size: int) -> Any:
        """Some slots, always the same."""
        self._available -= need_size
        return self._slots[:need_size].clone()

    def free(self, slots: Any) -> None:
        """Gets slots back."""
        self._available += len(slots)
