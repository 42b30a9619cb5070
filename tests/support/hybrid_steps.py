"""Steps over a hybrid pool, and their abstract arguments."""

from __future__ import annotations

import jax

from jaxcache.pools.hybrid import HybridConfig, HybridKVPool
from tests.pools import state_steps, steps


def hybrid_step(pool, kv_args, state_args):
    """A step of a model with layers of both kinds, which resumes before and takes snapshots afterwards."""
    states, _ = state_steps.whole_step(pool.states, *state_args)
    kv, _ = steps.scan(pool.kv, *kv_args)
    return pool.with_states(states).with_kv(kv)


def abstract_hybrid(kv_config, platform):
    kv, *kv_args = steps.abstract_args(kv_config.pool_type, kv_config, platform)
    states, *state_args = state_steps.abstract_args(state_steps.config_of(), platform)
    pool = HybridKVPool.abstract(HybridConfig(kv=kv.config, states=states.config), platform=platform)
    assert jax.tree.leaves(pool) == [*kv.buffers, *states.buffers]
    return pool, kv_args, state_args
