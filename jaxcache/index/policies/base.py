"""What an eviction policy is.

The tree tells a policy which nodes may go (`add`, `discard`), which have gone (`remove`), which were used (`touch`) or
found by a lookup (`hit`), which were divided (`split`) and which became leaves (`exposed`), and asks for the next
`victim`. A policy never looks at the tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from jaxcache.index.node import Node
from jaxcache.state_dict import Columns, StateDict


class EvictionPolicy(ABC):
    """The order in which one component lets nodes go.

    Args:
      leaves_only: Only childless nodes may be chosen (the first component), and a path is used from the leaf up, so
        that leaves go first. Otherwise any node added may, and a path is used from the root down: what is furthest from
        its end, where the next request goes on, goes first.
    """

    __slots__ = ("leaves_only",)

    def __init__(self, leaves_only: bool):
        self.leaves_only = leaves_only

    def in_order_of_use(self, path: Sequence[Node]) -> Iterable[Node]:
        """The nodes of `path`, which leads from the root down, the one that is to go first being first."""
        return reversed(path) if self.leaves_only else path

    @abstractmethod
    def add(self, node: Node) -> None:
        """`node` may be evicted from now on and counts as just used: it is new, or its last lock went."""

    @abstractmethod
    def discard(self, node: Node) -> None:
        """`node`, which was added, may not be evicted: it was locked. What is known of it stays known."""

    def remove(self, node: Node) -> None:
        """`node`, which was added, was evicted or dropped. Its key and its parent are still what they were."""
        self.discard(node)

    @abstractmethod
    def touch(self, path: Sequence[Node]) -> None:
        """The nodes of `path`, from the root down, were used; those that were not added are ignored."""

    def hit(self, path: Sequence[Node]) -> None:
        """A lookup found the nodes of `path`, from the root down: a use, and a sign that more may follow."""
        self.touch(path)

    @abstractmethod
    def split(self, upper: Node, lower: Node) -> None:
        """`upper` was cut off the front of `lower` because it was found without the rest. `add` follows, or a lock."""

    @abstractmethod
    def cut(self, upper: Node, lower: Node) -> None:
        """The same, but nothing was found: both halves keep what was known of the whole. `add` follows, or a lock."""

    @abstractmethod
    def exposed(self, node: Node) -> None:
        """`node`, which was added, lost its last child."""

    @abstractmethod
    def victim(self) -> Node | None:
        """The next node to evict; it stays until removed. None when there is none."""

    def problems(self, cached: Set[Node]) -> Iterator[str]:
        """What is wrong with the policy's books, one sentence each; `cached` are all nodes with a value. O(cached)."""
        yield from ()

    @abstractmethod
    def state_dict(self, number: Mapping[Node, int]) -> StateDict:
        """All that it knows, with numbers for nodes, none of which may be locked. O(nodes)."""

    @abstractmethod
    def load_state_dict(self, books: Columns, nodes: Sequence[Node]) -> None:
        """Knows what the policy with these books knew, of the nodes with these numbers. It must be new. O(nodes).

        Raises:
          SnapshotError: These are no books of such a policy.
        """

    @abstractmethod
    def __iter__(self) -> Iterator[Node]:
        """Every node added, in no particular order."""

    @abstractmethod
    def __contains__(self, node: Node) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...
