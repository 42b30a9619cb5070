"""Nodes of the tree, and what match, insert and evict return. Data only, no decisions.

    root (one a namespace)
     └─ node   key = b"...", whole pages of packed elements
         │     value = [7 8 9], one page id a page   <- the first component lives in the node itself,
         │     others = (Slot, ...)                     each further one in a Slot beside it
         ├─ node
         └─ node                 siblings differ within their first page

With one component only the node, and its dict once it has children, are tracked by the garbage collector. Positions are
counted in elements of the key: tokens, or pairs of them for `BigramKey`; the words below say tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxcache.index.key import RadixKey
    from jaxcache.index.page_hashes import PageHashes


_INT32 = np.dtype(np.int32)


def owned(values: np.ndarray) -> np.ndarray:
    """A read-only copy of ids: a slice would keep the whole array behind it alive."""
    copy = values.astype(_INT32)
    copy.setflags(False)  # type: ignore[call-arg]  # write=False, in half the time
    return copy


EMPTY_IDS = owned(np.empty(0))
NOTHING = EMPTY_IDS  # the former name


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts, concatenated; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else EMPTY_IDS


class Slot:
    """What one component keeps at one node.

    Attributes:
      value: int32 array, a page id a page (a spanning component) or one state id; None for a hole (tombstone): evicted,
        or never offered.
      locks: Receipts that cover this value.
    """

    __slots__ = ("locks", "value")

    def __init__(self) -> None:
        self.value: Any = None  # an array in all code that has checked, or that asks the first component
        self.locks = 0


class Node(Slot):
    """A run of whole pages below its parent; itself the slot of the tree's first component.

    Attributes:
      key: Packed tokens of this run, a multiple of a page, never empty but for a root.
      start: Tokens before this run.
      end: Tokens from the start of the sequence to the end of this run.
      parent: None for a root and for a node that has left the tree.
      children: By their names: the bytes of their first page, and of the media that start there.
      others: Slots of the tree's further components.
      priority: Highest priority of the requests inserted through this node.
      hashes: Chained digest of each page, kept only when the tree was asked to, or `compute_node_hash`.
      media: What `marks_of` has for its first page; empty where no image starts there. None starts in a later page: the
        node would begin with that one.
    """

    __slots__ = ("children", "end", "hashes", "key", "media", "others", "parent", "priority", "start")

    def __init__(
        self, key: bytes, start: int, end: int, parent: Node | None, others: tuple[Slot, ...], media: bytes = b""
    ):
        self.value = None
        self.locks = 0
        self.key = key
        self.start = start
        self.end = end
        self.parent: Any = parent  # a Node in all code that has met a node inside the tree
        self.children: dict[bytes, Node] = {}
        self.others = others
        self.priority = 0
        self.hashes: PageHashes | None = None
        self.media = media

    def name(self, page_bytes: int) -> bytes:
        """What its parent lists it under: its first page, of so many bytes, and the media that start there."""
        return self.key[:page_bytes] + self.media

    @property
    def tokens(self) -> int:
        """Tokens of this run."""
        return self.end - self.start

    @property
    def token_ids(self) -> np.ndarray:
        """int32 tokens of this run, as a read-only view; of pairs the first ones."""
        packed = np.frombuffer(self.key, "<i4")
        return packed[:: len(packed) // self.tokens]

    @property
    def is_whole(self) -> bool:
        """Whether each of the tree's further components has a value here."""
        for slot in self.others:  # noqa: SIM110  # `all` of a generator takes three times as long
            if slot.value is None:
                return False
        return True

    def slot(self, component: int) -> Slot:
        """The slot of the component with that index."""
        return self.others[component - 1] if component else self

    def __repr__(self) -> str:
        return f"Node({self.start}:{self.end}, locks={self.locks}, children={len(self.children)})"


class Root(Node):
    """Top of one namespace. Has no value, is never locked, and is removed with its last child."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: bytes):
        super().__init__(b"", 0, 0, None, ())
        self.namespace = namespace


def below(roots: Iterable[Node]) -> Iterator[Node]:
    """Every node below `roots`, parents first."""
    todo = list(roots)
    while todo:
        node = todo.pop()
        todo.extend(node.children.values())
        if node.parent is not None:
            yield node


def path_to(node: Node) -> list[Node]:
    """The nodes from below the root down to `node`; none for a root."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


class Match:
    """Where a lookup ended: a position on a path, perhaps inside its last node.

    Attributes:
      key: The key that was looked up.
      length: Tokens found, a multiple of the page size.
      pages: int32 page id of each page found, read-only.
      node: The node the match ends in or at; None when nothing was found.
      structural_length: Tokens found before further components cut the match back; `length` with one component.
      state: Id of the state saved at `length`; 0 if nothing was found, or the tree keeps no states.
    """

    __slots__ = ("key", "length", "node", "pages", "path", "state", "structural_length", "version")

    def __init__(
        self,
        key: RadixKey,
        length: int,
        structural_length: int,
        pages: np.ndarray,
        path: list[Node],
        version: int,
        state: int = 0,
    ):
        self.key = key
        self.length = length
        self.structural_length = structural_length
        self.pages = pages
        self.path = path
        self.node = path[-1] if path else None
        self.version = version
        self.state = state

    def __repr__(self) -> str:
        return f"Match(length={self.length}, node={self.node!r})"


class Insertion:
    """What an insert did.

    Attributes:
      node: The node that ends the key; None for a key shorter than a page.
      length: Tokens of the key that are in the tree now (the key, cut to whole pages).
      present: Tokens of them that were in the tree before.
      spare: For each component, the offered ids the tree did not take, without zeros: the caller still owns them.
      added: The nodes that were added, parents first: none, one, or several where a component was offered for the end
        only, or media start.
      healed: Nodes that were in the tree with a hole of a further spanning component, which the offer filled.
    """

    __slots__ = ("_kept", "added", "healed", "length", "node", "present", "spare")

    def __init__(
        self,
        node: Node | None,
        added: list[Node],
        healed: list[Node],
        length: int,
        present: int,
        kept: list[np.ndarray],
        spare: tuple[np.ndarray, ...],
    ):
        self.node = node
        self.added = added
        self.healed = healed
        self.length = length
        self.present = present
        self._kept = kept
        self.spare = spare

    @property
    def leaf(self) -> Node | None:
        """The last node that was added, which ends the key; None if nothing was added."""
        return self.added[-1] if self.added else None

    @property
    def kept(self) -> np.ndarray:
        """The tree's own page ids from where the caller's lock ends to `present`, for what was offered there."""
        return joined(self._kept)


class Eviction:
    """What an eviction, or the drop of a namespace, removed from the tree; the caller owns the values now.

    Attributes:
      values: For each component, the values removed.
      nodes: Nodes removed, in order, with their keys and hashes but without values.
    """

    __slots__ = ("nodes", "values")

    def __init__(self, values: tuple[np.ndarray, ...], nodes: list[Node]):
        self.values = values
        self.nodes = nodes
