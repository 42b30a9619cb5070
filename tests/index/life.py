"""One life of a tree beside its oracle: every operation, every comparison.

An operation takes plain numbers (an index is taken modulo what there is), does the same to both sides and compares what
comes back; `check` then compares everything there is. Nothing here is random, so a driver and Hypothesis can choose.

Sequences are made of symbols, a page each: tokens of a page differ from those of another page at its first or at its
last token, so that lookups stop at all places. Where keys are pairs, an element depends on the token after it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcache.errors import ArgumentError, CacheError, LockedError, ReceiptError
from jaxcache.index.check import draw, problems
from jaxcache.index.component import Component
from jaxcache.index.explain import Reason, explain
from jaxcache.index.key import BigramKey, RadixKey
from jaxcache.index.node import Insertion, Match, Node
from jaxcache.index.policies.lru import LRU
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt
from jaxcache.index.tree import RadixTree
from tests.index.model import Page, TreeModel

SYMBOLS = 3


@dataclass(frozen=True)
class Shape:
    """What a life is played in."""

    page_size: int
    components: tuple[Component, ...]
    policy: Policy = Policy.LRU
    is_bigram: bool = False
    with_hashes: bool = False


@dataclass(eq=False)
class Found:
    """A match or an insert that may be locked later, and what it found."""

    space: bytes
    elements: bytes
    where: Match | Insertion
    ids: list[int]
    state: int = 0
    cut: int = 0
    end: Page | None = None
    receipt: Receipt | None = None
    covered: list[list[Page]] = field(default_factory=list)


def same(real: object, oracle: object, what: str, about: object = "") -> None:
    if real != oracle:
        raise AssertionError(f"{what} {about}: the tree says {real}, the oracle {oracle}")


class TreeLife:
    """See the module. `found` and `locked` are what operations choose from."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.key_class = BigramKey if shape.is_bigram else RadixKey
        self.tree = RadixTree(
            shape.page_size, shape.components, shape.policy, shape.with_hashes, self.key_class.element_bytes
        )
        self.model = TreeModel(shape.page_size, shape.components, shape.policy.value, 1 + shape.is_bigram)
        self.next_id = 1
        self.found: list[Found] = []
        self.locked: list[Found] = []

    # Keys.

    def tokens(self, symbols: Sequence[int], tail: int) -> bytes:
        """Tokens of a sequence: a page a symbol, then `tail` more."""
        size = self.shape.page_size
        pages = [bytes([symbol == 2] * (size - 1) + [symbol]) for symbol in symbols]
        return b"".join([*pages, bytes(tail)])

    def key(self, tokens: bytes, space: bytes) -> RadixKey:
        return self.key_class(np.frombuffer(tokens, np.uint8).astype(np.int32), space or None)

    def elements(self, tokens: bytes) -> bytes:
        """The key as the oracle sees it: a byte a token, or two a pair."""
        if not self.shape.is_bigram:
            return tokens
        return b"".join([tokens[i : i + 2] for i in range(len(tokens) - 1)])

    def fresh(self, count: int) -> list[int]:
        self.next_id += count
        return list(range(self.next_id - count, self.next_id))

    # Operations.

    def match(self, tokens: bytes, space: bytes, keep: bool) -> None:
        elements = self.elements(tokens)
        match = self.tree.match(self.key(tokens, space))
        path = self.model.path(space, elements)
        length = self.model.stop(path)
        state = self.model.state_at(path, length)
        ids = [page.ids[0] for page in path[:length]]
        size = self.shape.page_size
        same((match.length, match.structural_length), (length * size, len(path) * size), "tokens matched")
        same((match.pages.tolist(), match.state), (ids, state), "what was matched")
        cut = len(path) if length < len(path) else 0
        self.model.find(path[:length])
        if keep and len(self.found) < 4:
            self.found.append(Found(space, elements[: length * self.model.page_bytes], match, ids, state, cut=cut))

    def lock(self, index: int) -> None:
        """Locks what was found some time ago: either it is all there still, or the lock is refused."""
        if not self.found:
            return
        found = self.found.pop(index % len(self.found))
        path = self.model.path(found.space, found.elements)
        length = len(found.elements) // self.model.page_bytes
        if found.end is not None:  # an insert
            is_there = path[length - 1 :] == [found.end] and all(found.end.ids)
        else:
            ids = [page.ids[0] for page in path]
            is_there = ids == found.ids and self.model.is_stop(path, length)
            is_there = is_there and self.model.state_at(path, length) == found.state
        if not is_there:
            self.refuses(ReceiptError, lambda: self.tree.lock(found.where))
            return
        found.receipt = self.tree.lock(found.where)
        same(found.receipt.length, length * self.shape.page_size, "tokens locked")
        if isinstance(found.where, Match):
            self.model.went_on(path[:length], found.cut)
        found.covered = self.model.lock(path[:length])
        self.locked.append(found)

    def unlock(self, index: int) -> None:
        if not self.locked:
            return
        held = self.locked.pop(index % len(self.locked))
        assert held.receipt is not None
        same(self.tree.unlock(held.receipt), self.model.unlock(held.covered), "pages unlocked")
        self.refuses(ReceiptError, lambda: self.tree.unlock(held.receipt))  # type: ignore[arg-type]
        self.refuses(ReceiptError, lambda: self.tree.narrow(held.receipt, 0))  # type: ignore[arg-type]

    def narrow(self, index: int, further: int) -> None:
        """Cuts a lock back to what a stop needs that comes so many tokens after it."""
        if not self.locked:
            return
        held = self.locked[index % len(self.locked)]
        assert held.receipt is not None
        stop = held.receipt.length + further
        self.tree.narrow(held.receipt, stop)
        self.model.narrow(held.covered, stop)

    def insert(
        self,
        tokens: bytes,
        space: bytes,
        held: int | None = None,
        zeros: Sequence[int] = (),
        priority: int = 0,
        keep: bool = False,
    ) -> None:
        """Offers fresh ids for all pages but `zeros`, which say for each further component what is not offered.

        Args:
          tokens: The sequence; with a lock, what comes after what is locked.
          space: Its namespace; that of the lock, with one.
          held: Index of a lock.
          zeros: A number a further component: bits that are pages (of a component of states: bit 0).
          priority: Of the insert.
          keep: Whether it may be locked later.
        """
        lock = self.locked[held % len(self.locked)] if held is not None and self.locked else None
        if lock is not None:
            tokens, space = self.continued(lock, tokens), lock.space
        key, elements = self.key(tokens, space), self.elements(tokens)
        total = len(elements) // self.model.page_bytes
        owned = len(lock.elements) // self.model.page_bytes if lock is not None else 0
        values = [self.fresh(total if component.spans else 1) for component in self.shape.components]
        for ids, mask in zip(values[1:], zeros, strict=False):
            ids[:] = [0 if mask >> at & 1 else page for at, page in enumerate(ids)]
        offered = [np.array(ids, np.int32) for ids in values]
        receipt = lock.receipt if lock is not None else None
        if self.model.starts(values, owned, total) is None:
            self.refuses(ArgumentError, lambda: self.tree.insert(key, offered, receipt, priority))
            return
        path = self.model.path(space, elements[: total * self.model.page_bytes])
        kept = [page.ids[0] for page in path[owned:]]
        claimed: list[int] = []
        done = self.tree.insert(key, offered, receipt, priority, lambda pages: claimed.extend(pages.tolist()))
        spare, healed, added = self.model.insert(space, elements, values, owned, priority)
        same([ids.tolist() for ids in done.spare], spare, "spare")
        same(done.kept.tolist(), kept, "kept")
        same(claimed, values[0][len(path) :], "claimed")
        size = self.shape.page_size
        same((done.length, done.present), (total * size, len(path) * size), "lengths of an insert")
        same([self._run(node) for node in done.healed], [self._run_of(end) for end in healed], "healed")
        same([self._run(node) for node in done.added], [self._run_of(end) for end in added], "added")
        same(done.leaf, done.added[-1] if done.added else None, "leaf")
        if keep and len(self.found) < 4:
            end = self.model.cached[space, elements[: total * self.model.page_bytes]] if total else None
            ids = [page.ids[0] for page in self.model.path(space, elements)]
            self.found.append(Found(space, elements[: total * self.model.page_bytes], done, ids, end=end))

    def continued(self, lock: Found, tokens: bytes) -> bytes:
        """What is locked, and then `tokens`."""
        if not self.shape.is_bigram:
            return lock.elements + tokens
        return lock.elements[::2] + lock.elements[-1:] + tokens

    def _run(self, node: Node) -> tuple[int, int]:
        return node.start // self.shape.page_size, node.end // self.shape.page_size

    def _run_of(self, end: Page) -> tuple[int, int]:
        return self.model.run_of(end)[0].depth - 1, end.depth

    def evict(self, component: int, amount: int) -> None:
        c = component % self.model.count
        gone = [ids.tolist() for ids in self.tree.evict(amount, c).values]
        same(gone, self.model.evict(c, amount, gone[c]), "evicted")

    def drop(self, space: bytes) -> None:
        name = self.key(b"", space).namespace
        gone = self.model.drop(space)
        if gone is None:
            self.refuses(LockedError, lambda: self.tree.drop(name))
            return
        dropped = self.tree.drop(name)
        same([sorted(ids.tolist()) for ids in dropped.values], [sorted(ids) for ids in gone], "dropped")
        assert all(node.parent is None for node in dropped.nodes)

    def explain(self, tokens: bytes, space: bytes) -> None:
        elements = self.elements(tokens)
        why = explain(self.tree, self.key(tokens, space))
        path = self.model.path(space, elements)
        length, size = self.model.stop(path), self.shape.page_size
        same(why.length, length * size, "explained length")
        same(why.reason is Reason.FOUND, length * self.model.page_bytes == len(elements), "explained as found")
        same(why.reason in (Reason.WINDOW_GONE, Reason.NO_STATE), length < len(path), "explained by a component")

    def misuse(self, kind: int, tokens: bytes, space: bytes) -> None:
        """A wrong use is a typed error, and `check` sees that nothing changed."""
        tree, key = self.tree, self.key(tokens, space)
        pages = len(key) // self.shape.page_size
        wrong_class = RadixKey if self.shape.is_bigram else BigramKey
        other = wrong_class([1, 2, 3])
        values = [np.arange(1, pages + 2, dtype=np.int32) for _ in self.shape.components]
        if kind == 0:
            self.refuses(ArgumentError, lambda: tree.match(other))
            self.refuses(ArgumentError, lambda: tree.find(other))
            self.refuses(ArgumentError, lambda: tree.insert(other, values))
        elif kind == 1:
            self.refuses(ArgumentError, lambda: tree.insert(key, [*values, values[0]]))
            if pages:
                self.refuses(ArgumentError, lambda: tree.insert(key, [values[0][: pages - 1], *values[1:]]))
        elif kind == 2:
            foreign = RadixTree(1).lock(RadixTree(1).match(RadixKey([])))
            self.refuses(ReceiptError, lambda: tree.unlock(foreign))
            self.refuses(ReceiptError, lambda: tree.insert(key, values, foreign))
        elif kind == 3 and pages:

            def refuse(taken: np.ndarray) -> None:
                raise LockedError("claim")

            if self.model.path(space, self.elements(tokens))[pages - 1 :] == []:
                self.refuses(LockedError, lambda: tree.insert(key, values, claim=refuse))

    def refuses(self, error: type[CacheError], wrong: Callable[[], object]) -> None:
        try:
            wrong()
        except error:
            return
        raise AssertionError(f"a wrong use was accepted, no {error.__name__}\n{draw(self.tree)}")

    def reset(self) -> None:
        self.tree.reset()
        self.model.reset()
        for held in self.locked:
            self.refuses(ReceiptError, lambda held=held: self.tree.unlock(held.receipt))  # type: ignore[arg-type]
        self.locked.clear()
        self.found.clear()

    # Comparing.

    def check(self) -> None:
        """The tree is well formed, holds and locks what the oracle does, and would evict in its order."""
        for problem in problems(self.tree):
            raise AssertionError(f"{problem}\n{draw(self.tree)}")
        model, size = self.model, self.shape.page_size
        count = 0
        todo = [(child, root.namespace, b"") for root in self.tree.roots.values() for child in root.children.values()]
        while todo:
            node, name, before = todo.pop()
            prefix = before + np.frombuffer(node.key, "<i4").astype(np.uint8).tobytes()
            end = model.cached.get((name[6:], prefix))  # before an extra_key its encoding has a tag, a kind, a length
            if end is None or not end.is_end:
                raise AssertionError(f"{node} ends where the oracle has no mark\n{draw(self.tree)}")
            self._check_node(node, end)
            count += 1
            todo += [(child, name, prefix) for child in node.children.values()]
        same(count, sum([page.is_end for page in model.cached.values()]), "nodes")
        for c, policy in enumerate(self.tree.policies):
            if isinstance(policy, LRU):
                order = [(node.end, node.slot(c).value.item(0)) for node in policy]
                ends = sorted(model.unlocked(c), key=lambda end: end.used[c])
                same(order, [(end.depth * size, model.values(c, end)[0]) for end in ends], "order of eviction")

    def _check_node(self, node: Node, end: Page) -> None:
        run, size = self.model.run_of(end), self.shape.page_size
        same((node.start, node.end), ((run[0].depth - 1) * size, end.depth * size), "place of", node)
        same(node.priority, end.priority, "priority of", node)
        for c, slot in enumerate((node, *node.others)):
            pages = run if self.model.components[c].spans else [end]
            ids = [page.ids[c] for page in pages]
            if slot.value is not None:
                same(slot.value.tolist(), ids, "values of", node)
            elif any(ids):
                same(None, ids, "values of", node)
            for page in pages:
                if page.locks[c] != slot.locks:
                    same(slot.locks, page.locks[c], "locks of", node)

    def wind_down(self) -> None:
        """Gives every lock back and evicts all of every component: nothing is left."""
        while self.locked:
            self.unlock(0)
        self.check()
        same(self.tree.protected, [0] * self.model.count, "protected at the end")
        for c in reversed(range(self.model.count)):
            self.evict(c, self.next_id)
            self.check()
        same((self.tree.roots, self.model.cached), ({}, {}), "left at the end")
