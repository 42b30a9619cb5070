"""Why a lookup stopped where it did.

    explain(tree, key)   Explanation: a reason, numbers, and one readable line
    Graves               what the tree let go lately: a ring, bounded in nodes and in tokens

While the tree works nothing is hashed, and nothing written but one entry a node let go: who asks pays the price.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxcache.index.key import TOKEN_BYTES, RadixKey
from jaxcache.index.node import Node, Root

if TYPE_CHECKING:
    from jaxcache.index.tree import RadixTree

_MOST_BYTES = 1 << 20
_NODE_BYTES = 256


class Reason(enum.Enum):
    """Why a lookup stopped; the first that applies."""

    FOUND = "all of it was found"
    WINDOW_GONE = "what a window needs was let go"
    NO_STATE = "no state was saved there"
    TAIL = "the rest is shorter than a page"
    EVICTED = "the rest was evicted"
    DROPPED = "the rest was dropped with its namespace"
    OTHER_NAMESPACE = "the rest is cached in another namespace"
    NEVER_SEEN = "the rest was never cached, or too long ago to remember"


@dataclass(frozen=True)
class Explanation:
    """Why a lookup stopped where it did. `str()` is one line.

    Attributes:
      reason: The first that applies.
      length: Tokens that the lookup finds.
      asked: Tokens that it looks for.
      known: Tokens that it would find without what stopped it, at least.
      component: What was missing, for WINDOW_GONE and NO_STATE.
      policy: What evicted it, for EVICTED and WINDOW_GONE.
      changes_ago: How many changes of the tree (leaf added, node split or let go) ago, for EVICTED and DROPPED.
      namespace: Encoding of the namespace that has it, for OTHER_NAMESPACE. It may hold a secret: not in the line.
    """

    reason: Reason
    length: int
    asked: int
    known: int
    component: str | None = None
    policy: str | None = None
    changes_ago: int | None = None
    namespace: bytes | None = None

    def __str__(self) -> str:
        line = f"{self.length} of {self.asked} tokens: {self.reason.value}"
        if self.component is not None:
            line += f" ({self.component}; {self.known} tokens are cached)"
        if self.changes_ago is not None:
            by = f", by {self.policy}" if self.policy is not None else ""
            line += f", up to token {self.known}{by}, {self.changes_ago} changes ago"
        if self.namespace is not None:
            line += f", up to token {self.known}"
        return line


class Graves:
    """The nodes a tree let go last. O(1) a node, and no token is copied or looked at.

    A node is kept with the parent it had, so that the whole prefix can be compared, exactly, when somebody asks. What
    is kept is a node let go: its key and no values; the oldest are forgotten first, an eighth of them at a time.

    Args:
      page_bytes: Bytes of a page of a key.
      element_bytes: Bytes of an element of a key.
      most_bytes: Of keys, and 256 a node for the rest of it.
    """

    def __init__(self, page_bytes: int, element_bytes: int = TOKEN_BYTES, most_bytes: int = _MOST_BYTES):
        self._page_bytes = page_bytes
        self._element_bytes = element_bytes
        self._most_bytes = self._left = most_bytes
        self._buried: deque[tuple[Node, Node, int, bool]] = deque()

    def bury(self, node: Node, parent: Node, now: int, is_drop: bool) -> None:
        """`node` is let go by its `parent`, as change number `now`. Parents go after their children."""
        self._buried.append((node, parent, now, is_drop))
        self._left -= len(node.key) + _NODE_BYTES
        if self._left < 0:
            self._forget()

    def _forget(self) -> None:
        while self._left < self._most_bytes >> 3:
            oldest = self._buried.popleft()[0]
            self._left += len(oldest.key) + _NODE_BYTES

    def search(self, key: RadixKey, found: int) -> tuple[int, int, bool] | None:
        """The furthest that prefixes of `key` reached that were let go, when the last such node went, if by a drop.

        Looks beyond `found` tokens only. Cost: O(nodes kept and their ancestors), and the compares that go far.
        """
        best: tuple[int, int, bool] | None = None
        page = self._page_bytes
        parents = {node: parent for node, parent, _, _ in self._buried}
        for node, _, when, is_drop in self._buried:
            begin = self._element_bytes * node.start
            if key.packed[begin : begin + page] != node.key[:page]:
                continue
            reached = self._reach(node, key, parents)
            if reached > found and (best is None or (reached, when) > best[:2]):
                best = (reached, when, is_drop)
        return best

    def _reach(self, node: Node, key: RadixKey, parents: dict[Node, Node]) -> int:
        """Tokens of `key`, in whole pages, that end in or at `node`; 0 if what is above it is not in `key`."""
        size, page = self._element_bytes, self._page_bytes
        begin, end = size * node.start, size * node.end
        same = begin
        while same < end and key.packed[same : same + page] == node.key[same - begin : same - begin + page]:
            same += page
        for ancestor in _ancestors(node, parents):
            if isinstance(ancestor, Root):
                return same // size if ancestor.namespace == key.namespace else 0
            if not key.packed.startswith(ancestor.key, size * ancestor.start):
                break
        return 0

    def __len__(self) -> int:
        return len(self._buried)


def _ancestors(node: Node, parents: dict[Node, Node]) -> Iterator[Node]:
    """What is above `node`, also where it has gone."""
    above = parents.get(node) or node.parent
    while above is not None:
        yield above
        above = parents.get(above) or above.parent


def explain(tree: RadixTree, key: RadixKey) -> Explanation:
    """Why `tree.match(key)` would stop where it would. Changes nothing, not even recency.

    Cost: a lookup in every namespace, and a look at every node let go lately; milliseconds, for people and not for hot
    loops.
    """
    path, found, length = tree.find(key)
    asked, whole = key.length, key.length // tree.page_size * tree.page_size
    policy = tree.policy.value
    if length == asked:
        return Explanation(Reason.FOUND, length, asked, length)
    if length < found:
        return _missing(tree, path, found, length, asked)
    if found == whole:
        return Explanation(Reason.TAIL, length, asked, found)
    gone = tree.graves.search(key, found)
    if gone is not None:
        known, when, is_drop = gone
        reason, by = (Reason.DROPPED, None) if is_drop else (Reason.EVICTED, policy)
        return Explanation(reason, length, asked, known, policy=by, changes_ago=tree.changes - when)
    elsewhere, known = _elsewhere(tree, key)
    if known > found:
        return Explanation(Reason.OTHER_NAMESPACE, length, asked, known, namespace=elsewhere)
    return Explanation(Reason.NEVER_SEEN, length, asked, found)


def _missing(tree: RadixTree, path: list[Node], found: int, length: int, asked: int) -> Explanation:
    """What a component lacks before the end of what is cached. The tokens are there, what goes with them is not."""
    for i, component in enumerate(tree.components):
        if component.spans:
            needed = [node for node in path if node.end > found - component.reach and node.slot(i).value is None]
            if needed:
                name = component.name
                return Explanation(Reason.WINDOW_GONE, length, asked, found, name, tree.policy.value)
    states = [component.name for component in tree.components if not component.spans]
    return Explanation(Reason.NO_STATE, length, asked, found, states[0])


def _elsewhere(tree: RadixTree, key: RadixKey) -> tuple[bytes, int]:
    """The other namespace that has most of `key`, and how many tokens."""
    best, known = b"", 0
    for namespace in tree.roots:
        if namespace != key.namespace:
            _, found, _ = tree.find(key.within(namespace))
            if found > known:
                best, known = namespace, found
    return best, known
