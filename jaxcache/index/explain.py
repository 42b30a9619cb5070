"""Why a lookup stopped where it did.

    explain(tree, key)   Explanation: a reason, numbers, and one readable line
    Graves               what left the tree lately: a ring, bounded in nodes and in tokens

While the tree works nothing is hashed, and one entry a node evicted is all that is written: the question pays.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxcache.index.key import RadixKey
from jaxcache.index.node import Node

if TYPE_CHECKING:
    from jaxcache.index.tree import RadixTree


class Reason(enum.Enum):
    """Why a lookup stopped; the first that applies."""

    FOUND = "all of it was found"
    WINDOW_GONE = "what a window needs was evicted"
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
      changes_ago: How many changes of the tree (leaf added, node split or evicted) ago, for EVICTED and DROPPED.
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


def explain(tree: RadixTree, key: RadixKey) -> Explanation:
    """Why `tree.match(key)` would stop where it would. Changes nothing, not even recency.

    Cost: a lookup in every namespace, and a look at every node evicted lately; milliseconds, for people and not for hot
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
