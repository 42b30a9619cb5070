"""What paged attention is told: pages in place, of every kind of pool; an oracle that gathers rows by slot."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcache.device.donation import donating
from jaxcache.errors import ArgumentError
from jaxcache.kernels.in_place import prove_in_place
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import init_memory_pool_and_cache
from jaxcache.pools.config import from_storage
from jaxcache.pools.layout import Layout
from jaxcache.pools.mamba import MambaConfig
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig
from jaxcache.pools.swa import SWAConfig
from jaxcache.request import Request
from jaxcache.steps.buckets import Buckets
from jaxcache.tables.page_list import page_list
from jaxcache.tables.request_table import ReqToTokenPool

P, SIZE, WINDOW = 4, 96, 6
SIZES = {"size": SIZE, "page_size": P, "dtype": jnp.bfloat16, "layer_num": 2}


def heads(**changes):
    return MHAConfig(**SIZES | {"head_num": 2, "head_dim": 3, "v_head_dim": 2} | changes)


def windows(**changes):
    full, window = heads(**changes), heads(size=48, **changes)
    return {"kv": SWAConfig(full=full, window=window, full_layers=(0, 3), window_layers=(1, 2))}


LATENT = MLAConfig(**SIZES, kv_lora_rank=3, qk_rope_head_dim=2)
STATES = MambaConfig(
    num_states=8, layer_num=1, conv_shape=(2,), temporal_shape=(2,), conv_dtype=jnp.float32, temporal_dtype=jnp.float32
)
MEMORIES = {
    "heads": ({"kv": heads()}, (0, 1)),
    "page-major": ({"kv": heads(layout=Layout.PAGE_MAJOR)}, (0, 1)),
    "named layers": ({"kv": heads(layers=(3, 7))}, (3, 7)),
    "latent": ({"kv": LATENT}, (0, 1)),
    "latent, page-major": ({"kv": dataclasses.replace(LATENT, layout=Layout.PAGE_MAJOR)}, (0, 1)),
    "windows": (windows() | {"sliding_window_size": WINDOW}, (0, 1, 2, 3)),
    "windows, page-major": (windows(layout=Layout.PAGE_MAJOR) | {"sliding_window_size": WINDOW}, (0, 1, 2, 3)),
    "states": ({"kv": heads(), "states": STATES}, (0, 1)),
}


def rows_of(pool, layer, tokens, positions):
    """Rows to write that say which layer, token and position they are of."""
    kv = pool.kv if hasattr(pool, "states") else pool
    base = jnp.stack([tokens, positions, jnp.full_like(tokens, layer)], -1).astype(jnp.float32)
    if hasattr(kv, "kv"):
        return [jnp.concatenate([base, base[:, :2]], -1)]
    return [jnp.stack([base, base + 1], 1), jnp.stack([base[:, :2], base[:, :2] + 1], 1)]


def written(pool, layer, slots, tokens, positions):
    rows = rows_of(pool, layer, tokens, positions)
    if hasattr(pool, "states"):
        return pool.with_kv(pool.kv.set_kv_buffer(layer, slots, *rows))
    return pool.set_kv_buffer(layer, slots, *rows)


def read_pages(inputs):
    """All rows of every request through the block table, in the order of their tokens: `(requests, context, *row)`."""
    pages = [from_storage(array[inputs.block_table], inputs.kv.dtype) for array in inputs.kv.arrays]
    return [rows.reshape(rows.shape[0], -1, *rows.shape[3:]) for rows in pages]


def read_slots(pool, layer, slots):
    """The oracle: the same rows by slot, through `gather`."""
    kv = pool.kv if hasattr(pool, "states") else pool
    rows = kv.gather(slots.reshape(-1), layer)
    return [a.reshape(*slots.shape, *a.shape[1:]) for a in (rows if isinstance(rows, tuple) else (rows,))]


def compare(found, expected, lengths):
    for mine, theirs in zip(found, expected, strict=True):
        for i, n in enumerate(np.asarray(lengths).tolist()):
            np.testing.assert_array_equal(np.asarray(mine[i, :n], np.float32), np.asarray(theirs[i, :n], np.float32))
            assert n == 0 or np.asarray(theirs[i, :n], np.float32).any()


@pytest.mark.parametrize("name", MEMORIES)
def test_pages_hold_what_slots_hold_in_steps_and_in_loops(name):
    options, layers = MEMORIES[name]
    sizes = Buckets((3,), (32,), (3,))
    memory = init_memory_pool_and_cache(MemoryConfig(**options, max_running=4, max_context_len=40, buckets=sizes))

    def step(pool, batch):
        for layer in layers:
            pool = written(pool, layer, batch.slots, batch.tokens, batch.positions)
        place = jnp.tile(jnp.arange(40, dtype=jnp.int32), (3, 1))
        slots = jnp.where(place < batch.seq_len[:, None], batch.table.slots(batch.row[:, None], place, P), 0)
        inputs = [batch.attention(pool, layer) for layer in layers]
        found = [read_pages(each) for each in inputs]
        expected = [read_slots(pool, layer, slots) for layer in layers]
        lists = [each.page_list() for each in inputs]
        return pool, (found, expected, inputs[0].seq_len, inputs[0].prefix_len, inputs[0].cu_q, lists)

    def loop_step(pool, loop):
        def one(carry, _):
            pool, loop = carry
            loop, slots = loop.grow()
            positions = loop.positions[:, 0]
            for layer in layers:
                pool = written(pool, layer, slots[:, 0], loop.tokens, positions)
            place = jnp.tile(jnp.arange(40, dtype=jnp.int32), (3, 1))
            held = jnp.where(slots[:, 0] > 0, positions + 1, 0)
            by_slot = jnp.where(place < held[:, None], loop.table.slots(loop.row[:, None], place, P), 0)
            inputs = [loop.attention(pool, layer) for layer in layers]
            out = ([read_pages(i) for i in inputs], [read_slots(pool, i, by_slot) for i in layers], held)
            told = inputs[0].seq_len, inputs[0].prefix_len, inputs[0].cu_q
            return (pool, loop.accept()), (out, told)

        (pool, loop), out = jax.lax.scan(one, (pool, loop), length=loop.shape.steps)
        return pool, loop, out

    requests = [Request("a", list(range(1, 12))), Request("b", list(range(21, 28)))]
    for request in requests:
        memory.admit(request)
    for counts in ((5, 7), (6,)):
        work = [(r, n) for r, n in zip(requests, counts, strict=False) if n]
        found, expected, seq_len, prefix_len, cu_q, lists = memory.run(step, memory.extend(work))
        assert seq_len.tolist()[: len(work)] == [r.kv_len for r, _ in work]
        assert prefix_len.tolist()[: len(work)] == [r.kv_len - n for r, n in work]
        assert cu_q.tolist() == [0, *np.cumsum(counts), *[sum(counts)] * (3 - len(work))]
        for mine, theirs, pages in zip(found, expected, lists, strict=True):
            compare(mine, theirs, seq_len)
            assert pages.indptr.tolist() == [
                0,
                *np.cumsum([-(-r.kv_len // P) for r, _ in work]),
                *[int(pages.indptr[-1])] * (3 - len(work)),
            ]
    for request in requests:
        request.output_ids.append(50)
    plan = memory.decode_loop(requests, 3, limits=[40, 9])
    (found, expected, held), (seq_len, prefix_len, cu_q) = memory.run_loop(loop_step, plan)
    assert held.tolist() == [[12, 8, 0], [13, 9, 0], [14, 0, 0]]
    assert seq_len.tolist() == held.tolist()
    assert prefix_len.tolist() == [[max(n - 1, 0) for n in each] for each in held.tolist()]
    assert cu_q.tolist() == [[0, 1, 2, 3]] * 3
    for t in range(3):
        for mine, theirs in zip(found, expected, strict=True):
            compare([a[t] for a in mine], [a[t] for a in theirs], held[t])
    memory.cancel_loop(plan) if name != "states" else memory.absorb(_appended(plan, requests))


def _appended(plan, requests):
    replay = plan.replay()
    for i, request in enumerate(requests):
        request.output_ids += [51] * int(replay.accepted[:, i].sum())
    return replay


def test_a_view_of_pages_is_free_and_only_to_be_had_inside_a_step():
    for layout in Layout:
        pool = MHATokenToKVPool.abstract(heads(layout=layout, size=4096), platform="cpu")

        def step(pool, loc, rows, table):
            pool = pool.set_kv_buffer(1, loc, rows, rows[..., :2])
            kv = pool.pages(1)
            return pool, sum(array[kv.locate(table)].astype(jnp.float32).sum() for array in kv.arrays)

        shapes = [((8,), jnp.int32), ((8, 2, 3), jnp.float32), ((2, 5), jnp.int32)]
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        report = prove_in_place(donating(step), pool, *args)
        assert report.ok, report.why
    with pytest.raises(ArgumentError, match="pages must be called inside a jitted step"):
        MHATokenToKVPool.create(heads()).pages(0)


def test_a_traced_layer_scans_over_named_layers():
    pool = MHATokenToKVPool.create(heads(layers=(7, 3)))
    ids = jnp.array([7, 3], jnp.int32)
    rows = jnp.ones((2, 2, 3))

    @donating
    def step(pool):
        def one(pool, layer):
            pool = pool.set_kv_buffer(layer, jnp.array([4, 5], jnp.int32), rows * layer, rows[..., :2])
            return pool, from_storage(pool.pages(layer).arrays[0][pool.pages(layer).locate(1)], jnp.bfloat16)

        return jax.lax.scan(one, pool, ids)

    pool, found = step(pool)
    assert np.asarray(found[:, 0, 0, 0], np.float32).tolist() == [7, 3]
    assert [float(pool.gather([4], layer)[0][0, 0, 0]) for layer in (7, 3)] == [7, 3]
    with pytest.raises(ArgumentError, match=r"layer must be one of \(7, 3\); got 0"):
        pool.gather([4], 0)
    before = np.asarray(pool.k)
    written = donating(
        lambda pool, layer: pool.set_kv_buffer(layer, jnp.array([8], jnp.int32), rows[:1], rows[:1, :, :2])
    )
    pool = written(pool, jnp.int32(5))  # names no layer
    np.testing.assert_array_equal(np.asarray(pool.k), before)
    assert [info.layer_ids for info in pool.get_contiguous_buf_infos()] == [(7,), (3,)] * 2


@pytest.mark.parametrize("layers", [(3,), (3, 3), [3, 7], (3, -1), (3, 7, 11)])
def test_names_of_layers_that_are_none_are_refused(layers):
    with pytest.raises(ArgumentError, match="layers must"):
        heads(layers=layers)
    with pytest.raises(ArgumentError, match="start_layer must be 0"):
        heads(layers=(3, 7), start_layer=1)


# ---- lists of pages ----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.sampled_from([1, 2, 4]), st.lists(st.integers(0, 20), min_size=1, max_size=5), st.randoms())
def test_one_list_has_the_pages_of_all_requests(page_size, lengths, rng):
    """Oracle: request by request, in Python; the device's list and the host's are the same."""
    table = ReqToTokenPool(8, 24, page_size)
    rows = rng.sample(table.alloc(8), len(lengths))
    indptr, indices, last = [0], [], []
    for row, n in zip(rows, lengths, strict=True):
        held = [rng.randrange(1, 99) for _ in range(-(-n // page_size))]
        table.append_pages(np.array([row]), np.array(held, np.int32), np.array([len(held)]))
        indices += held
        indptr.append(len(indices))
        last.append((n - 1) % page_size + 1 if n else 0)
    seq_len = np.array(lengths, np.int32)
    on_host = table.page_list(np.array(rows), seq_len)
    block_table = table.device_table().block_table(jnp.array(rows, jnp.int32), jnp.array(seq_len), page_size)
    in_step = page_list(block_table, jnp.array(seq_len), page_size)
    for found in (on_host, in_step):
        assert np.asarray(found.indptr).tolist() == indptr
        assert np.asarray(found.indices).tolist()[: len(indices)] == indices
        assert np.asarray(found.last_page_len).tolist() == last
    assert len(on_host.indices) == len(indices)
    assert not np.asarray(in_step.indices)[len(indices) :].any()
    with pytest.raises(ArgumentError, match="seq_len must be tokens that rows have pages for"):
        table.page_list(np.array(rows), seq_len + page_size)
