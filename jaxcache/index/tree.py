"""The one radix tree behind every cache flavour. The only file that walks.

    insert [1 2 3 4 5 6 7 8]          insert [1 2 3 4 9 9 9 9]         page_size 2; a letter is a page id
                                                                          root
      root                              root                               └─ 1 2 3 4   a b
       └─ 1 2 3 4 5 6 7 8  a b c d       └─ ...  is split at 4:                ├─ 5 6 7 8   c d    (the old object)
                                                                               └─ 9 9 9 9   g h    (its first pages
                                                                                                    e f are spare)

Three rules keep it simple:
  * It frees nothing. `insert` and `evict` return what was not taken or was let go; the caller hands it on.
  * A lookup changes no structure: a match may end inside a node. Only `insert` and `lock` split, and the old object
    stays the LOWER half, so that whoever holds a node keeps holding its end.
  * The walk knows tokens only. What a component has at the nodes of a path is looked at afterwards, along the path.

Pure Python and NumPy. Time is a logical order of calls, so two ranks that make the same calls make the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError, ReceiptError
from jaxcache.index.component import FULL, Component
from jaxcache.index.explain import Graves
from jaxcache.index.hashing import PageHashes
from jaxcache.index.key import TOKEN_BYTES, RadixKey, first_mismatch, namespace_seed
from jaxcache.index.node import NOTHING, Eviction, Insertion, Match, Node, Receipt, Root, Slot, joined
from jaxcache.index.recency import Policy

_INT32 = np.dtype(np.int32)


class RadixTree:
    """Prefixes of token sequences and, for each component, what is cached for them.

    Looking up: `match`. Changing: `insert`, `evict`, `reset`. Protecting: `lock`, `unlock`. Looking at: `nodes`,
    `evictable`, `protected`, `len`.

    Args:
      page_size: Tokens a page, >= 1. Keys are cut to whole pages here, by nobody else.
      components: What is kept for each prefix. The first one must reach to infinity and span: a node exists exactly
        while it has its value.
      policy: Eviction order, the same for every component.
      with_hashes: Keep a chained digest of each page in the nodes (what events need), worked out when it is looked at.

    Attributes:
      evictable: For each component, values (pages or states) that no lock covers.
      protected: For each component, values that a lock covers.

    Raises:
      ArgumentError: page_size < 1, no policy, or the first component does not reach to infinity.

    Source: SGLang 0.5.2 radix_cache.py, swa_radix_cache.py; pymllm radix_cache and mamba_radix_cache.
    """

    def __init__(
        self,
        page_size: int,
        components: Sequence[Component] = (FULL,),
        policy: Policy = Policy.LRU,
        with_hashes: bool = False,
    ):
        if not isinstance(page_size, (int, np.integer)) or page_size < 1:
            raise ArgumentError(f"page_size must be an integer of at least 1, got {page_size!r}")
        if not isinstance(policy, Policy):
            raise ArgumentError(f"policy must be a Policy, got {policy!r}: use Policy({policy!r})")
        if not components or components[0].reach != math.inf or not components[0].spans:
            raise ArgumentError("components: the first one must span with infinite reach, it decides which nodes exist")
        self.page_size = page_size
        self.components = tuple(components)
        self.policy = policy
        self.with_hashes = with_hashes
        self._page_bytes = TOKEN_BYTES * page_size
        self._is_single = len(self.components) == 1
        self._spanning = [i for i, component in enumerate(self.components) if component.spans]
        self._epoch = 0
        self._version = 0
        self.reset()

    # ---- looking up ------------------------------------------------------------------------------------------

    def match(self, key: RadixKey) -> Match:
        """The longest cached prefix of `key` that every component can be continued from.

        Counts as a use of the nodes it covers whole; one it ends inside is used when a lock or insert splits it there.

        Cost: O(nodes on the path) dict probes and memory compares; no loop over tokens.
        """
        path: list[Node] = []
        root = self._roots.get(key.namespace)
        if root is None:
            return Match(key, 0, 0, NOTHING, path, self._version)
        packed = key.packed
        reached = self._walk(packed, key.length // self.page_size * self._page_bytes, root, 0, path)
        found = length = reached // TOKEN_BYTES
        if not self._is_single:
            length = self._usable(path, found)
            while path and path[-1].parent.end >= length:
                path.pop()
        if not path:
            return Match(key, 0, found, NOTHING, path, self._version)
        whole = path if path[-1].end == length else path[:-1]
        for policy in self._policies:
            policy.hit(whole)
        return Match(key, length, found, self._values_to(path, length), path, self._version)

    def _walk(self, packed: bytes, end: int, node: Node, offset: int, path: list[Node]) -> int:
        """Descends from `node`, which ends at byte `offset`, along `packed[offset:end]`.

        Appends every node entered to `path`; only the last can be entered in part. Returns the bytes matched, in whole
        pages.
        """
        page_bytes = self._page_bytes
        while offset < end:
            child = node.children.get(packed[offset : offset + page_bytes])
            if child is None:
                return offset
            path.append(child)
            segment = child.key
            if packed.startswith(segment, offset, end):
                offset += len(segment)
                node = child
            else:
                same = first_mismatch(segment, packed, offset, min(len(segment), end - offset))
                return offset + same // page_bytes * page_bytes
        return offset

    def _usable(self, path: list[Node], found: int) -> int:
        """Longest prefix length within the `found` tokens of `path` that satisfies every component."""
        best = 0
        runs = [math.inf] * len(self.components)  # tokens present right before the position, per component
        for node in path:
            end = min(node.end, found)
            start = node.parent.end
            limit = end  # the furthest position inside this node that is usable
            for i, component in enumerate(self.components):
                is_live = node.slot(i).value is not None
                if component.spans:
                    runs[i] = runs[i] + (end - start) if is_live else 0
                    if runs[i] < min(component.reach, end):
                        limit = 0
                else:
                    runs[i] = 1 if is_live and end == node.end else 0
                    if not runs[i]:
                        limit = 0
            best = max(best, limit)
        return best

    def _values_to(self, path: list[Node], length: int) -> np.ndarray:
        """Values of the first component along a path, cut at `length` tokens."""
        values: list[Any] = [node.value for node in path]
        last = path[-1]
        if last.end != length:
            values[-1] = values[-1][: (length - last.parent.end) // self.page_size]
        return joined(values)

    # ---- changing --------------------------------------------------------------------------------------------

    def insert(
        self,
        key: RadixKey,
        values: Sequence[np.ndarray],
        held: Receipt | None = None,
        priority: int = 0,
        claim: Callable[[np.ndarray], None] | None = None,
    ) -> Insertion:
        """Offers `values` for the whole pages of `key`; the tree takes what it lacks.

        Args:
          key: Tokens and namespace; cut to whole pages.
          values: For each component an int32 array: a page id a page (a longer array is cut), or one state id.
          held: The caller's lock on a prefix of `key`. What it covers is the tree's own: it is neither walked nor
            offered nor returned.
          priority: That of a new leaf; raises the priority of the nodes above it (see `Policy.PRIORITY`).
          claim: Called with the values of the first component that the tree is about to take, before it takes anything;
            what it raises refuses the insert.

        Returns:
          What was added and what was not taken; see `Insertion`. The values taken belong to the tree.

        Raises:
          ArgumentError: Too few values for the key, `held` is longer than the key, or `priority` is no integer.
          ReceiptError: `held` is not a live receipt of this tree.
        """
        if type(priority) is not int:
            priority = _as_priority(priority)
        page_size = self.page_size
        pages = key.length // page_size
        length = pages * page_size
        owned, node, path = self._begin_insert(key, length, held)
        self._check_values(values, pages)
        present = self._walk(key.packed, TOKEN_BYTES * length, node, TOKEN_BYTES * owned, path) // TOKEN_BYTES
        if claim is not None and present < length:
            claim(values[0][present // page_size : pages])
        if path:
            node = path[-1]
            if node.end != present:
                node = path[-1] = self._split(node, present)
        kept: list[Any] = [step.value for step in path]
        spare = [values[0][owned // page_size : present // page_size]]
        if not self._is_single:
            spare += [self._heal(i, path, values[i]) for i in range(1, len(self.components))]
        leaf = None
        if present < length:
            leaf = node = self._add_leaf(key, length, node, values, present // page_size)
            leaf.priority = priority
            path.append(leaf)
        if not self._is_single:
            self._offer_states(node, length, values, spare)
            path = self._path_to(node)
        if priority or self._has_priorities:
            self._has_priorities = True
            for step in self._path_to(node):
                step.priority = max(step.priority, priority)
        for policy in self._policies:
            policy.touch(path)
        return Insertion(node if length else None, leaf, length, present, kept, tuple(spare))

    def _begin_insert(self, key: RadixKey, length: int, held: Receipt | None) -> tuple[int, Node, list[Node]]:
        """Where the walk of an insert starts: the tokens already owned, the node there, and an empty path."""
        if held is not None:
            self._check_receipt(held)
            if held.length > length:
                raise ArgumentError(f"held: the lock covers {held.length} tokens, the key has {length} in whole pages")
            self._require_prefix(held, key)
            if held.node is not None:
                return held.length, held.node, []
        root = self._roots.get(key.namespace)
        if root is None:
            root = Root(key.namespace)  # joins the tree with its first leaf
        return 0, root, []

    @staticmethod
    def _require_prefix(held: Receipt, key: RadixKey) -> None:
        """Raises ArgumentError unless the lock is on a prefix of `key`; one memory compare a node."""
        node = held.node
        while node is not None and node.parent is not None:
            if not key.packed.startswith(node.key, TOKEN_BYTES * node.start):
                raise ArgumentError("held: the lock is on other tokens than those of the key: give this key's receipt")
            node = node.parent
        if isinstance(node, Root) and node.namespace != key.namespace:
            raise ArgumentError("held: the lock is in another namespace than the key: give this key's receipt")

    def _check_values(self, values: Sequence[np.ndarray], pages: int) -> None:
        if len(values) != len(self.components):
            raise ArgumentError(f"values: expected one array a component ({len(self.components)}), got {len(values)}")
        for component, array in zip(self.components, values, strict=False):  # strict costs time, and was just checked
            if len(array) < pages and (component.spans or not len(array)):
                need = pages if component.spans else 1
                raise ArgumentError(f"values of {component.name}: the key needs {need}, got {len(array)}")

    def _add_leaf(
        self, key: RadixKey, length: int, parent: Node, values: Sequence[np.ndarray], first_page: int
    ) -> Node:
        packed = key.packed[first_page * self._page_bytes : TOKEN_BYTES * length]
        leaf = Node(packed, length, parent, self._new_slots())
        for i in self._spanning:
            self._fill(i, leaf, values[i][first_page : length // self.page_size])
        if self.with_hashes:
            leaf.hashes = PageHashes(packed, self._page_bytes, parent.hashes or namespace_seed(key.namespace))
        if isinstance(parent, Root):
            self._roots[parent.namespace] = parent
        parent.children[packed[: self._page_bytes]] = leaf
        self._version += 1
        return leaf

    def _heal(self, i: int, path: list[Node], offered: np.ndarray) -> np.ndarray:
        """Fills the holes of a spanning component along `path`; returns what was not needed."""
        if not self.components[i].spans:
            return NOTHING
        spare = []
        for node in path:
            part = offered[node.start // self.page_size : node.end // self.page_size]
            if node.slot(i).value is None:
                self._fill(i, node, part)
            else:
                spare.append(part)
        return np.concatenate(spare) if spare else NOTHING

    def _offer_states(self, node: Node, length: int, values: Sequence[np.ndarray], spare: list[np.ndarray]) -> None:
        """Gives the end of the key its states, where it has none yet."""
        for i, component in enumerate(self.components):
            if component.spans or not len(values[i]):
                continue
            if length and node.slot(i).value is None:
                self._fill(i, node, values[i])
            else:
                spare[i] = values[i]

    def _fill(self, i: int, node: Node, value: np.ndarray) -> None:
        """Component `i` of `node` takes a copy of `value`: a slice would keep the whole array behind it alive."""
        slot = node.slot(i)
        slot.value = _owned(value)
        if slot.locks:
            self.protected[i] += len(value)
        else:
            self.evictable[i] += len(value)
            self._policies[i].add(node)

    def _split(self, lower: Node, position: int) -> Node:
        """Cuts `lower` at token `position`; returns the new upper half. The caller touches or locks the path next."""
        cut = TOKEN_BYTES * (position - lower.start)
        pages = cut // self._page_bytes
        parent = lower.parent
        upper = Node(lower.key[:cut], position, parent, self._new_slots())
        upper.priority = lower.priority
        if lower.hashes is not None:
            upper.hashes, lower.hashes = lower.hashes[:pages], lower.hashes[pages:]
        parent.children[lower.key[: self._page_bytes]] = upper
        lower.key = lower.key[cut:]
        lower.parent = upper
        upper.children[lower.key[: self._page_bytes]] = lower
        for i in self._spanning:
            self._split_slot(i, upper, lower, pages)
        self._version += 1
        return upper

    def _new_slots(self) -> tuple[Slot, ...]:
        return () if self._is_single else tuple([Slot() for _ in self.components[1:]])

    def _split_slot(self, i: int, upper: Node, lower: Node, pages: int) -> None:
        top, bottom = upper.slot(i), lower.slot(i)
        top.locks = bottom.locks
        if bottom.value is not None:
            top.value, bottom.value = _owned(bottom.value[:pages]), _owned(bottom.value[pages:])
            self._policies[i].split(upper, lower)
            if not top.locks:
                self._policies[i].add(upper)

    def evict(self, amount: int, component: int = 0) -> Eviction:
        """Lets go of at least `amount` values of a component, unless fewer are evictable.

        Whole nodes go, in the policy's order, so it overshoots by less than one node. Evicting the first component
        removes leaves; another component leaves a hole (tombstone) where its node has children.

        Cost: O(evicted), whatever the size of the tree.
        """
        policy = self._policies[component]
        freed: list[list[np.ndarray]] = [[] for _ in self.components]
        nodes: list[Node] = []
        target = self.evictable[component] - amount
        while self.evictable[component] > target and (node := policy.victim()) is not None:
            if node.children:
                self._drop(component, node, freed)
                self._version += 1
            else:
                self._remove(node, freed, nodes)
        return Eviction(tuple([joined(part) for part in freed]), nodes)

    def _remove(self, node: Node, freed: list[list[np.ndarray]], nodes: list[Node]) -> None:
        """Unlinks a leaf, then every ancestor that this left childless without being a stopping point."""
        while True:
            for i in range(len(self.components)):
                self._drop(i, node, freed)
            parent = node.parent
            del parent.children[node.key[: self._page_bytes]]
            self._graves.bury(node, parent, self._version)
            node.parent = None
            nodes.append(node)
            self._version += 1
            if parent.children:
                return
            if parent.parent is None:
                del self._roots[parent.namespace]
                return
            if parent.locks:
                return
            if self._is_single or all(slot.value is not None for slot in parent.others):
                for policy in self._policies:
                    if parent in policy:
                        policy.exposed(parent)
                return
            node = parent

    def _drop(self, i: int, node: Node, freed: list[list[np.ndarray]]) -> None:
        slot = node.slot(i)
        value = slot.value
        if value is not None:
            freed[i].append(value)
            self.evictable[i] -= len(value)
            slot.value = None
            self._policies[i].remove(node)

    def reset(self) -> None:
        """Forgets everything, without freeing anything; receipts given out before are refused from now on."""
        self._roots: dict[bytes, Root] = {}
        self._graves = Graves(self._page_bytes)
        self._policies = [self.policy.build(leaves_only=i == 0) for i in range(len(self.components))]
        self.evictable = [0] * len(self.components)
        self.protected = [0] * len(self.components)
        self._has_priorities = False
        self._epoch += 1
        self._version += 1

    # ---- protecting ------------------------------------------------------------------------------------------

    def lock(self, where: Match | Insertion) -> Receipt:
        """Protects what `where` found from eviction until the receipt is given back.

        A match that ends inside a node splits it there. A match older than the tree's last change is looked up again.

        Raises:
          ReceiptError: What was matched is no longer in the tree: match again.
          ArgumentError: `where` is neither.
        """
        if isinstance(where, Insertion):
            node, length = where.node, where.length
            if node is not None and not self._holds(node):
                raise ReceiptError("where: the inserted prefix is not in this tree, or no longer: insert again")
        elif not isinstance(where, Match):
            raise ArgumentError(f"where must be a match or an insertion, got {type(where).__name__}: match first")
        else:
            length = where.length
            is_current = where.version == self._version and (not where.path or self._holds(where.path[0]))
            path = where.path if is_current else self._path_again(where)
            node = path[-1] if path else None
            if node is not None and node.end != length:
                node = self._split(node, length)
        since = tuple(self._reach_back(component, node) for component in self.components) if node else ()
        receipt = Receipt(self, node, length, since, self._epoch)
        self._hold(receipt, 1)
        return receipt

    def unlock(self, receipt: Receipt) -> int:
        """Takes a receipt back; returns the pages of the first component that became evictable.

        Raises:
          ReceiptError: It was given back before, is another tree's, or is from before a reset. Nothing changes.
        """
        self._check_receipt(receipt)
        receipt.held = False
        before = self.evictable[0]
        self._hold(receipt, -1)
        return self.evictable[0] - before

    def _check_receipt(self, receipt: Receipt) -> None:
        if not isinstance(receipt, Receipt):
            raise ArgumentError(f"receipt must be what a lock returned, got {type(receipt).__name__}: keep that")
        if receipt.tree is not self:
            raise ReceiptError("receipt: it was issued by another tree; give it back there")
        if receipt.epoch != self._epoch:
            raise ReceiptError("receipt: it is from before the last reset, which released every lock; drop it")
        if not receipt.held:
            raise ReceiptError("receipt: it was given back already; a receipt releases its lock once")

    def _path_again(self, match: Match) -> list[Node]:
        """The path of an outdated match, if all of it is still there."""
        path: list[Node] = []
        root = self._roots.get(match.key.namespace)
        end = TOKEN_BYTES * match.length
        if not match.length:
            return path
        is_there = root is not None and self._walk(match.key.packed, end, root, 0, path) == end
        is_usable = is_there and (self._is_single or self._usable(path, match.length) == match.length)
        if is_usable and np.array_equal(self._values_to(path, match.length), match.pages):  # not cached anew, elsewhere
            return path
        raise ReceiptError("where: the matched prefix is not in this tree, or no longer: match again")

    def _holds(self, node: Node) -> bool:
        while node.parent is not None:
            node = node.parent
        return isinstance(node, Root) and self._roots.get(node.namespace) is node

    @staticmethod
    def _reach_back(component: Component, node: Node) -> int:
        """Token position a lock at the end of `node` reaches back to."""
        if not component.spans:
            return node.end - 1
        if component.reach == math.inf:
            return 0
        top = node
        while top.start > 0 and node.end - top.start < component.reach:
            top = top.parent
        return top.start

    def _hold(self, receipt: Receipt, step: int) -> None:
        for i, since in enumerate(receipt.since):
            policy = self._policies[i]
            moved = 0
            node = receipt.node
            while node is not None and node.parent is not None and node.end > since:
                slot = node.slot(i)
                before = slot.locks
                slot.locks = before + step
                if slot.value is not None:
                    if before == 0:
                        policy.discard(node)
                        moved += len(slot.value)
                    elif slot.locks == 0:
                        policy.add(node)
                        moved -= len(slot.value)
                node = node.parent
            self.evictable[i] -= moved
            self.protected[i] += moved

    # ---- looking at ------------------------------------------------------------------------------------------

    @property
    def roots(self) -> dict[bytes, Root]:
        """The top of each namespace, by its encoding. Not to be changed."""
        return self._roots

    @property
    def graves(self) -> Graves:
        """The nodes let go last. Not to be changed."""
        return self._graves

    @property
    def changes(self) -> int:
        """Leaves added, nodes split and nodes let go so far."""
        return self._version

    def find(self, key: RadixKey) -> tuple[list[Node], int, int]:
        """The nodes that `key` leads through, the tokens found in them, and those of them that `match` would give.

        No use of anything: for looking at.
        """
        path: list[Node] = []
        root = self._roots.get(key.namespace)
        if root is None:
            return path, 0, 0
        end = key.length // self.page_size * self._page_bytes
        found = self._walk(key.packed, end, root, 0, path) // TOKEN_BYTES
        return path, found, found if self._is_single else self._usable(path, found)

    @property
    def policies(self) -> Sequence:
        """The eviction order of each component. Not to be changed."""
        return self._policies

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first. O(nodes)."""
        todo: list[Node] = list(self._roots.values())
        while todo:
            node = todo.pop()
            todo.extend(node.children.values())
            if node.parent is not None:
                yield node

    def __len__(self) -> int:
        """Pages cached for the first component. O(1)."""
        return self.evictable[0] + self.protected[0]

    def _path_to(self, node: Node) -> list[Node]:
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]


def _as_priority(priority: Any) -> int:
    if not isinstance(priority, (int, np.integer)):
        raise ArgumentError(f"priority must be an integer, got {priority!r}")
    return int(priority)


def _owned(value: np.ndarray) -> np.ndarray:
    owned = np.array(value, _INT32)
    owned.setflags(write=False)
    return owned
