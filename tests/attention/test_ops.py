"""The public attention ops over pools, batches and decode loops, against float64 over each request's own tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcache.attention import (
    SharedPrefix,
    attention_plan,
    merge_attention,
    mla_attention,
    mla_extend,
    paged_attention,
    paged_extend,
)
from jaxcache.errors import ArgumentError, ShardingError, StalePoolError, UnsupportedError
from jaxcache.kernels.dispatch import Implementation
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.pages.allocator import FreeOrder
from jaxcache.pages.graph import PageAllocatorState
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.steps.loop import DecodeLoop, DecodeRows, LoopShape
from jaxcache.tables.device_table import RequestTable
from tests.support.attended import MAX_PAGES, SCALE, attend, decode_rows, make_problem
from tests.support.meshes import make_mesh

MHA = MHAConfig(size=64, page_size=4, dtype=jnp.float32, layer_num=2, head_num=2, head_dim=8, v_head_dim=4)
MLA = MLAConfig(size=64, page_size=4, dtype=jnp.float32, layer_num=2, kv_lora_rank=8, qk_rope_head_dim=4)
SIDE = dataclasses.replace(MHA, layer_num=1, end_layer=0)
SWA = SWAConfig(full=SIDE, window=SIDE, full_layers=(1,), window_layers=(0,))
DECODE = ((6, 1), (0, 0), (0, 1), (15, 1))
EXTEND = ((6, 5), (0, 0), (0, 3), (15, 1))
WINDOW = 5


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


def all_layers(op, problem, q, **options):
    """The op in a scan over the layers, whose ids are traced, with the plan made once before it."""

    @jax.jit
    def step(pool, batch, q):
        plan = attention_plan(batch, pool, q.shape[1], window=options.get("window"))

        def attend_layer(_, layer):
            return None, op(q, pool, layer, batch, plan, scale=SCALE, return_lse=True, **options)

        return jax.lax.scan(attend_layer, None, jnp.arange(pool.config.layer_num, dtype=jnp.int32))[1]

    return step(problem.pool, problem.batch, q)


@pytest.mark.parametrize("config", [MHA, dataclasses.replace(MHA, layout=Layout.PAGE_MAJOR)], ids=["mha", "page_major"])
def test_decode_in_a_scan_over_layers(config):
    problem = make_problem(config, DECODE)
    at = decode_rows(problem)
    out, lse = all_layers(paged_attention, problem, problem.q[at], soft_cap=3.0)
    for layer in range(2):
        want_out, want_lse = problem.expected(layer, soft_cap=3.0)
        close(out[layer], want_out[at])
        close(lse[layer], want_lse[at])


def test_extend_in_a_scan_over_layers():
    problem = make_problem(MHA, EXTEND)
    out, lse = all_layers(paged_extend, problem, problem.q, window=WINDOW)
    for layer in range(2):
        want_out, want_lse = problem.expected(layer, window=WINDOW)
        close(out[layer], want_out)
        close(lse[layer], want_lse)


def test_latent_rows():
    problem = make_problem(MLA, DECODE)
    at = decode_rows(problem)
    out, _ = all_layers(mla_attention, problem, problem.q[at])
    close(out[1], problem.expected(1)[0][at])
    problem = make_problem(MLA, EXTEND)
    close(all_layers(mla_extend, problem, problem.q)[0][0], problem.expected(0)[0])


def swa_step(pool, batch, q):
    """Both layers: a plan for each kind."""
    windowed, full = (attention_plan(batch, pool, q.shape[1], window=window) for window in (WINDOW, None))
    return (
        paged_attention(q, pool, 0, batch, windowed, scale=SCALE, window=WINDOW),
        paged_attention(q, pool, 1, batch, full, scale=SCALE),
        paged_attention(q, pool.window, jnp.int32(0), batch, windowed, scale=SCALE, window=WINDOW),
    )


def test_windows_are_reached_through_their_map():
    problem = make_problem(SWA, DECODE)
    at = decode_rows(problem)
    windowed, full, of_side = jax.jit(swa_step)(problem.pool, problem.batch, problem.q[at])
    close(windowed, problem.expected(0, window=WINDOW)[0][at])
    close(full, problem.expected(1)[0][at])
    np.testing.assert_array_equal(of_side, windowed)


@pytest.mark.parametrize("kind", ["row", "head", "tensor"])
def test_int8_rows_with_their_scales(kind):
    config = dataclasses.replace(MHA, dtype=jnp.int8, v_head_dim=8)
    problem = make_problem(config, DECODE)
    rng, shape = np.random.default_rng(1), problem.pool.k.shape[:3]
    k_scale, v_scale = rng.uniform(0.005, 0.02, (2, *{"row": shape, "head": (2, 1), "tensor": ()}[kind])).astype(
        np.float32
    )
    slots = [
        np.asarray(problem.batch.table.pages)[row].repeat(4)[:n] * 4 + np.arange(n) % 4
        for row, n in zip(np.asarray(problem.batch.row), np.asarray(problem.batch.seq_len), strict=True)
    ]
    for rows, scale in ((problem.keys, k_scale), (problem.values, v_scale)):
        for b, at in enumerate(slots):
            of_rows = scale[1][at] if kind == "row" else scale.reshape(-1)
            rows[b] = rows[b] * of_rows[..., None]
    at = decode_rows(problem)
    q = problem.q[at]
    plan = attention_plan(problem.batch, problem.pool, 4)
    out = paged_attention(q, problem.pool, 1, problem.batch, plan, scale=SCALE, k_scale=k_scale, v_scale=v_scale)
    close(out, problem.expected(1)[0][at])


def test_float8_rows_and_their_scale():
    """What the setter divided by, the op multiplies with."""
    config = dataclasses.replace(MHA, dtype=jnp.float8_e4m3fn)
    problem = make_problem(config, ((0, 1),))
    k, v = (np.random.default_rng(2).standard_normal((1, 2, width)).astype(np.float32) for width in (8, 4))
    pool = problem.pool.set_kv_buffer(0, problem.batch.slots[:1], k, v, k_scale=0.5, v_scale=2.0)
    plan = attention_plan(problem.batch, pool, 4)
    out = paged_attention(problem.q[:1], pool, 0, problem.batch, plan, scale=SCALE, k_scale=0.5, v_scale=2.0)
    close(out[0], np.repeat(v[0], 2, axis=0), 0.07)  # the only token: its value, rounded to float8


@pytest.mark.parametrize("width", [1, 2])
def test_in_a_decode_loop(width):
    """Each step writes its tokens and attends to all that came before; a row at its limit and padding get zeros."""
    rows, steps = 3, 4
    shape = LoopShape(requests=rows, steps=steps, width=width, page_size=4)
    seq_len, limit = np.array([5, 3, 0], np.int32), np.array([24, 3 + 2 * width, 0], np.int32)
    table = np.zeros((4, MAX_PAGES), np.int32)
    table[2, :2], table[0, :1] = (3, 7), (9,)
    free = PageAllocatorState(
        jnp.arange(10, 10 + shape.window, dtype=jnp.int32), jnp.int32(0), jnp.int32(shape.window), 4, FreeOrder.LIFO
    )
    index = jnp.array([2, 0, 1], jnp.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    loop = DecodeLoop(
        DecodeRows.start(jnp.asarray(seq_len), jnp.asarray(limit), 4),
        RequestTable(jnp.asarray(table)), free, index, zeros, zeros, zeros, shape,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    k, v, q = (
        rng.standard_normal((rows, 24, heads, dim)).astype(np.float32) for heads, dim in ((2, 8), (2, 4), (4, 8))
    )
    config = dataclasses.replace(SIDE, size=128)
    pool = config.pool_type.create(config)
    for b in range(2):
        at = np.arange(seq_len[b])
        slots = (table[int(index[b])][at // 4] * 4 + at % 4).astype(np.int32)
        pool = pool.set_kv_buffer(0, slots, k[b][at], v[b][at])

    @jax.jit
    def run(pool, loop):
        def step(carry, _):
            pool, loop = carry
            loop, slots = loop.grow()
            row = jnp.arange(rows)[:, None]
            now = loop.positions
            new = (a[row, now].reshape(rows * width, *a.shape[2:]) for a in (jnp.asarray(k), jnp.asarray(v)))
            pool = pool.set_kv_buffer(0, slots.ravel(), *new)
            op = paged_attention if width == 1 else paged_extend
            queries = jnp.asarray(q)[row, now].reshape(rows * width, 4, 8)
            out = op(queries, pool, 0, loop, attention_plan(loop, pool, 4), scale=SCALE)
            return (pool, loop.accept()), (out.reshape(rows, width, 4, 4), now, loop.rows.granted)

        return jax.lax.scan(step, (pool, loop), None, length=steps)[1]

    out, positions, granted = map(np.asarray, run(pool, loop))
    assert granted.tolist() == [[width, width if step < 2 else 0, 0] for step in range(steps)]
    for step, b, t in np.ndindex(steps, rows, width):
        want = np.zeros((4, 4))
        if t < granted[step, b]:
            n = positions[step, b, t]
            want = attend(q[b, n], k[b, : n + 1], v[b, : n + 1])[0]
        close(out[step, b, t], want)


def test_heads_of_a_mesh_need_no_traffic():
    shards = 2
    mesh = make_mesh(shards)
    config = dataclasses.replace(MHA, axis_name="tp", shards=shards)
    problem = make_problem(config, DECODE, mesh=mesh)
    at = decode_rows(problem)

    def step(pool, batch, q):
        plan = attention_plan(batch, pool, 4 // shards)
        return paged_attention(q, pool, 1, batch, plan, scale=SCALE)

    for traced in (step, lambda pool, batch, _: attention_plan(batch, pool, 4 // shards)):
        with pytest.raises(ShardingError, match="XLA would gather it whole"):
            jax.eval_shape(traced, problem.pool, problem.batch, problem.q[at])
    heads = PartitionSpec(None, "tp")
    specs = problem.pool.partition_specs(), PartitionSpec(), heads
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))
    compiled = sharded.lower(problem.pool, problem.batch, problem.q[at]).compile()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert word not in compiled.as_text()
    close(sharded(problem.pool, problem.batch, problem.q[at]), problem.expected(1)[0][at])


@pytest.mark.parametrize("layout", Layout)
def test_the_pool_is_not_copied(layout):
    """Layers write and attend in turn, in a scan that carries the pool."""
    config = dataclasses.replace(MHA, size=4096, layout=layout)
    problem = make_problem(MHA, DECODE)
    pool = config.pool_type.abstract(config, platform="cpu")

    def step(pool, batch, q, k, v):
        plan = attention_plan(batch, pool, 4)

        def layer(pool, i):
            pool = pool.set_kv_buffer(i, batch.slots[:4], k, v)
            return pool, paged_attention(q, pool, i, batch, plan, scale=SCALE)

        return jax.lax.scan(layer, pool, jnp.arange(2, dtype=jnp.int32))

    k, v = jnp.zeros((4, 2, 8)), jnp.zeros((4, 2, 4))
    report = prove_in_place(step, pool, problem.batch, problem.q[:4], k, v, donate_argnums=0)
    assert report.ok, report.why


def test_parts_merge_to_the_whole():
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((2, 8)), rng.standard_normal((9, 1, 8)), rng.standard_normal((9, 1, 4))
    want, want_lse = attend(q, k, v)
    parts = [attend(q, k[a:b], v[a:b]) for a, b in ((0, 4), (4, 9))]
    nothing = np.full((2, 4), np.nan), np.full(2, -np.inf)
    out, lse = (np.stack(arrays)[:, None].astype(np.float32) for arrays in zip(*parts, nothing, strict=True))
    got, got_lse = jax.jit(merge_attention)(out, lse)
    close(got[0], want)
    close(got_lse[0], want_lse)
    sinks = np.array([0.5, -1.0], np.float32)
    got, got_lse = merge_attention(out, lse, sinks)
    total = np.logaddexp(want_lse, sinks)
    close(got_lse[0], total)
    close(got[0], want * np.exp(want_lse - total)[:, None])


@pytest.mark.parametrize("op", [paged_attention, paged_extend, mla_attention, mla_extend])
@pytest.mark.parametrize("of", ["q", "scales", "sinks", "pool"])
def test_no_gradient(op, of):
    is_latent = op in (mla_attention, mla_extend)
    problem = make_problem(MLA if is_latent else MHA, DECODE)
    rows = 4 if op in (paged_attention, mla_attention) else len(problem.q)
    plan = attention_plan(problem.batch, problem.pool, problem.q.shape[1])
    if is_latent and of == "sinks":
        return  # latent rows have none

    def loss(x):
        q = jnp.asarray(problem.q[:rows]) * (x if of == "q" else 1)
        pool = problem.pool
        if of == "pool":
            pool = jax.tree.map(lambda array: array * x, pool)
        options = {"kv_scale" if is_latent else "k_scale": x} if of == "scales" else {}
        options |= {"sinks": jnp.ones(4) * x} if of == "sinks" else {}
        return op(q, pool, 0, problem.batch, plan, scale=SCALE, **options).sum()

    with pytest.raises(UnsupportedError, match="no gradient"):
        jax.grad(loss)(jnp.float32(1))


WRONG_USE = {
    "dtype of queries": (
        ArgumentError,
        "q must be float32, bfloat16 or float16",
        dict(q=np.zeros((4, 4, 8), np.int32)),
    ),
    "width of queries": (
        ArgumentError,
        r"q must have shape \(tokens, heads, 8\)",
        dict(q=np.zeros((4, 4, 6), np.float32)),
    ),
    "queries of fewer requests": (
        ArgumentError,
        "one row for each of the plan's 4",
        dict(q=np.zeros((3, 4, 8), np.float32)),
    ),
    "other heads": (ArgumentError, "must have the 4 heads of the plan", dict(q=np.zeros((4, 2, 8), np.float32))),
    "a layer outside": (ArgumentError, r"layer must be in \[0, 2\)", dict(layer=2)),
    "another window": (ArgumentError, "window must be that of the plan", dict(window=3)),
    "a scale of another shape": (
        ArgumentError,
        "k_scale must be float32 of shape",
        dict(k_scale=np.ones(3, np.float32)),
    ),
    "sinks of another shape": (
        ArgumentError,
        r"sinks must be float32 of shape \(4,\)",
        dict(sinks=np.ones(3, np.float32)),
    ),
    "a soft cap of 0": (ArgumentError, "soft_cap must be a positive number", dict(soft_cap=0.0)),
    "no plan": (ArgumentError, "plan must be what attention_plan returned", dict(plan=None)),
    "no kernel here": (UnsupportedError, "cannot run", dict(implementation=Implementation.TRITON)),
}


@pytest.mark.parametrize("what", WRONG_USE)
def test_wrong_use_is_refused_while_tracing(what):
    error, words, changes = WRONG_USE[what]
    problem = make_problem(MHA, DECODE)

    def step(pool, batch, q):
        plan = attention_plan(batch, pool, 4)
        arguments = dict(q=q, layer=0, plan=plan, scale=SCALE) | changes
        q, layer, plan = (arguments.pop(name) for name in ("q", "layer", "plan"))
        return paged_attention(q, pool, layer, batch, plan, **arguments)

    with pytest.raises(error, match=words):
        jax.eval_shape(step, problem.pool, problem.batch, problem.q[:4])


def test_plans_of_other_things_are_refused():
    problem, other = make_problem(MHA, DECODE), make_problem(MHA, DECODE[:2])
    plan = attention_plan(other.batch, other.pool, 4)
    q = problem.q[:4]
    with pytest.raises(ArgumentError, match="plan must be of this batch of 4 requests, and is of one of 2"):
        paged_attention(q, problem.pool, 0, problem.batch, plan, scale=SCALE)
    bigger = dataclasses.replace(MHA, size=128)
    plan = attention_plan(problem.batch, problem.pool, 4)
    with pytest.raises(ArgumentError, match="plan must be made for this pool"):
        paged_attention(q, bigger.pool_type.create(bigger), 0, problem.batch, plan, scale=SCALE)
    with pytest.raises(ArgumentError, match="pool must hold latent rows"):
        mla_attention(q, problem.pool, 0, problem.batch, plan, scale=SCALE)
    with pytest.raises(ArgumentError, match="num_heads must be a multiple of the 2 KV heads"):
        attention_plan(problem.batch, problem.pool, 3)
    with pytest.raises(ArgumentError, match="batch must be a Batch or a DecodeLoop"):
        attention_plan(None, problem.pool, 4)
    shared = SharedPrefix(jnp.zeros(4, jnp.int32), jnp.zeros(4, jnp.int32))
    with pytest.raises(ArgumentError, match="shared must be None for a window"):
        attention_plan(problem.batch, problem.pool, 4, window=3, shared=shared)
    swa = make_problem(SWA, DECODE)
    plan = attention_plan(swa.batch, swa.pool, 4)
    with pytest.raises(ArgumentError, match="this one is a window"):
        paged_attention(q, swa.pool, 0, swa.batch, plan, scale=SCALE)


def test_lengths_beyond_the_table_are_refused():
    problem = make_problem(MHA, DECODE)
    batch = dataclasses.replace(problem.batch, seq_len=jnp.full(4, MAX_PAGES * 4 + 1, jnp.int32))
    with pytest.raises(ArgumentError, match=f"seq_len must be at most {MAX_PAGES * 4}"):
        attention_plan(batch, problem.pool, 4)


def test_a_consumed_pool_is_refused():
    problem = make_problem(MHA, DECODE)
    plan = attention_plan(problem.batch, problem.pool, 4)
    problem.pool.set_kv_buffer(0, problem.batch.slots[:1], np.zeros((1, 2, 8)), np.zeros((1, 2, 4)))
    with pytest.raises(StalePoolError):
        paged_attention(problem.q[:4], problem.pool, 0, problem.batch, plan, scale=SCALE)
