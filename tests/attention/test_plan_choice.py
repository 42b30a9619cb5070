"""Whose blocks and tiles a plan is cut into, on GPUs that need not be there, and what an op says to another's plan."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxcache.attention import attention_plan, mla_attention, paged_extend
from jaxcache.errors import UnsupportedError
from jaxcache.kernels import dispatch
from jaxcache.kernels.dispatch import Implementation
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from tests.support.attended import make_problem

SIZES = dict(size=256, page_size=16, dtype=jnp.bfloat16, layer_num=2)
LATENT = MLAConfig(**SIZES, kv_lora_rank=128, qk_rope_head_dim=64)
HEADS = MHAConfig(**SIZES, head_num=2, head_dim=128)
MOSAIC, TRITON = Implementation.MOSAIC, Implementation.TRITON
CHUNKS = ((0, 64), (0, 1))
DECODE = ((6, 1), (15, 1))


@pytest.fixture(autouse=True)
def with_all_packages(monkeypatch):
    monkeypatch.setattr(dispatch.jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())


def planned(config, lens, num_heads, kind="NVIDIA H200", then=None, **options):
    """The launches of a plan, of a pool as it lies on a GPU of that kind, or what `then` makes of it."""
    problem = make_problem(MLAConfig(**SIZES | dict(dtype=jnp.float32), kv_lora_rank=8, qk_rope_head_dim=4), lens)
    pool = config.pool_type.abstract(config, platform="gpu")
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    found = []

    def step(pool, batch):
        plan = attention_plan(batch, pool, num_heads, **options)
        found.append(plan.plan.launches)
        return then and then(pool, batch, plan)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jax.eval_shape(step, pool, problem.batch)
    return found[0]


@pytest.mark.parametrize(
    ("changes", "heads", "options", "expected"),
    [
        ({}, 128, {}, MOSAIC),
        (dict(layout=Layout.PAGE_MAJOR, dtype=jnp.float16, page_size=8), 64, {}, MOSAIC),
        ({}, 128, dict(implementation=TRITON), TRITON),
        ({}, 128, dict(implementation=Implementation.REFERENCE), TRITON),
        ({}, 16, {}, TRITON),
        ({}, 96, {}, TRITON),
        ({}, 128, dict(window=9), TRITON),
        (dict(dtype=jnp.float8_e4m3fn), 128, {}, TRITON),
        (dict(qk_rope_head_dim=32), 128, {}, TRITON),
        (dict(kv_lora_rank=640), 128, {}, TRITON),
    ],
)
def test_latent_decode(changes, heads, options, expected):
    launch = planned(dataclasses.replace(LATENT, **changes), DECODE, heads, **options).decode
    assert launch.implementation is expected
    if expected is MOSAIC:
        assert (launch.block, launch.heads, launch.programs) == (128, 64, 132 // (heads // 64))


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-80GB", "an unknown GPU"])
def test_wgmma_is_for_hopper_alone(kind):
    assert planned(LATENT, DECODE, 128, kind).decode.implementation is TRITON
    assert planned(HEADS, CHUNKS, 8, kind).extend.implementation is TRITON
    with pytest.raises(UnsupportedError, match=r"cannot run: (wgmma is|Mosaic kernels need a Hopper)"):
        planned(LATENT, DECODE, 128, kind, implementation=MOSAIC)


@pytest.mark.parametrize(
    ("changes", "lens", "heads", "expected"),
    [
        ({}, ((0, 64), (0, 64)), 8, MOSAIC),
        (dict(head_dim=64, v_head_dim=64), ((0, 64), (0, 64)), 4, MOSAIC),
        ({}, CHUNKS, 8, TRITON),  # too few tokens a request
        ({}, ((0, 64), (0, 64)), 6, TRITON),  # three query heads a KV head
        (dict(head_dim=96, v_head_dim=96), ((0, 64), (0, 64)), 8, TRITON),
        (dict(v_head_dim=64), ((0, 64), (0, 64)), 8, TRITON),
        (dict(dtype=jnp.float32), ((0, 64), (0, 64)), 8, TRITON),
    ],
)
def test_extend(changes, lens, heads, expected):
    launch = planned(dataclasses.replace(HEADS, **changes), lens, heads).extend
    assert launch.implementation is expected
    if expected is MOSAIC:
        assert launch.tokens == 64


@pytest.mark.parametrize("asked", [MOSAIC, TRITON])
def test_an_op_refuses_a_plan_that_is_cut_for_another(asked):
    other = TRITON if asked is MOSAIC else MOSAIC
    remedy = f"the plan is cut for {other.name}: make it with implementation=Implementation.{asked.name}"

    def attend(pool, batch, plan):
        q = jnp.zeros((2, 128, 192), jnp.bfloat16)
        return mla_attention(q, pool, 0, batch, plan, scale=0.1, implementation=asked)

    with pytest.raises(UnsupportedError, match=remedy):
        planned(LATENT, DECODE, 128, then=attend, implementation=other)

    def extend(pool, batch, plan):
        q = jnp.zeros((batch.tokens.shape[0], 8, 128), jnp.bfloat16)
        return paged_extend(q, pool, 0, batch, plan, scale=0.1, implementation=asked)

    with pytest.raises(UnsupportedError, match=remedy):
        planned(HEADS, ((0, 64), (0, 64)), 8, then=extend, implementation=other)


def test_the_reference_takes_any_plan():
    def attend(pool, batch, plan):
        q = jnp.zeros((2, 128, 192), jnp.bfloat16)
        return mla_attention(q, pool, 0, batch, plan, scale=0.1, implementation=Implementation.REFERENCE)

    assert planned(LATENT, DECODE, 128, then=attend).decode.implementation is MOSAIC
