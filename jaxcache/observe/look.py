"""What there is to see at a node, and in which colour. The drawings differ only in what they draw it with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxcache.index.component import Component
from jaxcache.index.key import Namespace
from jaxcache.index.node import Node
from jaxcache.index.policies.lru import LRU
from jaxcache.index.stops import Stops
from jaxcache.index.tree import RadixTree

if TYPE_CHECKING:
    from jaxtyping import Int32

    from jaxcache.index.policies.base import EvictionPolicy

TokenText = Callable[[np.ndarray], str]
"""Makes int32 tokens readable; a tokenizer's `decode` will do."""

LOCKED = "#f6c453"
YOUNG, OLD = (94, 205, 190), (232, 236, 241)  # between them: unlocked nodes by age
UNRANKED = "#a8dcd5"


@dataclass(frozen=True, eq=False)
class Part:
    """What one component has at one node, ready to be drawn.

    Attributes:
      component: Whose it is.
      value: Its page ids, or its state; None if there is nothing: a tombstone.
      locks: Receipts that cover it.
      age: 0 for what was used last, 1 for what is evicted next; None if it is locked, is not there, or its policy keeps
        no order of use.
    """

    component: Component
    value: Int32[np.ndarray, " values"] | None
    locks: int
    age: float | None

    @property
    def ids(self) -> str:
        """Its page ids, runs shortened, or its state."""
        return "none" if self.value is None else runs(self.value)

    @property
    def state(self) -> str:
        """Its standing towards eviction, in words."""
        if self.locks:
            return f"locked by {self.locks}"
        return "evicted next" if self.age == 1 else "unlocked"

    @property
    def words(self) -> str:
        """Ids and standing, for a further component."""
        return f"{self.component.name} {self.ids}" + ("" if self.value is None else f", {self.state}")

    @property
    def colour(self) -> str:
        """Amber if locked, else from fresh to pale with age; as #rrggbb."""
        if self.locks:
            return LOCKED
        if self.age is None:
            return UNRANKED
        return "#" + "".join(f"{round(y + (o - y) * self.age):02x}" for y, o in zip(YOUNG, OLD, strict=True))


@dataclass(frozen=True, eq=False)
class Look:
    """One node, ready to be drawn.

    Attributes:
      node: The node itself.
      tokens: Its tokens, as text.
      parts: What each component has there.
      stops: The lengths, within the node, at which a lookup may stop; only told where there are several components.
    """

    node: Node
    tokens: str
    parts: tuple[Part, ...]
    stops: tuple[int, ...] = ()

    @property
    def pages(self) -> str:
        """Its page ids, runs shortened; with several components, each under its name."""
        if len(self.parts) == 1:
            return self.parts[0].ids
        return ", ".join(f"{part.component.name} {part.ids}" for part in self.parts)

    @property
    def age(self) -> float | None:
        """See `Part.age`."""
        return self.parts[0].age

    @property
    def is_locked(self) -> bool:
        """Whether eviction must leave it alone."""
        return self.node.locks > 0

    @property
    def state(self) -> str:
        """Its standing towards eviction, in words."""
        return self.parts[0].state

    @property
    def colour(self) -> str:
        """See `Part.colour`."""
        return self.parts[0].colour


def looks(tree: RadixTree, text: TokenText | None = None) -> dict[Node, Look]:
    """Every node of the tree but the roots, parents first.

    Cost: O(nodes and their values); with several components, times the depth of the tree.
    """
    ages = [_ages(policy) for policy in tree.policies]
    text = text or numbers
    stops = Stops(tree.components) if len(tree.components) > 1 else None
    seen: dict[Node, Look] = {}
    for node in tree.nodes():
        parts = []
        for i, component in enumerate(tree.components):
            slot = node.slot(i)
            parts.append(Part(component, slot.value, slot.locks, ages[i].get(node)))
        seen[node] = Look(node, text(node.token_ids), tuple(parts), _stops(tree, stops, node) if stops else ())
    return seen


def _stops(tree: RadixTree, rules: Stops, node: Node) -> tuple[int, ...]:
    path = [node]
    while path[-1].parent.parent is not None:
        path.append(path[-1].parent)
    path.reverse()
    ends = range(node.start + tree.page_size, node.end + 1, tree.page_size)
    return tuple(end for end in ends if rules.usable(path, end) == end)


def numbers(tokens: np.ndarray) -> str:
    """Tokens as they are."""
    return " ".join(map(str, tokens.tolist()))


def runs(pages: np.ndarray) -> str:
    """Page ids in order, with neighbours drawn together: 3 4 5 9 is `3-5 9`."""
    parts = []
    for _, group in itertools.groupby(enumerate(pages.tolist()), lambda pair: pair[1] - pair[0]):
        run = [page for _, page in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return " ".join(parts)


def shortened(text: str, room: int) -> str:
    """`text`, or its beginning and an ellipsis if it has more than `room` characters; nothing if not even that fits."""
    if len(text) <= room:
        return text
    return text[: room - 1].rstrip() + "…" if room > 1 else ""


def namespace_name(namespace: bytes) -> str:
    """An encoded `Namespace` as a reader may see it: a salt is a secret and stays one."""
    space = Namespace.decode(namespace)
    fields = [("extra_key", space.extra_key), ("lora_id", space.lora_id)]
    fields += [("cache_salt", None if space.cache_salt is None else "..."), *(("media", each) for each in space.media)]
    shown = [
        f"{name}={words if isinstance(words, str) else words.hex()[:16]}" for name, words in fields if words is not None
    ]
    return "namespace " + ", ".join(shown) if shown else "default namespace"


def outline(tree: RadixTree, text: TokenText | None = None, max_nodes: int = 200) -> str:
    """The tree as indented lines, one a node."""
    lines: list[str] = []
    seen = looks(tree, text)
    for namespace, root in sorted(tree.roots.items()):
        lines.append(namespace_name(namespace))
        todo = [(child, 1) for child in reversed(root.children.values())]
        while todo:
            node, depth = todo.pop()
            look = seen[node]
            span = f"{node.start}-{node.end}  {shortened(look.tokens, 60)}"
            lines.append("  " * depth + f"{span}  pages {look.pages}  {look.state}")
            todo += [(child, depth + 1) for child in reversed(node.children.values())]
    if len(lines) > max_nodes:
        lines[max_nodes:] = [f"... {len(lines) - max_nodes} more lines"]
    return "\n".join(lines) or "nothing is cached"


def _ages(policy: EvictionPolicy) -> dict[Node, float]:
    """Age of the unlocked nodes, oldest first; nothing for a policy that does not go by use."""
    if not isinstance(policy, LRU):
        return {}
    last = max(len(policy) - 1, 1)
    return {node: 1 - i / last for i, node in enumerate(policy)}
