"""What there is to see at a node, and in which colour. The drawings differ only in what they draw it with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxcache.index.key import Namespace
from jaxcache.index.node import Node
from jaxcache.index.recency import LRU
from jaxcache.index.tree import RadixTree

TokenText = Callable[[np.ndarray], str]
"""Makes int32 tokens readable; a tokenizer's `decode` will do."""

LOCKED = "#f6c453"
YOUNG, OLD = (94, 205, 190), (232, 236, 241)  # between them: unlocked nodes by age
UNRANKED = "#a8dcd5"


@dataclass(frozen=True, eq=False)
class Look:
    """One node, ready to be drawn.

    Attributes:
      node: The node itself.
      tokens: Its tokens, as text.
      pages: Its page ids, runs shortened; with several components, each under its name.
      age: 0 for the node used last, 1 for the one that is evicted next; None if it is locked or its policy keeps no
        order of use.
    """

    node: Node
    tokens: str
    pages: str
    age: float | None

    @property
    def is_locked(self) -> bool:
        """Whether eviction must leave it alone."""
        return self.node.locks > 0

    @property
    def state(self) -> str:
        """Its standing towards eviction, in words."""
        if self.is_locked:
            return f"locked by {self.node.locks}"
        return "evicted next" if self.age == 1 else "unlocked"

    @property
    def colour(self) -> str:
        """Amber if locked, else from fresh to pale with age; as #rrggbb."""
        if self.is_locked:
            return LOCKED
        if self.age is None:
            return UNRANKED
        return "#" + "".join(f"{round(y + (o - y) * self.age):02x}" for y, o in zip(YOUNG, OLD, strict=True))


def looks(tree: RadixTree, text: TokenText | None = None) -> dict[Node, Look]:
    """Every node of the tree but the roots, parents first. O(nodes and their values)."""
    ages = _ages(tree)
    text = text or numbers
    return {node: Look(node, text(node.token_ids), _pages(tree, node), ages.get(node)) for node in tree.nodes()}


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


def _pages(tree: RadixTree, node: Node) -> str:
    shown = []
    for i, component in enumerate(tree.components):
        value = node.slot(i).value
        shown.append((component.name, "none" if value is None else runs(value)))
    return shown[0][1] if len(shown) == 1 else ", ".join(f"{name} {value}" for name, value in shown)


def _ages(tree: RadixTree) -> dict[Node, float]:
    """Age of the unlocked nodes, oldest first; nothing for a policy that does not go by use."""
    policy = tree.policies[0]
    if not isinstance(policy, LRU):
        return {}
    last = max(len(policy) - 1, 1)
    return {node: 1 - i / last for i, node in enumerate(policy)}
