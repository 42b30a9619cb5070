"""The host's books of a manager in one record of arrays, and back."""

from __future__ import annotations

from jaxcache.errors import BrokenInvariant, SnapshotError
from jaxcache.index.saved import restore_tree, saved_tree
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager
from jaxcache.state_dict import Books, Columns, prefixed

_BYTES_BESIDE = 256 << 20  # namespaces, what a policy learned, headers
_BYTES_A_PAGE = 1 << 10  # of records, values and ghosts; a node has at least a page


def saved_books(manager: MemoryManager) -> Books:
    """All of an idle manager's books. O(pages and nodes).

    Raises:
      LockedError, SnapshotError: Somebody holds locks or pages.
    """
    books = prefixed("tree", saved_tree(manager.cache.tree)) | prefixed("pages", manager.allocator.saved_books())
    books |= prefixed("rows", manager.req_to_token_pool.saved_books())
    return books if manager.states is None else books | prefixed("states", manager.states.saved_books())


def restore_books(manager: MemoryManager, books: Books) -> None:
    """Gives a new manager the books of another one. O(pages and nodes).

    Raises:
      SnapshotError: These are no books of a manager with this config. The manager is of no use then.
    """
    columns = Columns(books)
    restore_tree(manager.cache.tree, columns.part("tree"))
    if manager.cache.events is not None:
        manager.cache.events.restate()
    manager.allocator.restore_books(columns.part("pages"))
    manager.req_to_token_pool.restore_books(columns.part("rows"))
    if manager.states is not None:
        manager.states.restore_books(columns.part("states"))
    try:
        manager.check_memory()
    except BrokenInvariant as problem:
        raise SnapshotError(f"books: those of the tree and of the allocators differ: {problem}") from problem


def most_bytes(config: MemoryConfig) -> int:
    """What the books of a cache of this size cannot exceed, be they of a cache of short or long prefixes."""
    kv = config.kv
    element_bytes = 8 if config.is_eagle else 4
    states = 0 if config.states is None else config.states.num_states
    pages = kv.size // kv.page_size + states
    return _BYTES_BESIDE + pages * (kv.page_size * element_bytes + _BYTES_A_PAGE)
