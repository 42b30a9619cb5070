"""Two rows of one write for the same slot: silent, and somebody's mistake. Refused wherever slots are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache import MemoryConfig, MHAConfig, Request, init_memory_pool_and_cache
from jaxcache.errors import ArgumentError
from tests.pools.numpy_pool import filled_pool, mha_config, mla_config, random_rows

CONFIGS = (mha_config, mla_config)
TWICE = np.array([0, 9, 5, 0, 9], np.int32)
MESSAGE = r"loc must name each slot once \(0 is padding\), but repeats slot; got \[9\]"


def writes(config, loc):
    """Each way to write these slots, by name."""
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, config.dtype, (config.layer_num, len(loc), *row)) for row in config.row_shapes]
    return {
        "set_kv_buffer": lambda pool: pool.set_kv_buffer(1, loc, *(row[1] for row in rows)),
        "set_all_layers": lambda pool: pool.set_all_layers(loc, *rows),
        "move_kv_cache": lambda pool: pool.move_kv_cache(loc, np.arange(1, 1 + len(loc), dtype=np.int32)),
    }


@pytest.mark.parametrize("make_config", CONFIGS)
@pytest.mark.parametrize("name", ["set_kv_buffer", "set_all_layers", "move_kv_cache"])
@pytest.mark.parametrize("as_loc", [np.array, list])
def test_slots_on_the_host_are_checked_and_the_pool_stays(make_config, name, as_loc):
    config = make_config(jnp.float32)
    pool, oracle = filled_pool(config)
    with pytest.raises(ArgumentError, match=MESSAGE):
        writes(config, as_loc(TWICE))[name](pool)
    oracle.expect(pool)


def test_padding_may_repeat():
    config = mha_config(jnp.float32)
    pool, oracle = filled_pool(config)
    rows = [random_rows(np.random.default_rng(1), config.dtype, (3, *row)) for row in config.row_shapes]
    pool = pool.set_kv_buffer(1, [0, 7, 0], *rows)
    oracle.write(1, [7], [row[1:2] for row in rows])
    oracle.expect(pool)


@pytest.mark.parametrize("make_config", CONFIGS)
def test_slots_on_the_device_are_read_only_where_nothing_is_traced(make_config):
    config = make_config(jnp.float32)
    write = writes(config, jnp.array(TWICE))["set_kv_buffer"]
    pool = write(filled_pool(config)[0])  # one row or the other stays
    with jax.disable_jit(), pytest.raises(ArgumentError, match=MESSAGE):
        write(pool)


def test_slots_outside_the_pool_are_found_in_a_whole_step_where_nothing_is_traced():
    config = mha_config(jnp.float32)
    outside = jnp.array([config.rows], jnp.int32)

    def scan(pool):
        rows = [jnp.ones((1, *row)) for row in config.row_shapes]
        return jax.lax.scan(lambda pool, _: (pool.set_kv_buffer(1, outside, *rows), None), pool, None, length=2)[0]

    pool, oracle = filled_pool(config)
    with jax.disable_jit(), pytest.raises(ArgumentError, match=rf"loc\[0\] must be a slot in \[0, {config.rows}\)"):
        scan(pool)
    oracle.expect(jax.jit(scan)(pool))


def test_a_step_of_the_manager_can_be_looked_at_where_nothing_is_traced():
    kv = MHAConfig(size=64, page_size=4, dtype=jnp.bfloat16, layer_num=1, head_num=1, head_dim=2)
    manager = init_memory_pool_and_cache(MemoryConfig(kv, max_running=2, max_context_len=16, chunk=8))

    def write(pool, slots):
        rows = jnp.ones((len(slots), 1, 2))
        return pool.set_kv_buffer(0, slots, rows, rows), None

    request = Request("0", [1, 2, 3, 4, 5])
    manager.admit(request)
    with jax.disable_jit():
        manager.run(lambda pool, batch: write(pool, batch.slots), manager.extend([(request, 3)]))
        plan = manager.extend([(request, 2)])
        with pytest.raises(ArgumentError, match=r"must name each slot once \(0 is padding\), but repeats slot"):
            manager.run(lambda pool, batch: write(pool, batch.slots.at[1].set(batch.slots[0])), plan)
    manager.cancel(plan)
    manager.check_memory(read_device=True)
