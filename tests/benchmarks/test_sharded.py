"""The benchmark of sharded pools must pass what is right, and must see a shard that differs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import sharded
from jaxcache.errors import BrokenInvariantError
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig

SIZES = {"size": 2048, "page_size": 16, "dtype": jnp.bfloat16, "layer_num": sharded.LAYERS}
CONFIGS = [MHAConfig(head_num=2, head_dim=4, **SIZES), MLAConfig(kv_lora_rank=6, qk_rope_head_dim=2, **SIZES)]


@pytest.mark.parametrize("config", CONFIGS, ids=["mha", "mla"])
def test_it_passes_pools_that_agree(config):
    assert sharded.check(config, jax.devices("cpu")[:2]).endswith("on 2")


@pytest.mark.parametrize("config", CONFIGS, ids=["mha", "mla"])
def test_it_sees_a_shard_that_differs(config, monkeypatch):
    def write_every_layer(pool, loc, rows):
        is_second = jax.lax.axis_index("tp") == 1 if pool.config.axis_name else False
        return write(pool, jnp.where(is_second & (loc == loc[7]), 0, loc), rows)

    write = sharded.write_every_layer
    monkeypatch.setattr(sharded, "write_every_layer", write_every_layer)
    with pytest.raises(BrokenInvariantError, match="differs from a single device"):
        sharded.check(config, jax.devices("cpu")[:2])
