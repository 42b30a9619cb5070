"""Whether a request fits, and whom to retract so that one does: asked before anything is taken. Nothing changes here.

Every component of the cache is asked alike: how many values the request needs of it, how many are free, how many are
cached and could be evicted, how many there are in all.

Source: jaxcache's own; SGLang 0.5.2 schedule_policy.py, PrefillAdder, and schedule_batch.py, retract_decode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxcache.arguments import as_count, require_kind
from jaxcache.caches.radix import RadixCache
from jaxcache.errors import ArgumentError, RequestStateError
from jaxcache.index.node import Node
from jaxcache.request import Request, RequestState


@dataclass(frozen=True)
class Room:
    """Whether a request fits.

    Attributes:
      now: There is a row, and memory for all its tokens, without evicting anything. (Checkpoints of recurrent states
        are no need: they take the place of older ones.)
      after_evicting: There is a row, and memory if what is cached and not in use is evicted, as `extend` and `decode`
        do by themselves. True where `now` is.
      never: Why the request cannot run here even alone; None if it can. Where no request runs, either this
        says why or `after_evicting` is True: to wait is never in vain.
    """

    now: bool
    after_evicting: bool
    never: str | None = None


@dataclass(frozen=True)
class _Need:
    """What a request needs of one component, and what there is, in values of the component.

    Attributes:
      free: What is free now.
      evictable: What is cached and not in use, of this request's prefix too.
      found: What is cached of this request's prefix.
      shared: What of that is in use by others, and so neither free nor evictable.
      peak: What the request has at once, of its prefix too, if it gives up what it no longer needs.
      kept: What it has if it gives up nothing.
    """

    free: int
    evictable: int
    found: int
    shared: int
    peak: int
    kept: int

    @property
    def is_free(self) -> bool:
        return self.kept - self.found <= self.free

    @property
    def is_evictable(self) -> bool:
        return self.peak <= self.free + self.evictable + self.shared


class RoomSearch:
    """Looks for room in one manager.

    Args:
      cache: The prefix cache, with all components.
      max_context_len: Most tokens of a request.
      largest_step: Most tokens that a step computes.
    """

    def __init__(self, cache: RadixCache, max_context_len: int, largest_step: int):
        self._cache, self._page_size = cache, cache.page_size
        self._max_context_len, self._largest_step = max_context_len, largest_step

    def largest_chunk(self, computed: int) -> int:
        """Most tokens that a request with so many computed ones can compute in one step if it runs alone.

        What a step computes has a value a page of every component, beside the window before it.
        """
        most = self._largest_step
        for component in self._cache.tree_components:
            if component.per_page and component.component.reach != math.inf:
                pages = component.size() - self._window_pages(min(component.component.reach, computed))
                most = min(most, max(pages, 1) * self._page_size)
        return most

    def require_possible(self, request: Request) -> None:
        """Refuses what cannot be admitted, ever.

        Raises:
          RequestStateError: It is running or done.
          ArgumentError: It is longer than `max_context_len`, or than the memory.
        """
        _require_waiting(request)
        never = self._why_never(request.num_tokens)
        if never is not None:
            raise ArgumentError(f"request {request.rid} can never run here: {never}; end it, or configure more memory")

    def room_for(self, request: Request, reserve: int, rows: int) -> Room:
        """Whether a waiting request fits: rows and values of every component in one answer. Changes nothing.

        What others will need as they grow is not counted: `reserve` is what to leave for that as well.

        Args:
          request: Not running.
          reserve: Tokens to leave room for beyond those it has, such as those that it will sample.
          rows: Free rows of the request table.

        Raises:
          RequestStateError: It is running or done.
          ArgumentError: `reserve` is negative.

        Cost: a lookup in the prefix cache.
        """
        _require_waiting(request)
        tokens = request.num_tokens + as_count("reserve", reserve)
        never = self._why_never(tokens)
        if never is not None:
            return Room(now=False, after_evicting=False, never=never)
        needs = list(self._needs(request, tokens))
        now = rows > 0 and all(need.is_free for need in needs)
        return Room(now, now or (rows > 0 and all(need.is_evictable for need in needs)))

    def _why_never(self, tokens: int) -> str | None:
        """Why a request of so many tokens cannot run here; None if it can."""
        if tokens > self._max_context_len:
            return f"it has {tokens} tokens, max_context_len is {self._max_context_len}"
        for component in self._cache.tree_components:
            needed = component.per_request + component.per_page * self._at_once(tokens, component.component.reach, 1)
            if needed > component.size():
                name, size = component.name, component.size()
                return f"its {tokens} tokens need {needed} of component {name!r} at once, there are {size}"
        return None

    def _needs(self, request: Request, tokens: int) -> Iterator[_Need]:
        """What each component is asked for, if the request grows to so many tokens."""
        path, length = self._prefix(request)
        new_pages = self._pages(tokens) - length // self._page_size
        for i, component in enumerate(self._cache.tree_components):
            _, free, evictable = self._cache.usage(component.name)
            if not component.per_page:
                is_idle = bool(path) and component.per_request > 0 and not path[-1].slot(i).locks
                needed = component.per_request
                yield _Need(free, evictable, 0, 0, peak=needed + is_idle, kept=needed)  # what it is copied from stays
                continue
            reach = component.component.reach
            found, shared = _found(path, length, i, length - reach, self._page_size)
            peak = self._at_once(tokens, reach, min(tokens - length, self.largest_chunk(tokens)))
            yield _Need(free, evictable, found, shared, peak, kept=new_pages + found)

    def _prefix(self, request: Request) -> tuple[list[Node], int]:
        """The nodes that hold what `admit` would find of a request, and its tokens. No use of anything."""
        key = request.key[: request.matchable_len]
        path, _, length = self._cache.tree.find(key.bigrams() if self._cache.is_eagle else key)
        return [node for node in path if node.start < length], length

    def _at_once(self, tokens: int, reach: float, chunk: int) -> int:
        """Pages that have a value at once while so many tokens are computed chunk by chunk, old ones being given up."""
        if reach == math.inf:
            return self._pages(tokens)
        return min(self._pages(tokens), self._window_pages(reach) + self._pages(chunk))

    def _window_pages(self, reach: float) -> int:
        """Pages that so many tokens lie in, at most."""
        return self._pages(int(reach)) + 1

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _found(path: Sequence[Node], length: int, component: int, since: float, page_size: int) -> tuple[int, int]:
    """Values of a component from token `since` to `length` of a path; and those of them that a lock covers."""
    first_page = int(max(since, 0)) // page_size
    found = shared = 0
    for node in path:
        slot = node.slot(component)
        if slot.value is not None:
            pages = max(min(node.end, length) // page_size - max(node.start // page_size, first_page), 0)
            found += pages
            shared += pages if slot.locks else 0
    return found, shared


def cost_to_compute_again(request: Request) -> int:
    """Tokens that a running request would have to compute again once all that no other request uses was evicted."""
    shared, node = 0, request.lock.node if request.lock is not None else None
    while node is not None and node.parent is not None:
        shared += node.tokens if node.locks > 1 else 0
        node = node.parent
    return request.kv_len - shared


def cheapest_victim(requests: Sequence[Request], tokens: int = 0) -> Request | None:
    """Whom of these running requests to retract: of the lowest priority, whom it costs least to compute again.

    Prefixes that others use stay where they are, and cost nothing. Of equals it is the last. None without requests.

    Args:
      requests: Running requests.
      tokens: That are short. Who would give up fewer is proposed only if all would.

    Raises:
      ArgumentError: `tokens` is negative.

    Cost: O(nodes of the tree that they lock).
    """
    tokens = as_count("tokens", tokens)
    costs = [(request, cost_to_compute_again(request)) for request in reversed(requests)]
    enough = [each for each in costs if each[1] >= tokens] or costs
    return min(enough, key=lambda each: (each[0].priority, each[1]), default=(None, 0))[0]


def _require_waiting(request: Request) -> None:
    require_kind("request", request, Request)
    if request.state not in (RequestState.WAITING, RequestState.RETRACTED):
        raise RequestStateError(f"request {request.rid} is {request.state.value}: only a waiting one can be admitted")
