"""The one radix tree behind every cache flavour.

    insert [1 2 3 4 5 6 7 8]          insert [1 2 3 4 9 9 9 9]         page_size 2; a letter is a page id
                                                                          root
      root                              root                               └─ 1 2 3 4   a b
       └─ 1 2 3 4 5 6 7 8  a b c d       └─ ...  is split at 4:                ├─ 5 6 7 8   c d    (the old object)
                                                                               └─ 9 9 9 9   g h    (its first pages
                                                                                                    e f are spare)

Three rules keep it simple:
  * It frees nothing. `insert` and `evict` return what was not taken or was removed; the caller frees it.
  * A lookup changes no structure: a match may end inside a node. Only `insert`, `lock` and `narrow` split, and the old
    object stays the LOWER half, so that a reference to a node stays a reference to its end.
  * Every leaf has a value of each component, so every cached node leads to a prefix that can be found.

Pure Python and NumPy. Time is a logical order of calls, so two ranks that make the same calls make the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxcache.errors import ArgumentError, LockedError
from jaxcache.index.component import FULL, Component
from jaxcache.index.insert import insert
from jaxcache.index.key import TOKEN_BYTES, RadixKey
from jaxcache.index.locks import lock, narrow, unlock
from jaxcache.index.node import EMPTY_IDS, Eviction, Insertion, Match, Node, below, joined
from jaxcache.index.nodes import Nodes
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt


class RadixTree(Nodes):
    """Prefixes of token sequences and, for each component, what is cached for them.

    Lookup: `match`. Changes: `insert`, `evict`, `drop`, `reset`. Protection: `lock`, `narrow`, `unlock`. Inspection:
    `nodes`, `find`, `evictable`, `protected`, `len`. Where keys are `BigramKey`s, what is called tokens are pairs.

    Args:
      page_size: Tokens a page, >= 1. Keys are cut to whole pages here and nowhere else.
      components: What is kept for each prefix. The first one must reach to infinity and span: a node exists exactly
        while it has its value. At most one keeps states.
      policy: Eviction order, the same for every component.
      with_hashes: Keep a chained digest of each page in the nodes (what events need), computed on first access.
      element_bytes: That of the class of its keys.

    Not thread-safe and not guarded: its cache's thread owns it.

    Raises:
      ArgumentError: page_size < 1, no policy, no such keys, or components that do not go together.

    Source: SGLang 0.5.2 radix_cache.py, swa_radix_cache.py; pymllm radix_cache and mamba_radix_cache.
    """

    def __init__(
        self,
        page_size: int,
        components: Sequence[Component] = (FULL,),
        policy: Policy = Policy.LRU,
        with_hashes: bool = False,
        element_bytes: int = TOKEN_BYTES,
    ):
        super().__init__(page_size, components, policy, with_hashes, element_bytes)

    def match(self, key: RadixKey) -> Match:
        """The longest cached prefix of `key` that is usable for every component.

        Counts as a use of the nodes it covers whole; one it ends inside is used when a lock or insert splits it there.

        Raises:
          ArgumentError: The key has elements of another size than the tree's.

        Cost: O(nodes on the path) dict probes and memory compares; no loop over tokens.
        """
        if key.element_bytes != self.element_bytes:
            self.refuse(key)
        path: list[Node] = []
        root = self.roots.get(key.namespace)
        if root is None:
            return Match(key, 0, 0, EMPTY_IDS, path, self.changes)
        reached = self.walk(key, key.length // self.page_size * self.page_bytes, root, 0, path)
        found = length = reached // self.element_bytes
        state = 0
        if not self.is_single:
            length = self.stops.usable(path, found)
            while path and path[-1].start >= length:
                path.pop()
            if self.stops.state:
                state = self.stops.state_at(path)
        if not path:
            return Match(key, 0, found, EMPTY_IDS, path, self.changes)
        whole = path if path[-1].end == length else path[:-1]
        for policy in self.policies:
            policy.hit(whole)
        return Match(key, length, found, self.values_to(path, length), path, self.changes, state)

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
          values: For each component an int32 array: a page id a page (a longer array is cut), or one state id. For a
            component other than the first, id 0 says that nothing is offered; nor is what comes before the last 0.
          held: The caller's lock on a prefix of `key`. What it covers is the tree's own: it is neither walked nor
            offered nor returned.
          priority: That of a new leaf; raises the priority of the nodes above it (see `Policy.PRIORITY`).
          claim: Called with the values of the first component that the tree is about to take, before it takes anything;
            what it raises refuses the insert.

        Returns:
          What was added and what was not taken; see `Insertion`. The values taken belong to the tree.

        A new leaf is cut in two where a further component is offered from its middle on. In nodes that are there
        already, a hole is filled from where the component is offered on.

        A node in which the key leaves the tree is split, and only the upper half, which the key has, counts as used. To
        refresh the lower one too, as SGLang does, finds no more of a chat trace, with windows or without.

        Raises:
          ArgumentError: Too few values for the key; nothing is offered at its end, which could then never be found; the
            element size is not the tree's; `held` is longer than the key or on another; `priority` is not an integer.
          ReceiptError: `held` is not a live receipt of this tree.
        """
        return insert(self, key, values, held, priority, claim)

    # ---- eviction ------------------------------------------------------------------------------------------------

    def evict(self, amount: int, component: int = 0) -> Eviction:
        """Evicts at least `amount` values of a component, unless fewer are evictable.

        Evicting the first component removes leaves, in the policy's order, so it overshoots by less than one node.
        Another component leaves a hole (tombstone) where its node has children. Of it, what no resume point of
        requests needs is evicted first, whatever the policy (see `resume`).

        Cost: O(evicted), whatever the size of the tree.
        """
        policy = self.policies[component]
        freed: list[list[np.ndarray]] = [[] for _ in self.components]
        nodes: list[Node] = []
        target = self.evictable[component] - amount
        if component and self.resume.are_used():
            self._evict_surplus(component, target, freed)
        while self.evictable[component] > target and (node := policy.victim()) is not None:
            if node.children:
                self._take_out(node, (component,), freed)
                self.changes += 1
            else:
                self._remove(node, freed, nodes)
        return Eviction(tuple([joined(part) for part in freed]), nodes)

    def _evict_surplus(self, component: int, target: int, freed: list[list[np.ndarray]]) -> None:
        """Evicts what no resume point needs, until `target` values are left or there is no more of it."""
        while self.evictable[component] > target and (node := self.resume.next_candidate(component)) is not None:
            begin = self.resume.needed_from(component, node)
            if begin > node.start:
                if begin < node.end:
                    node = self.split(node, begin, is_found=False)
                self._take_out(node, (component,), freed)
                self.changes += 1

    def drop(self, namespace: bytes) -> Eviction:
        """Removes all that is cached in one namespace, such as that of an adapter that is unloaded.

        Args:
          namespace: Its encoding: `Namespace.encode()`, or `namespace` of a key.

        Raises:
          ArgumentError: `namespace` is no encoding.
          LockedError: A lock covers some of it. Nothing changes.

        Cost: O(its nodes), whatever the size of the tree.
        """
        if not isinstance(namespace, bytes):
            raise ArgumentError(f"namespace must be an encoding, got {type(namespace).__name__}: use its encode()")
        freed: list[list[np.ndarray]] = [[] for _ in self.components]
        nodes: list[Node] = []
        root = self.roots.get(namespace)
        if root is not None:
            if any(child.locks for child in root.children.values()):
                raise LockedError("namespace: a lock covers some of it: end what uses it, then drop it")
            for node in reversed(list(below([root]))):
                self._unlink(node, freed, nodes, is_drop=True)
            del self.roots[namespace]
        return Eviction(tuple([joined(part) for part in freed]), nodes)

    def _remove(self, node: Node, freed: list[list[np.ndarray]], nodes: list[Node]) -> None:
        """Unlinks a leaf, then every ancestor that this left childless without being a stopping point."""
        while True:
            parent = node.parent
            self._unlink(node, freed, nodes)
            if parent.children:
                if len(parent.children) == 1:
                    self.resume.passed(parent)
                return
            if parent.parent is None:
                del self.roots[parent.namespace]
                return
            if parent.locks:  # then it was matched or inserted up to here, and still has all values
                return
            if self.is_single or parent.is_whole:
                for policy in self.policies:
                    policy.exposed(parent)
                return
            node = parent

    def _unlink(self, node: Node, freed: list[list[np.ndarray]], nodes: list[Node], is_drop: bool = False) -> None:
        """Takes a childless, unlocked node out of the tree."""
        self._take_out(node, range(len(freed)), freed)
        parent = node.parent
        del parent.children[node.name(self.page_bytes)]
        self.graves.bury(node, parent, self.changes, is_drop)
        node.parent = None
        nodes.append(node)
        self.changes += 1

    def _take_out(self, node: Node, components: Iterable[int], freed: list[list[np.ndarray]]) -> None:
        """Moves the values of these components from `node` to `freed`."""
        for i in components:
            slot = node.others[i - 1] if i else node
            value = slot.value
            if value is not None:
                freed[i].append(value)
                self.evictable[i] -= len(value)
                slot.value = None
                self.policies[i].remove(node)
                candidates = self.resume.candidates[i]
                if candidates:
                    candidates.pop(node, None)

    # ---- protection ----------------------------------------------------------------------------------------------

    def lock(self, where: Match | Insertion) -> Receipt:
        """Protects what `where` found from eviction until the receipt is given back.

        A match that ends inside a node splits it there. A match older than the tree's last change is looked up again.

        Raises:
          ReceiptError: What was matched or inserted is no longer all in the tree: match again.
          ArgumentError: `where` is neither.
        """
        return lock(self, where)

    def unlock(self, receipt: Receipt) -> int:
        """Takes a receipt back; returns the pages of the first component that became evictable.

        Raises:
          ReceiptError: It was given back before, is another tree's, or is from before a reset. Nothing changes.
        """
        return unlock(self, receipt)

    def narrow(self, receipt: Receipt, stop: int) -> None:
        """Shrinks the window locks of `receipt` to what matches ending at or after `stop` need.

        In whole pages, at least the last one. Raises: as `unlock`. Cost: O(nodes it covers).
        """
        narrow(self, receipt, stop)
