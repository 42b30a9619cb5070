"""What the tree evicted or dropped lately: a ring, bounded in nodes and in tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jaxcache.index.key import TOKEN_BYTES, RadixKey
from jaxcache.index.media import marks_of
from jaxcache.index.node import Node, Root

_MOST_BYTES = 1 << 20
_NODE_BYTES = 256


class Graves:
    """The nodes that left a tree last. O(1) a node, and no token is copied or looked at.

    A node is kept with the parent it had, so that the whole prefix can be compared, exactly, when it is asked. What
    is kept of a node is its key and no values; the oldest are forgotten first, an eighth of them at a time.

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
        """`node` is evicted from its `parent`, as change number `now`. Parents go after their children."""
        self._buried.append((node, parent, now, is_drop))
        self._left -= len(node.key) + _NODE_BYTES
        if self._left < 0:
            self._forget()

    def _forget(self) -> None:
        while self._left < self._most_bytes >> 3:
            oldest = self._buried.popleft()[0]
            self._left += len(oldest.key) + _NODE_BYTES

    def search(self, key: RadixKey, found: int) -> tuple[int, int, bool] | None:
        """The furthest that prefixes of `key` reached that were evicted, when the last such node went, if by a drop.

        Looks beyond `found` tokens only. Cost: O(nodes kept and their ancestors), and the compares that go far.
        """
        best: tuple[int, int, bool] | None = None
        page = self._page_bytes
        parents = {node: parent for node, parent, _, _ in self._buried}
        marks = marks_of(key.media, page // self._element_bytes)
        for node, _, when, is_drop in self._buried:
            begin = self._element_bytes * node.start
            if key.packed[begin : begin + page] != node.key[:page]:
                continue
            reached = self._reach(node, key, parents, marks)
            if reached > found and (best is None or (reached, when) > best[:2]):
                best = (reached, when, is_drop)
        return best

    def _reach(self, node: Node, key: RadixKey, parents: dict[Node, Node], marks: dict[int, bytes]) -> int:
        """Tokens of `key`, in whole pages, that end in or at `node`; 0 if what is above it is not in `key`."""
        size, page = self._element_bytes, self._page_bytes
        inside = [start for start in marks if node.start < start < node.end]
        if node.media != marks.get(node.start, b""):
            return 0
        begin, end = size * node.start, size * min([node.end, *inside])
        same = begin
        while same < end and key.packed[same : same + page] == node.key[same - begin : same - begin + page]:
            same += page
        for ancestor in _ancestors(node, parents):
            if isinstance(ancestor, Root):
                return same // size if ancestor.namespace == key.namespace else 0
            has_others = any(ancestor.start < start < ancestor.end for start in marks)
            if has_others or ancestor.media != marks.get(ancestor.start, b""):
                break
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
