"""A digest of what a manager's host knows: equal after equal operations."""

from __future__ import annotations

import hashlib
from typing import Any

from jaxcache.manager.manager import MemoryManager


def fingerprint(memory: MemoryManager) -> str:
    """A digest of the host's state: tree with locks and order of use, allocators with their free lists, running rows.

    Equal for managers that were told the same, such as those of two ranks. O(pages and nodes).
    """
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    tree, table = memory.cache.tree, memory.req_to_token_pool
    numbers: dict[Any, int] = {}
    for namespace, root in sorted(tree.roots.items()):
        todo = sorted(root.children.values(), key=_key, reverse=True)
        add(namespace, len(todo))
        while todo:
            node = todo.pop()
            numbers[node] = len(numbers)
            slots = [node.slot(i) for i in range(len(tree.components))]
            held = [(slot.locks, None if slot.value is None else slot.value.tolist()) for slot in slots]
            add(node.start, node.key, node.media, node.priority, held)
            todo += sorted(node.children.values(), key=_key, reverse=True)
    for policy in tree.policies:
        add([numbers[node] for node in policy])
    for component in memory.cache.components:
        add(component.name, *component.digest())
    for row, request in sorted(memory.running.items()):
        add(row, request.rid, request.kv_len, request.protected_len)
        add(table.row_pages(row, 0, request.num_pages).tolist(), memory.working_state(request))
    return digest.hexdigest()


def _key(node: Any) -> tuple[bytes, bytes]:
    return node.key, node.media
