"""The nodes of a tree: what all of its operations share, and the few ways in which one node changes.

`tree.py` has the operations that callers see; `insert.py` and `locks.py` have the two long ones, as functions over
`Nodes`. The walk compares tokens only: what a component has at the nodes of a path is looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError
from jaxcache.index.arguments import require_tree
from jaxcache.index.component import Component
from jaxcache.index.graves import Graves
from jaxcache.index.key import RadixKey, first_mismatch
from jaxcache.index.media import marks_of
from jaxcache.index.node import Node, Root, Slot, below, joined, owned
from jaxcache.index.policies.base import EvictionPolicy
from jaxcache.index.policies.registry import Policy
from jaxcache.index.resume import ResumePoints
from jaxcache.index.stops import Stops


class Nodes:
    """State and primitives of one tree; see `RadixTree`. Attributes are read by anybody and set by the tree alone.

    Attributes:
      page_size: Tokens a page.
      page_bytes: Bytes of a page of a key.
      element_bytes: Bytes of an element of a key.
      components: What is kept for each prefix.
      is_single: Whether there is one component only.
      stops: Where a lookup may stop, by the components.
      policy: Eviction order, the same for every component.
      with_hashes: Whether nodes keep page hashes.
      roots: The top of each namespace, by its encoding.
      policies: The eviction order of each component.
      evictable: For each component, values (pages or states) that no lock covers.
      protected: For each component, values that a lock covers.
      graves: The nodes removed last.
      resume: What of the further components is surplus, and evicted first.
      has_priorities: Whether any node has a priority other than 0.
      epoch: How often the tree was reset: receipts of an earlier one are refused.
      changes: Leaves added, nodes split and nodes removed so far.
    """

    __slots__ = (
        *("changes", "components", "element_bytes", "epoch", "evictable", "graves", "has_priorities", "is_single"),
        *("page_bytes", "page_size", "policies", "policy", "protected", "resume", "roots", "stops", "with_hashes"),
    )

    def __init__(
        self, page_size: int, components: Sequence[Component], policy: Policy, with_hashes: bool, element_bytes: int
    ):
        require_tree(page_size, policy, element_bytes)
        self.page_size = int(page_size)
        self.page_bytes = element_bytes * self.page_size
        self.element_bytes = element_bytes
        self.components = tuple(components)
        self.is_single = len(self.components) == 1
        self.stops = Stops(self.components)
        self.policy = policy
        self.with_hashes = with_hashes
        self.epoch = 0
        self.changes = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything, without freeing anything; receipts given out before are refused from now on."""
        self.roots: dict[bytes, Root] = {}
        self.graves = Graves(self.page_bytes, self.element_bytes)
        self.policies: list[EvictionPolicy] = [
            self.policy.build(leaves_only=i == 0) for i in range(len(self.components))
        ]
        self.evictable = [0] * len(self.components)
        self.protected = [0] * len(self.components)
        self.resume = ResumePoints(self.stops, self.page_size)
        self.has_priorities = False
        self.epoch += 1
        self.changes += 1

    def adopt(self, roots: dict[bytes, Root]) -> None:
        """Takes over the nodes below `roots`, unlocked, without their places in the policies. It must be empty."""
        self.roots = roots
        for node in below(roots.values()):
            self.has_priorities |= node.priority != 0
            for i, slot in enumerate((node, *node.others)):
                self.evictable[i] += 0 if slot.value is None else len(slot.value)
        self.changes += 1

    # ---- looking -------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first. O(nodes)."""
        return below(self.roots.values())

    def __len__(self) -> int:
        """Pages cached for the first component. O(1)."""
        return self.evictable[0] + self.protected[0]

    def find(self, key: RadixKey) -> tuple[list[Node], int, int]:
        """The nodes that `key` leads through, the tokens found in them, and those of them that `match` would give.

        Counts as no use. Raises: as `match`.
        """
        if key.element_bytes != self.element_bytes:
            self.refuse(key)
        path: list[Node] = []
        root = self.roots.get(key.namespace)
        if root is None:
            return path, 0, 0
        end = key.length // self.page_size * self.page_bytes
        found = self.walk(key, end, root, 0, path) // self.element_bytes
        return path, found, found if self.is_single else self.stops.usable(path, found)

    def walk(self, key: RadixKey, end: int, node: Node, offset: int, path: list[Node]) -> int:
        """Descends from `node`, which ends at byte `offset`, along `key.packed[offset:end]`.

        Appends every node entered to `path`; only the last can be entered in part. Returns the bytes matched, in whole
        pages.
        """
        if not key.media:
            return self._walk_tokens(key.packed, end, node, offset, path)
        packed, size, page_bytes = key.packed, self.element_bytes, self.page_bytes
        marks = [(size * start, mark) for start, mark in marks_of(key.media, self.page_size).items()]
        marks = [(at, mark) for at, mark in marks if offset <= at < end]
        stops = [*[at for at, _ in marks], end]
        offset = self._walk_tokens(packed, stops[0], node, offset, path)
        for (at, mark), stop in zip(marks, stops[1:], strict=True):
            node = path[-1] if path else node
            if offset != at or size * node.end != at:  # nothing else may be cached there, even of the same tokens
                return offset
            child = node.children.get(packed[at : at + page_bytes] + mark)
            if child is None:
                return offset
            path.append(child)
            offset += first_mismatch(child.key, packed, at, min(len(child.key), stop - at)) // page_bytes * page_bytes
            if offset == size * child.end:
                offset = self._walk_tokens(packed, stop, child, offset, path)
        return offset

    def _walk_tokens(self, packed: bytes, end: int, node: Node, offset: int, path: list[Node]) -> int:
        """`walk` where no media start."""
        page_bytes = self.page_bytes
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

    def values_to(self, path: list[Node], length: int) -> np.ndarray:
        """Values of the first component along `path`, cut at `length` tokens."""
        values: list[Any] = [node.value for node in path]
        last = path[-1]
        if last.end != length:
            values[-1] = values[-1][: (length - last.start) // self.page_size]
        return joined(values)

    def holds(self, node: Node) -> bool:
        """Whether `node` is in this tree."""
        while node.parent is not None:
            node = node.parent
        return isinstance(node, Root) and self.roots.get(node.namespace) is node

    def refuse(self, key: RadixKey) -> None:
        """Raises ArgumentError: `key` has elements of another size than the tree's."""
        sizes = f"{self.element_bytes} bytes an element, not {key.element_bytes}"
        raise ArgumentError(f"key: this tree has {sizes}: use keys of one class, not a {type(key).__name__}")

    # ---- changing one node -----------------------------------------------------------------------------------------

    def new_slots(self) -> tuple[Slot, ...]:
        """Empty slots of the further components, for a new node."""
        return () if self.is_single else tuple([Slot() for _ in self.stops.further])

    def fill(self, i: int, node: Node, value: np.ndarray) -> None:
        """Component `i` of `node`, which has no value, takes a copy of `value`."""
        slot = node.others[i - 1] if i else node
        slot.value = owned(value)
        if slot.locks:
            self.protected[i] += len(value)
        else:
            self.evictable[i] += len(value)
            self.policies[i].add(node)
        candidates = self.resume.candidates[i]
        if candidates is not None:
            candidates[node] = None

    def split(self, lower: Node, position: int, is_found: bool = True) -> Node:
        """Cuts `lower` at token `position`; returns the new upper half.

        Args:
          lower: In the tree; stays the object that ends where it did.
          position: Inside it, where a page ends.
          is_found: Whether a lookup or an insert found the upper half; the caller touches or locks the path next.
        """
        pages = (position - lower.start) // self.page_size
        cut = pages * self.page_bytes
        parent = lower.parent
        upper = Node(lower.key[:cut], lower.start, position, parent, self.new_slots(), lower.media)
        upper.priority = lower.priority
        parent.children[upper.name(self.page_bytes)] = upper
        lower.key, lower.media = lower.key[cut:], b""
        if lower.hashes is not None:
            upper.hashes, lower.hashes = lower.hashes.split(upper.key, lower.key)
        lower.start = position
        lower.parent = upper
        upper.children[lower.key[: self.page_bytes]] = lower
        for i in self.stops.spanning:
            top, bottom = (upper.others[i - 1], lower.others[i - 1]) if i else (upper, lower)
            top.locks = bottom.locks
            if bottom.value is not None:
                top.value, bottom.value = owned(bottom.value[:pages]), owned(bottom.value[pages:])
                policy = self.policies[i]
                policy.split(upper, lower) if is_found else policy.cut(upper, lower)
                if not top.locks:
                    policy.add(upper)
        if not self.is_single:
            self.resume.split(upper, lower)
        self.changes += 1
        return upper
