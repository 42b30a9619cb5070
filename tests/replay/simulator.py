"""The brute-force twin of a replay: `python -m tests.replay.simulator TRACE --requests 2000 --device-tokens 3000000`.

It watches the calls that reach the cache (who was looked up, locked, inserted, released, how much was to be evicted)
and does each to a tree of its own, which is as plain as can be: lists of nodes, children looked through one by one,
locks counted node by node, the victim found by looking at every node. It never looks at what the cache answered. At the
end both must have found the same tokens in the same requests and evicted the same number.

The rules: a match uses the nodes it covers whole; a lock cuts the node it ends inside; an insert cuts where the new
tokens leave what is there, adds them as one leaf and uses the whole path; a node whose last lock goes has just been
used. Using a path makes the node next to the root the youngest. The victim is the leaf without lock that was used
longest ago; it goes whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxcache.manager.manager import MemoryManager
from jaxcache.replay.config import ReplayConfig
from jaxcache.replay.result import ReplayResult
from jaxcache.replay.run import run_replay
from jaxcache.replay.trace import TraceRequest
from tests.support.replays import few_shapes
from tests.support.shared_steps import share_steps

TOKEN_BYTES = 4


class PlainNode:
    """Some pages of tokens below a parent."""

    def __init__(self, tokens: bytes, parent: PlainNode | None):
        self.tokens = tokens
        self.parent = parent
        self.children: list[PlainNode] = []
        self.locks = 0
        self.used = 0


class PlainCache:
    """The rules of the module, and nothing clever. Lengths are bytes, whole pages."""

    def __init__(self, page_size: int):
        self.page_bytes = TOKEN_BYTES * page_size
        self.root = PlainNode(b"", None)
        self.nodes: list[PlainNode] = []
        self.clock = 0

    def walk(self, tokens: bytes) -> tuple[list[PlainNode], int]:
        """The nodes that `tokens` lead through, the last perhaps in part, and the bytes found."""
        path, at, node = [], 0, self.root
        while True:
            page = tokens[at : at + self.page_bytes]
            found = next((child for child in node.children if child.tokens[: self.page_bytes] == page), None)
            if found is None or len(page) < self.page_bytes:
                return path, at
            path.append(found)
            same = self.page_bytes
            while same < len(found.tokens) and self._same_page(found, same, tokens, at + same):
                same += self.page_bytes
            at += same
            if same < len(found.tokens):
                return path, at
            node = found

    def _same_page(self, node: PlainNode, start: int, tokens: bytes, at: int) -> bool:
        page = tokens[at : at + self.page_bytes]
        return len(page) == self.page_bytes and node.tokens[start : start + self.page_bytes] == page

    def use(self, path: list[PlainNode]) -> None:
        for node in reversed(path):
            self.clock += 1
            node.used = self.clock

    def match(self, tokens: bytes) -> int:
        path, found = self.walk(tokens)
        covered = sum(len(node.tokens) for node in path)
        self.use(path if covered == found else path[:-1])
        return found

    def cut(self, node: PlainNode, start: int) -> PlainNode:
        """The first `start` bytes of `node` become a node of their own, above it and just used."""
        upper = PlainNode(node.tokens[:start], node.parent)
        upper.locks, upper.children = node.locks, [node]
        self.use([upper])
        assert node.parent is not None
        node.parent.children[node.parent.children.index(node)] = upper
        node.tokens, node.parent = node.tokens[start:], upper
        self.nodes.append(upper)
        return upper

    def path_of(self, tokens: bytes) -> list[PlainNode]:
        """The nodes of a cached prefix, the last one cut to end with it."""
        path, found = self.walk(tokens)
        assert found == len(tokens), "what the replay locks is not cached here"
        inside = found - sum(len(node.tokens) for node in path[:-1])
        if path and inside < len(path[-1].tokens):
            path[-1] = self.cut(path[-1], inside)
        return path

    def lock(self, tokens: bytes) -> None:
        for node in self.path_of(tokens):
            node.locks += 1

    def unlock(self, tokens: bytes) -> None:
        for node in reversed(self.path_of(tokens)):
            node.locks -= 1
            assert node.locks >= 0
            if not node.locks:
                self.use([node])

    def insert(self, tokens: bytes) -> None:
        _, found = self.walk(tokens)
        path = self.path_of(tokens[:found])
        if found < len(tokens):
            parent = path[-1] if path else self.root
            leaf = PlainNode(tokens[found:], parent)
            parent.children.append(leaf)
            self.nodes.append(leaf)
            path.append(leaf)
        self.use(path)

    def evict(self, amount: int) -> int:
        gone = 0
        while gone < amount:
            leaves = [node for node in self.nodes if not node.children and not node.locks]
            if not leaves:
                break
            victim = min(leaves, key=lambda node: node.used)
            assert victim.parent is not None
            victim.parent.children.remove(victim)
            self.nodes.remove(victim)
            gone += len(victim.tokens)
        return gone


class Simulator:
    """Watches a manager and does to a `PlainCache` what is done to its cache.

    Attributes:
      hits: Tokens found at the first admission of each request, in order.
      prompt_tokens: Tokens looked up in them.
      evicted_tokens: Tokens evicted while requests were served, that is but for the last eviction, of all that is left.
    """

    def __init__(self, manager: MemoryManager):
        self.page_size = manager.page_size
        self.plain = PlainCache(manager.page_size)
        self.hits: list[int] = []
        self.prompt_tokens = 0
        self._evictions: list[int] = []
        self._admitted: set[str] = set()
        self._locked: dict[str, int] = {}
        self._found = 0
        cache = manager.cache
        self._around(manager, "admit", self._admit)
        self._around(cache, "match_prefix", self._match)
        self._around(cache, "inc_lock_ref", self._lock)
        self._around(cache, "dec_lock_ref", self._unlock)
        self._around(cache, "resume_from", self._resume)
        self._around(cache, "lock_taken", self._take)
        self._around(cache, "cache_unfinished_req", self._share)
        self._around(cache, "cache_finished_req", self._finish)
        self._around(cache, "evict_values", self._evict)

    def _around(self, owner: Any, name: str, follow: Callable[..., None]) -> None:
        honest = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            after = follow(*args)
            out = honest(*args, **kwargs)
            if after is not None:
                after(out)
            return out

        setattr(owner, name, watched)

    def _bytes(self, key: Any, length: int) -> bytes:
        whole = length // self.page_size * self.page_size
        return key.packed[: TOKEN_BYTES * whole]

    def _admit(self, request: Any) -> Callable[[Any], None]:
        def after(out: int | None) -> None:
            if out is None:
                return
            self._locked.setdefault(request.rid, self._found)  # loading back has shared more by now
            if request.rid not in self._admitted:
                self._admitted.add(request.rid)
                self.hits.append(self._found // TOKEN_BYTES)
                self.prompt_tokens += request.num_tokens

        return after

    def _match(self, key: Any) -> None:
        self._looked_up = self._bytes(key, key.length)
        self._found = self.plain.match(self._looked_up)

    def _lock(self, _match: Any) -> None:
        self.plain.lock(self._looked_up[: self._found])

    def _unlock(self, _receipt: Any) -> None:
        self.plain.unlock(self._looked_up[: self._found])  # only an admission that is undone unlocks this way

    def _resume(self, request: Any, found: Any, _receipt: Any) -> None:
        self._lock_instead(request, found.prefix_len)  # what a plan found and locked since

    def _take(self, request: Any, length: int) -> None:
        tokens = self._bytes(request.key, length)
        self.plain.match(tokens)
        self.plain.lock(tokens)
        self._lock_instead(request, length)

    def _lock_instead(self, request: Any, length: int) -> None:
        tokens = self._bytes(request.key, length)
        self.plain.unlock(tokens[: self._locked.get(request.rid, self._found)])
        self._locked[request.rid] = len(tokens)

    def _share(self, request: Any, chunked: bool = False) -> None:
        tokens = self._bytes(request.key, request.kv_len)
        before = self._locked.get(request.rid, self._found)
        self.plain.insert(tokens)
        self.plain.lock(tokens)
        self.plain.unlock(tokens[:before])
        self._locked[request.rid] = len(tokens)

    def _finish(self, request: Any) -> None:
        tokens = self._bytes(request.key, request.kv_len)
        self.plain.insert(tokens)
        self.plain.unlock(tokens[: self._locked.pop(request.rid)])

    def _evict(self, amounts: list[int]) -> None:
        amount = max(amounts[0], 0) * self.plain.page_bytes
        self._evictions.append(self.plain.evict(amount) // TOKEN_BYTES)

    @property
    def evicted_tokens(self) -> int:
        return sum(self._evictions[:-1])

    @property
    def hit_rate(self) -> float:
        return sum(self.hits) / self.prompt_tokens


def simulate(config: ReplayConfig, requests: list[TraceRequest] | None = None) -> tuple[ReplayResult, Simulator]:
    """A replay, and the simulator that watched it."""
    watching: list[Simulator] = []

    def watch(manager: MemoryManager) -> None:
        share_steps(manager)
        watching.append(Simulator(manager))

    result = run_replay(config, requests=requests, observe=watch, buckets=few_shapes(config))
    return result, watching[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--device-tokens", type=int, default=3_000_000)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=32)
    arguments = parser.parse_args()
    config = ReplayConfig(
        trace=arguments.trace,
        requests=arguments.requests,
        device_tokens=arguments.device_tokens,
        page_size=arguments.page_size,
        concurrency=arguments.concurrency,
    )
    result, simulator = simulate(config)
    print(f"replay:    {result.hit_tokens} of {result.prompt_tokens} tokens hit, rate {result.hit_rate:.6f}")
    print(f"simulator: {sum(simulator.hits)} of {simulator.prompt_tokens} tokens hit, rate {simulator.hit_rate:.6f}")
    print(f"mismatched {result.mismatched_slots}, leaked {result.leaked_slots}, verified {result.verified_slots}, ")
    print(
        f"recompiled {result.recompiles_after_warmup}, retractions {result.retractions}, running {result.max_running}"
    )
    equal = (result.hit_tokens, result.prompt_tokens) == (sum(simulator.hits), simulator.prompt_tokens)
    equal &= result.evicted_tokens == simulator.evicted_tokens
    print("equal" if equal and result.is_clean else f"DIFFERENT {result.error or ''}")
    return 0 if equal and result.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
