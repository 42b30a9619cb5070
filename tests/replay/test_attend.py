"""`--attend`: what each decode step attends to is compared with a softmax over the request's own tokens."""

import jax.numpy as jnp
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.replay.attend import _compare
from jaxcache.replay.config import CacheKind, DType, Fault, PoolKind, ReplayConfig
from jaxcache.replay.run import run_replay
from tests.support.replays import CHAT, assert_clean, few_shapes

SMALL = dict(requests=12, concurrency=4, chunk=512, device_tokens=12_000, attend=True)
FLAVOURS = {
    "mha": {},
    "mla": dict(pool=PoolKind.MLA),
    "heads": dict(heads=2, dtype=DType.BFLOAT16, layout=Layout.PAGE_MAJOR, page_size=4),
    "float8": dict(dtype=DType.FLOAT8_E4M3FN),
    "windows": CHAT | dict(cache=CacheKind.SWA, window=100),
    "states": dict(cache=CacheKind.MAMBA),
    "lora": dict(cache=CacheKind.LORA),
}


QUICK = ("mha", "mla")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FLAVOURS])
def test_attention_sees_the_tokens_of_the_request(name):
    config = ReplayConfig(**SMALL | FLAVOURS[name])
    result = run_replay(config, buckets=few_shapes(config))
    assert_clean(result)
    assert (result.verified_queries, result.mismatched_queries) == (result.decode_tokens, 0)
    assert result.decode_tokens > 100


@pytest.mark.parametrize("fault", [Fault.STALE_LENGTH, Fault.SKIP_WRITE])
def test_planted_bugs_are_seen(fault):
    config = ReplayConfig(**SMALL, plant=fault)
    result = run_replay(config, buckets=few_shapes(config))
    assert result.mismatched_queries and not result.is_clean
    if fault is Fault.STALE_LENGTH:  # and by nothing else: every slot holds what it should
        assert not result.mismatched_slots and result.mismatched_queries == result.verified_queries


def test_a_nan_is_wrong():
    config = MHAConfig(size=16, page_size=4, dtype=jnp.float32, layer_num=1, head_num=1, head_dim=2)
    zero, seen = jnp.int32(0), (jnp.zeros(2), jnp.ones(2), jnp.ones((2, 2)))
    counts = [int(_compare(jnp.full((1, 2, 2), x), zero, seen, zero, config=config)) for x in (1.0, 1.5, jnp.nan)]
    assert counts == [0, 1, 1]


def test_a_length_is_only_seen_by_attention():
    with pytest.raises(ArgumentError, match="--plant stale_length needs --attend"):
        ReplayConfig(plant=Fault.STALE_LENGTH)
