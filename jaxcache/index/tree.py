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
    Every leaf has a value of each component, so whatever is cached leads to something that can be found.

Pure Python and NumPy. Time is a logical order of calls, so two ranks that make the same calls make the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError, LockedError, ReceiptError
from jaxcache.index.arguments import require_tree
from jaxcache.index.component import FULL, Component
from jaxcache.index.graves import Graves
from jaxcache.index.key import TOKEN_BYTES, RadixKey, first_mismatch
from jaxcache.index.node import NOTHING, Eviction, Insertion, Match, Node, Root, Slot, below, joined, owned
from jaxcache.index.offer import as_priority, offered_from
from jaxcache.index.page_hashes import PageHashes
from jaxcache.index.policies.registry import Policy
from jaxcache.index.receipt import Receipt, require_live, require_prefix
from jaxcache.index.stops import Stops


class RadixTree:
    """Prefixes of token sequences and, for each component, what is cached for them.

    Looking up: `match`. Changing: `insert`, `evict`, `drop`, `reset`. Protecting: `lock`, `narrow`, `unlock`. Looking
    at: `nodes`, `evictable`, `protected`, `len`. Where keys are `BigramKey`s, what is called tokens are pairs of them.

    Args:
      page_size: Tokens a page, >= 1. Keys are cut to whole pages here, by nobody else.
      components: What is kept for each prefix. The first one must reach to infinity and span: a node exists exactly
        while it has its value. At most one keeps states.
      policy: Eviction order, the same for every component.
      with_hashes: Keep a chained digest of each page in the nodes (what events need), worked out when it is looked at.
      element_bytes: That of the class of its keys.

    Attributes:
      evictable: For each component, values (pages or states) that no lock covers.
      protected: For each component, values that a lock covers.
      graves: The nodes let go last.

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
        require_tree(page_size, policy, element_bytes)
        self.page_size = int(page_size)
        self.components = tuple(components)
        self.policy = policy
        self.with_hashes = with_hashes
        self.element_bytes = element_bytes
        self._page_bytes = element_bytes * page_size
        self._stops = Stops(self.components)
        self._is_single = len(self.components) == 1
        self._epoch = 0
        self._version = 0
        self.reset()

    # ---- looking up ------------------------------------------------------------------------------------------

    def match(self, key: RadixKey) -> Match:
        """The longest cached prefix of `key` that every component can be continued from.

        Counts as a use of the nodes it covers whole; one it ends inside is used when a lock or insert splits it there.

        Raises:
          ArgumentError: The key has elements of another size than the tree's.

        Cost: O(nodes on the path) dict probes and memory compares; no loop over tokens.
        """
        if key.element_bytes != self.element_bytes:
            self._refuse(key)
        path: list[Node] = []
        root = self._roots.get(key.namespace)
        if root is None:
            return Match(key, 0, 0, NOTHING, path, self._version)
        reached = self._walk(key.packed, key.length // self.page_size * self._page_bytes, root, 0, path)
        found = length = reached // self.element_bytes
        state = 0
        if not self._is_single:
            length = self._stops.usable(path, found)
            while path and path[-1].start >= length:
                path.pop()
            if self._stops.state:
                state = self._stops.state_at(path)
        if not path:
            return Match(key, 0, found, NOTHING, path, self._version)
        whole = path if path[-1].end == length else path[:-1]
        for policy in self._policies:
            policy.hit(whole)
        return Match(key, length, found, self._values_to(path, length), path, self._version, state)

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

    def _values_to(self, path: list[Node], length: int) -> np.ndarray:
        """Values of the first component along a path, cut at `length` tokens."""
        values: list[Any] = [node.value for node in path]
        last = path[-1]
        if last.end != length:
            values[-1] = values[-1][: (length - last.start) // self.page_size]
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
          values: For each component an int32 array: a page id a page (a longer array is cut), or one state id. For a
            component other than the first, id 0 says that nothing is offered; nor is what comes before the last 0.
          held: The caller's lock on a prefix of `key`. What it covers is the tree's own: it is neither walked nor
            offered nor returned.
          priority: That of a new leaf; raises the priority of the nodes above it (see `Policy.PRIORITY`).
          claim: Called with the values of the first component that the tree is about to take, before it takes anything;
            what it raises refuses the insert.

        Returns:
          What was added and what was not taken; see `Insertion`. The values taken belong to the tree.

        A new leaf is cut in two where something is offered from its middle on. Of what is there already, a hole is
        filled from where something is offered on.

        Raises:
          ArgumentError: Too few values for the key; nothing is offered at its end, which could then never be found; the
            element size is not the tree's; `held` is longer than the key or on another; `priority` is no integer.
          ReceiptError: `held` is not a live receipt of this tree.
        """
        if type(priority) is not int:
            priority = as_priority(priority)
        size, page_size = self.element_bytes, self.page_size
        pages = key.length // page_size
        length = pages * page_size
        begin, node, path = self._begin_insert(key, length, held)
        starts = offered_from(self.components, values, begin // page_size, pages)
        present = self._walk(key.packed, size * length, node, size * begin, path) // size
        if claim is not None and present < length:
            claim(values[0][present // page_size : pages])
        if path:
            node = path[-1]
            if node.end != present:
                node = path[-1] = self._split(node, present)
        kept: list[Any] = [step.value for step in path]
        spare = [values[0][begin // page_size : present // page_size]]
        if priority or self._has_priorities:
            self._has_priorities = True
            for step in self._path_to(node):
                step.priority = max(step.priority, priority)
        added: list[Node] = []
        healed: list[Node] = []
        if not self._is_single:
            first = begin // page_size
            if path or max(starts) > first:
                healed = self._heal(path, values, starts, first, spare)
            else:  # nothing to heal, nothing to spare
                spare += self._stops.no_windows
            if self._stops.state:
                spare.insert(self._stops.state, NOTHING if present < length else self._save(node, values))
            if used := self._path_to(node) if held is not None and any(held.since) else path:  # not all above is locked
                for policy in self._policies[1:]:
                    policy.touch(used)
        if present < length:
            added = self._add_leaves(key, node, values, starts, present // page_size, priority)
            node = added[-1]
        self._policies[0].touch(path)
        return Insertion(node if length else None, added, healed, length, present, kept, tuple(spare))

    def _begin_insert(self, key: RadixKey, length: int, held: Receipt | None) -> tuple[int, Node, list[Node]]:
        """Where the walk of an insert starts: the tokens already owned, the node there, and an empty path."""
        if key.element_bytes != self.element_bytes:
            self._refuse(key)
        if held is not None:
            require_live(held, self, self._epoch)
            if held.length > length:
                raise ArgumentError(f"held: the lock covers {held.length} tokens, the key has {length} in whole pages")
            require_prefix(held, key)
            if held.node is not None:
                return held.length, held.node, []
        root = self._roots.get(key.namespace)
        if root is None:
            root = Root(key.namespace)  # joins the tree with its first leaf
        return 0, root, []

    def _refuse(self, key: RadixKey) -> None:
        sizes = f"{self.element_bytes} bytes an element, not {key.element_bytes}"
        raise ArgumentError(f"key: this tree has {sizes}: use keys of one class, not a {type(key).__name__}")

    def _add_leaves(
        self, key: RadixKey, parent: Node, values: Sequence[np.ndarray], starts: list[int], page: int, priority: int
    ) -> list[Node]:
        """Adds the pages of `key` from `page` on: one leaf, cut where the offer of a component starts."""
        added: list[Node] = []
        pages = key.length // self.page_size
        ends = [pages] if max(starts) <= page else sorted({pages, *[start for start in starts if start > page]})
        for end in ends:
            packed = key.packed[page * self._page_bytes : end * self._page_bytes]
            leaf = Node(packed, page * self.page_size, end * self.page_size, parent, self._new_slots())
            leaf.priority = priority
            if self.with_hashes:
                prior = parent.hashes
                leaf.hashes = PageHashes(packed, self._page_bytes, key.namespace if prior is None else prior)
            if isinstance(parent, Root):
                self._roots[parent.namespace] = parent
            parent.children[packed[: self._page_bytes]] = leaf
            added.append(leaf)
            self._version += 1
            for i in self._stops.spanning:
                if starts[i] <= page:
                    (leaf.others[i - 1] if i else leaf).value = owned(values[i][page:end])
                    self.evictable[i] += end - page
                    self._policies[i].add(leaf)
            parent, page = leaf, end
        if i := self._stops.state:
            parent.others[i - 1].value = owned(values[i][:1])
            self.evictable[i] += 1
            self._policies[i].add(parent)
        if len(added) > 1:
            self._policies[0].touch(added)
        return added

    def _heal(
        self, path: list[Node], values: Sequence[np.ndarray], starts: list[int], first: int, spare: list[np.ndarray]
    ) -> list[Node]:
        """Fills the holes along `path`, cut where the offer begins; returns them. What is not needed is spare."""
        healed: list[Node] = []
        page_size, present = self.page_size, first + len(spare[0])
        for i in self._stops.windows:
            start = starts[i]
            rest, begin = values[i][first : max(start, present)], start * page_size
            holes = [n for n in path if n.others[i - 1].value is None and n.end > begin]
            if holes and holes[0].start < begin:
                path.insert(path.index(holes[0]), self._split(holes[0], begin))
            if holes or start > first:
                rest = rest.copy()
                for node in holes:
                    part = rest[node.start // page_size - first : node.end // page_size - first]
                    self._fill(i, node, part)
                    part[:] = 0
                rest = rest[rest != 0]
                healed += holes
            spare.append(rest)
        return healed

    def _save(self, node: Node, values: Sequence[np.ndarray]) -> np.ndarray:
        """Gives the end of a key its state, if it has none yet; returns what was not needed."""
        state = values[self._stops.state][:1]
        if not len(state) or not state[0]:
            return NOTHING
        if node.parent is None or node.others[self._stops.state - 1].value is not None:
            return state
        self._fill(self._stops.state, node, state)
        return NOTHING

    def _fill(self, i: int, node: Node, value: np.ndarray) -> None:
        """Component `i` of `node` takes a copy of `value`: a slice would keep the whole array behind it alive."""
        slot = node.others[i - 1] if i else node
        slot.value = owned(value)
        if slot.locks:
            self.protected[i] += len(value)
        else:
            self.evictable[i] += len(value)
            self._policies[i].add(node)

    def _split(self, lower: Node, position: int) -> Node:
        """Cuts `lower` at token `position`; returns the new upper half. The caller touches or locks the path next."""
        pages = (position - lower.start) // self.page_size
        cut = pages * self._page_bytes
        parent = lower.parent
        upper = Node(lower.key[:cut], lower.start, position, parent, self._new_slots())
        upper.priority = lower.priority
        parent.children[lower.key[: self._page_bytes]] = upper
        lower.key = lower.key[cut:]
        if lower.hashes is not None:
            upper.hashes, lower.hashes = lower.hashes.split(upper.key, lower.key)
        lower.start = position
        lower.parent = upper
        upper.children[lower.key[: self._page_bytes]] = lower
        for i in self._stops.spanning:
            top, bottom = (upper.others[i - 1], lower.others[i - 1]) if i else (upper, lower)
            top.locks = bottom.locks
            if bottom.value is not None:
                top.value, bottom.value = owned(bottom.value[:pages]), owned(bottom.value[pages:])
                self._policies[i].split(upper, lower)
                if not top.locks:
                    self._policies[i].add(upper)
        self._version += 1
        return upper

    def _new_slots(self) -> tuple[Slot, ...]:
        return () if self._is_single else tuple([Slot() for _ in self._stops.further])

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
                self._let_go(node, (component,), freed)
                self._version += 1
            else:
                self._remove(node, freed, nodes)
        return Eviction(tuple([joined(part) for part in freed]), nodes)

    def drop(self, namespace: bytes) -> Eviction:
        """Lets go of all of one namespace, such as that of an adapter that is unloaded; of nothing if it has nothing.

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
        root = self._roots.get(namespace)
        if root is not None:
            if any(child.locks for child in root.children.values()):
                raise LockedError("namespace: a lock covers some of it: end what uses it, then drop it")
            for node in reversed(list(below([root]))):
                self._unlink(node, freed, nodes, is_drop=True)
            del self._roots[namespace]
        return Eviction(tuple([joined(part) for part in freed]), nodes)

    def _remove(self, node: Node, freed: list[list[np.ndarray]], nodes: list[Node]) -> None:
        """Unlinks a leaf, then every ancestor that this left childless without being a stopping point."""
        while True:
            parent = node.parent
            self._unlink(node, freed, nodes)
            if parent.children:
                return
            if parent.parent is None:
                del self._roots[parent.namespace]
                return
            if parent.locks:  # then it was matched or inserted up to here, and still has all values
                return
            if self._is_single or parent.is_whole:
                for policy in self._policies:
                    policy.exposed(parent)
                return
            node = parent

    def _unlink(self, node: Node, freed: list[list[np.ndarray]], nodes: list[Node], is_drop: bool = False) -> None:
        """Takes a childless, unlocked node out of the tree."""
        self._let_go(node, range(len(freed)), freed)
        parent = node.parent
        del parent.children[node.key[: self._page_bytes]]
        self.graves.bury(node, parent, self._version, is_drop)
        node.parent = None
        nodes.append(node)
        self._version += 1

    def _let_go(self, node: Node, components: Iterable[int], freed: list[list[np.ndarray]]) -> None:
        for i in components:
            slot = node.others[i - 1] if i else node
            value = slot.value
            if value is not None:
                freed[i].append(value)
                self.evictable[i] -= len(value)
                slot.value = None
                self._policies[i].remove(node)

    def reset(self) -> None:
        """Forgets everything, without freeing anything; receipts given out before are refused from now on."""
        self._roots: dict[bytes, Root] = {}
        self.graves = Graves(self._page_bytes, self.element_bytes)
        self._policies = [self.policy.build(leaves_only=i == 0) for i in range(len(self.components))]
        self.evictable = [0] * len(self.components)
        self.protected = [0] * len(self.components)
        self._has_priorities = False
        self._epoch += 1
        self._version += 1

    def adopt(self, roots: dict[bytes, Root]) -> None:
        """Takes over the nodes below `roots`, unlocked, without their places in the policies. It must be empty."""
        self._roots = roots
        for node in below(roots.values()):
            self._has_priorities |= node.priority != 0
            for i, slot in enumerate((node, *node.others)):
                self.evictable[i] += 0 if slot.value is None else len(slot.value)
        self._version += 1

    # ---- protecting ------------------------------------------------------------------------------------------

    def lock(self, where: Match | Insertion) -> Receipt:
        """Protects what `where` found from eviction until the receipt is given back.

        A match that ends inside a node splits it there. A match older than the tree's last change is looked up again.

        Raises:
          ReceiptError: What was matched or inserted is no longer all in the tree: match again.
          ArgumentError: `where` is neither.
        """
        if isinstance(where, Insertion):
            node, length = where.node, where.length
            if node is not None and not (self._holds(node) and node.is_whole):
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
        return Receipt(self, node, length, self._hold(node) if node else [], self._epoch)

    def unlock(self, receipt: Receipt) -> int:
        """Takes a receipt back; returns the pages of the first component that became evictable.

        Raises:
          ReceiptError: It was given back before, is another tree's, or is from before a reset. Nothing changes.
        """
        require_live(receipt, self, self._epoch)
        receipt.held = False
        before = self.evictable[0]
        if receipt.node is not None:
            self._release(receipt.node, receipt.since)
        return self.evictable[0] - before

    def narrow(self, receipt: Receipt, stop: int) -> None:
        """Cuts what a lock covers of the windows, whole nodes until then, back to what stops from `stop` on need of it.

        In whole pages, and the last one stays. Raises: as `unlock`. Cost: O(nodes it covers).
        """
        require_live(receipt, self, self._epoch)
        for i in self._stops.windows if receipt.since else ():
            begin = min(self._stops.begin(i, stop, self.page_size), receipt.length - self.page_size)
            if receipt.since[i] < begin:
                node: Any = receipt.node
                while node.start >= begin:
                    node = node.parent
                if node.end > begin:
                    node = self._split(node, begin)
                self._release(node, [position if j == i else begin for j, position in enumerate(receipt.since)])
                receipt.since[i] = begin

    def _path_again(self, match: Match) -> list[Node]:
        """The path of an outdated match, if all of it is still there."""
        if not match.length:
            return []
        path, _, length = self.find(match.key[: match.length])
        is_same = length == match.length and np.array_equal(self._values_to(path, length), match.pages)
        if is_same and self._stops.state_at(path) == match.state:  # not cached anew, elsewhere
            return path
        raise ReceiptError("where: the matched prefix is not in this tree, or no longer: match again")

    def _holds(self, node: Node) -> bool:
        while node.parent is not None:
            node = node.parent
        return isinstance(node, Root) and self._roots.get(node.namespace) is node

    def _hold(self, bottom: Node) -> list[int]:
        """Locks what a stop at the end of `bottom` needs; returns where that begins, for each component."""
        since: list[int] = []
        for i, reach in enumerate(self._stops.reaches):
            node, stop = bottom, bottom.end - reach
            while True:
                slot = node.others[i - 1] if i else node
                slot.locks += 1
                if slot.locks == 1 and slot.value is not None:
                    self._policies[i].discard(node)
                    count = len(slot.value)
                    self.evictable[i] -= count
                    self.protected[i] += count
                if node.start <= stop or not node.start:
                    break
                node = node.parent
            since.append(node.start)
        if self._stops.state:
            since[self._stops.state] = bottom.end - 1
        return since

    def _release(self, bottom: Node, since: Sequence[int]) -> None:
        for i, position in enumerate(since):
            node, freed = bottom, []
            while node.end > position:
                slot = node.others[i - 1] if i else node
                slot.locks -= 1
                if not slot.locks and slot.value is not None:
                    freed.append(node)
                    count = len(slot.value)
                    self.evictable[i] += count
                    self.protected[i] -= count
                node = node.parent
            for node in reversed(freed) if i else freed:  # see `EvictionPolicy`
                self._policies[i].add(node)

    # ---- looking at ------------------------------------------------------------------------------------------

    @property
    def roots(self) -> dict[bytes, Root]:
        """The top of each namespace, by its encoding. Not to be changed."""
        return self._roots

    @property
    def changes(self) -> int:
        """Leaves added, nodes split and nodes let go so far."""
        return self._version

    def find(self, key: RadixKey) -> tuple[list[Node], int, int]:
        """The nodes that `key` leads through, the tokens found in them, and those of them that `match` would give.

        No use of anything: for looking at.
        """
        if key.element_bytes != self.element_bytes:
            self._refuse(key)
        path: list[Node] = []
        root = self._roots.get(key.namespace)
        if root is None:
            return path, 0, 0
        end = key.length // self.page_size * self._page_bytes
        found = self._walk(key.packed, end, root, 0, path) // self.element_bytes
        return path, found, found if self._is_single else self._stops.usable(path, found)

    @property
    def policies(self) -> Sequence:
        """The eviction order of each component. Not to be changed."""
        return self._policies

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first. O(nodes)."""
        return below(self._roots.values())

    def __len__(self) -> int:
        """Pages cached for the first component. O(1)."""
        return self.evictable[0] + self.protected[0]

    def _path_to(self, node: Node) -> list[Node]:
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]
