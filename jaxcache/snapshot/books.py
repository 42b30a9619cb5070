"""What the host knows of a whole cache, as one state dict of arrays, and back."""

from __future__ import annotations

from jaxcache.errors import BrokenInvariantError, SnapshotError
from jaxcache.index.saved import restore_tree, saved_tree
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager
from jaxcache.state_dict import Columns, StateDict, prefixed

_BYTES_BESIDE = 256 << 20  # namespaces, what a policy learned, headers
_BYTES_A_PAGE = 1 << 10  # of records, values and ghosts; a node has at least a page


def state_dict(manager: MemoryManager) -> StateDict:
    """All that the host of an idle manager knows. O(pages and nodes).

    Raises:
      LockedError, SnapshotError: Locks or pages are held.
    """
    arrays = prefixed("tree", saved_tree(manager.cache.tree))
    arrays |= prefixed("rows", manager.req_to_token_pool.state_dict())
    for component in manager.cache.components:
        arrays |= component.state_dict()
    return arrays


def load_state_dict(manager: MemoryManager, arrays: StateDict) -> None:
    """Gives a new manager the state dict of another one. O(pages and nodes).

    Raises:
      SnapshotError: It is not one of a manager with this config. The manager is of no use then.
    """
    columns = Columns(arrays)
    restore_tree(manager.cache.tree, columns.part("tree"))
    if manager.cache.events is not None:
        manager.cache.events.restate()
    for component in manager.cache.components:
        component.load_state_dict(columns)
    manager.req_to_token_pool.load_state_dict(columns.part("rows"))
    try:
        manager.check_memory()
    except BrokenInvariantError as problem:
        raise SnapshotError(f"books: those of the tree and of the allocators differ: {problem}") from problem


def max_bytes(config: MemoryConfig) -> int:
    """What the state dict of a cache of this size cannot exceed, be it of a cache of short or long prefixes."""
    element_bytes = 8 if config.is_eagle else 4
    return _BYTES_BESIDE + config.num_values * (config.kv.page_size * element_bytes + _BYTES_A_PAGE)
