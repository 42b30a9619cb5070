"""Memory that torch looks into is not released; once the view has ended it is, and the view stays dead."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache import (
    BorrowedError,
    DeadViewError,
    MemoryConfig,
    MHAConfig,
    ReleasedError,
    init_memory_pool_and_cache,
)
from tests.snapshot.caches import contents, fill
from tests.support.recorded_lives import make_config
from torch_bridge import borrow, share


def full_manager(config: MemoryConfig):
    memory = init_memory_pool_and_cache(config)
    fill(memory, 1)
    memory.cache.insert_pages(np.arange(12), memory.allocator.alloc_pages(3))
    return memory


def test_a_shared_pool_is_released_when_the_share_has_ended():
    kv = MHAConfig(size=64, page_size=4, dtype=jnp.bfloat16, layer_num=2, head_num=2, head_dim=4)
    memory = full_manager(MemoryConfig(kv, max_running=2, max_context_len=32))
    rows = contents(memory)
    shared = share(memory.pool)
    keys = shared.k
    with pytest.raises(BorrowedError, match="close the share first"):
        memory.release_memory(keep=True)
    assert float(keys.float().abs().nansum()) > 0
    shared.close()
    memory.release_memory(keep=True)
    with pytest.raises(ReleasedError):
        share(memory.pool)
    memory.resume_memory()
    assert contents(memory) == rows
    with pytest.raises(DeadViewError):
        _ = shared.k
    with share(memory.pool) as anew:
        assert float(anew.k.float().abs().nansum()) > 0


def test_a_borrowed_part_keeps_the_whole():
    memory = full_manager(make_config())
    rows = contents(memory)
    with borrow(memory.pool), pytest.raises(BorrowedError, match="is borrowed"):
        memory.release_memory()
    assert contents(memory) == rows
    memory.release_memory()
    memory.resume_memory()
    assert memory.cache.total_size() == 0
