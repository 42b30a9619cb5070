"""Bit-exactness on the present device: every implementation of every op, and every pool op, against NumPy.

The oracles are those of the tests, so this runs from a checkout. A difference raises; nothing is timed before all
agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.kernels.alloc_pages import alloc_decode, alloc_extend
from jaxcache.kernels.copy_kv import gather_rows, move_rows, scatter_rows
from jaxcache.kernels.copy_pages import gather_pages, scatter_pages
from jaxcache.kernels.dispatch import Implementation, Op, current_target, why_not
from jaxcache.kernels.quantized_pool import QuantizedPool
from jaxcache.kernels.write_kv import write_kv, write_mla_kv
from jaxcache.kernels.write_quantized import write_kv_fp8, write_kv_int8
from jaxcache.pools.config import storage_dtype
from tests.kernels import oracles
from tests.pools import numpy_pool


def implementations(op: Op) -> list[Implementation]:
    """The implementations of `op` that run here."""
    return [i for i in Implementation if why_not(op, i, current_target()) is None]


def check_everything(*, huge: bool) -> Iterator[str]:
    """Yields a line for each thing that agreed, else raises AssertionError. `huge` adds a pool past 2^31 elements."""
    for implementation in implementations(Op.ALLOC_EXTEND):
        yield f"alloc_extend {implementation.value}: {check_alloc_extend(implementation)} batches"
    for implementation in implementations(Op.ALLOC_DECODE):
        yield f"alloc_decode {implementation.value}: {check_alloc_decode(implementation)} batches"
    for implementation in implementations(Op.WRITE_KV):
        yield f"write_kv {implementation.value}: {check_write_kv(implementation)} pools"
    for implementation in implementations(Op.WRITE_MLA_KV):
        yield f"write_mla_kv {implementation.value}: {check_write_mla_kv(implementation)} pools"
    for implementation in implementations(Op.GATHER_PAGES):
        yield f"gather_pages, scatter_pages, move_rows {implementation.value}: {check_pages(implementation)} pools"
    for implementation in implementations(Op.WRITE_KV_FP8):
        yield f"write_kv_fp8 {implementation.value}: {check_fp8(implementation)} pools"
    for implementation in implementations(Op.WRITE_KV_INT8):
        yield f"write_kv_int8 {implementation.value}: {check_int8(implementation)} pools"
    yield f"gather, scatter and move of rows: {check_copies()} pools"
    yield f"KV pools of every kind and order, every op: {check_pools()} pools"
    if huge:
        for implementation in implementations(Op.WRITE_KV):
            yield f"write_kv {implementation.value}: past 2^31 elements, {check_huge_pool(implementation):,} bytes"


def with_dtypes(shapes: list[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...], Any]]:
    """Number, shape and dtype: all dtypes with the first shape, and one of each width with the others."""
    some = np.uint8, jnp.bfloat16, np.float32
    every = ((i, shape, oracles.STORAGE_DTYPES if i == 0 else some) for i, shape in enumerate(shapes))
    return [(i, shape, dtype) for i, shape, dtypes in every for dtype in stored(dtypes)]


def stored(dtypes: Iterable[Any]) -> list[np.dtype]:
    """What pools of these dtypes store here: XLA:CPU does not keep the bits of a float that is no number."""
    return list(dict.fromkeys(storage_dtype(dtype, jax.default_backend()) for dtype in dtypes))


def check_alloc_extend(implementation: Implementation) -> int:
    cases = [(bs, page_size) for bs in (1, 7, 64, 300) for page_size in (1, 3, 16, 64)] + [(3000, 16)]
    for seed, (bs, page_size) in enumerate(cases):
        rng = np.random.default_rng(seed)
        prefix, seq, last, pages = oracles.random_batch(rng, bs, page_size, max_len=200)
        num_tokens = int((seq - prefix).sum()) + seed
        for given in (pages, pages[: len(pages) // 2]):
            options = {"page_size": page_size, "num_tokens": num_tokens, "implementation": implementation}
            op = jax.jit(partial(alloc_extend, **options))
            want = oracles.extend(prefix, seq, last, given, page_size, num_tokens)
            np.testing.assert_array_equal(op(prefix, seq, last, given), want)
    return 2 * len(cases)


def check_alloc_decode(implementation: Implementation) -> int:
    cases = [(bs, page_size) for bs in (1, 7, 256, 3000) for page_size in (1, 16)]
    for seed, (bs, page_size) in enumerate(cases):
        rng = np.random.default_rng(seed)
        _, seq, last, pages = oracles.random_batch(rng, bs, page_size, max_len=200, decode=True)
        seq = np.where(rng.random(bs) < 0.2, 0, seq).astype(np.int32)
        op = jax.jit(partial(alloc_decode, page_size=page_size, implementation=implementation))
        np.testing.assert_array_equal(op(seq, last, pages), oracles.decode(seq, last, pages, page_size))
    return len(cases)


def check_write_kv(implementation: Implementation) -> int:
    shapes = [(3, 64, 2, 8, 8, 40), (2, 9000, 8, 128, 96, 4096), (2, 9000, 8, 128, 96, 5000)]
    if implementation is not Implementation.MOSAIC:  # whose bulk copies move multiples of 16 bytes
        shapes += [(2, 33, 3, 5, 7, 50), (1, 40, 5, 1000, 8, 20)]
    cases = with_dtypes(shapes)
    for seed, (layers, slots, heads, k_dim, v_dim, n), dtype in cases:
        rng = np.random.default_rng(seed)
        pools = [oracles.random_bits(rng, (layers, slots, heads, dim), dtype) for dim in (k_dim, v_dim)]
        rows = [oracles.random_bits(rng, (n, heads, dim), dtype) for dim in (k_dim, v_dim)]
        loc, layer = oracles.random_loc(rng, n, slots), np.int32(layers - 1)
        step = jax.jit(partial(write_kv, implementation=implementation), donate_argnums=(0, 1))
        got = step(*map(jnp.array, pools), layer, loc, *rows)
        for pool, row, result in zip(pools, rows, got, strict=True):
            same_bits(result, oracles.put_rows(pool, int(layer), loc, row))
    return len(cases)


def check_write_mla_kv(implementation: Implementation) -> int:
    shapes = [(2, 40, 96, 32, 21), (2, 9000, 512, 64, 4096), (2, 9000, 512, 64, 5000)]
    if implementation is not Implementation.MOSAIC:
        shapes += [(2, 40, 96, 33, 21), (1, 20, 1, 1, 30), (2, 50, 130, 64, 40)]
    cases = with_dtypes(shapes)
    for seed, (layers, slots, rank, rope, n), dtype in cases:
        rng = np.random.default_rng(seed)
        pool = oracles.random_bits(rng, (layers, slots, rank + rope), dtype)
        rows = oracles.random_bits(rng, (n, rank + rope), dtype)
        loc = oracles.random_loc(rng, n, slots)
        step = jax.jit(partial(write_mla_kv, implementation=implementation), donate_argnums=0)
        got = step(jnp.array(pool), np.int32(0), loc, rows[:, :rank], rows[:, rank:])
        same_bits(got, oracles.put_rows(pool, 0, loc, rows))
    return len(cases)


def check_pages(implementation: Implementation) -> int:
    shapes = [(3, 16, (8, 128), 100, 60), (2, 3, (5, 7), 30, 40), (1, 1, (33,), 20, 9)]
    cases = with_dtypes(shapes)
    for seed, (layers, page_size, row, num_pages, n), dtype in cases:
        rng = np.random.default_rng(seed)
        pool = oracles.random_bits(rng, (layers, num_pages * page_size, *row), dtype)
        pages = oracles.random_loc(rng, n, num_pages)
        options = {"page_size": page_size, "implementation": implementation}
        got = jax.jit(partial(gather_pages, **options))(jnp.array(pool), pages)
        same_bits(got, oracles.gather_pages(pool, pages, page_size))
        blocks = oracles.random_bits(rng, got.shape, dtype)
        got = jax.jit(partial(scatter_pages, **options), donate_argnums=0)(jnp.array(pool), pages, blocks)
        same_bits(got, oracles.scatter_pages(pool, pages, blocks, page_size))
        order = (1 + rng.permutation(pool.shape[1] - 1)).astype(np.int32)
        tgt, src = order[: len(order) // 2], order[len(order) // 4 :][: len(order) // 2]
        move = jax.jit(partial(move_rows, implementation=implementation), donate_argnums=0)
        same_bits(move(jnp.array(pool), tgt, src), oracles.move_rows(pool, tgt, src))
    return len(cases)


def check_fp8(implementation: Implementation) -> int:
    formats = [jnp.float8_e4m3fn, jnp.float8_e5m2]
    for seed, dtype in enumerate(formats * 3):
        rng, source = np.random.default_rng(seed), (jnp.bfloat16, jnp.float32, jnp.float16)[seed // 2]
        pools = [oracles.random_bits(rng, (2, 4000, 8, dim), np.uint8) for dim in (128, 96)]
        rows = [oracles.random_floats(rng, (3000, 8, dim), source) for dim in (128, 96)]
        rows[0][0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
        scales = [rng.uniform(0.1, 3, shape).astype(np.float32) for shape in ((8,), ())]
        loc = oracles.random_loc(rng, 3000, 4000)
        write = partial(write_kv_fp8, dtype=dtype, implementation=implementation)
        got = jax.jit(write, donate_argnums=(0, 1))(*map(jnp.array, pools), np.int32(1), loc, *rows, *scales)
        for pool, row, scale, result in zip(pools, rows, scales, got, strict=True):
            same_bits(result, oracles.put_rows(pool, 1, loc, oracles.fp8(row, scale, dtype)))
    return 3 * len(formats)


def check_int8(implementation: Implementation) -> int:
    sources = [jnp.bfloat16, jnp.float32, jnp.float16]
    for seed, source in enumerate(sources):
        rng = np.random.default_rng(seed)
        shapes = [(2, 4000, 8, 128), (2, 4000, 8, 96)]
        payloads = [oracles.random_bits(rng, shape, np.int8) for shape in shapes]
        scales = [oracles.random_bits(rng, shape[:3], np.float32) for shape in shapes]
        rows = [oracles.random_floats(rng, (3000, *shape[2:]), source) for shape in shapes]
        loc = oracles.random_loc(rng, 3000, 4000)
        pools = [QuantizedPool(jnp.array(p), jnp.array(s)) for p, s in zip(payloads, scales, strict=True)]
        write = jax.jit(partial(write_kv_int8, implementation=implementation), donate_argnums=(0, 1))
        for payload, scale, row, got in zip(
            payloads, scales, rows, write(*pools, np.int32(1), loc, *rows), strict=True
        ):
            units, steps = oracles.int8(row)
            same_bits(got.payload, oracles.put_rows(payload, 1, loc, units))
            same_bits(got.scales, oracles.put_rows(scale, 1, loc, steps))
    return len(sources)


def check_copies() -> int:
    for dtype in oracles.STORAGE_DTYPES:
        rng = np.random.default_rng(0)
        pool = oracles.random_bits(rng, (3, 500, 2, 24), dtype)
        order = (1 + rng.permutation(499)).astype(np.int32)
        src, tgt = order[:300], order[100:400]
        rows = jax.jit(gather_rows)(jnp.array(pool), src)
        same_bits(rows, pool[:, src])
        want = pool.copy()
        want[:, tgt] = pool[:, src]
        same_bits(jax.jit(scatter_rows, donate_argnums=0)(jnp.array(pool), tgt, rows), want)
        same_bits(jax.jit(move_rows, donate_argnums=0)(jnp.array(pool), tgt, src), want)
    return len(oracles.STORAGE_DTYPES)


def check_pools() -> int:
    makers: tuple[Any, ...] = numpy_pool.CONFIGS
    configs = [make(dtype) for make in makers[:2] for dtype in numpy_pool.DTYPES]
    configs += [make(dtype) for make in makers[2:] for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)]
    for config in configs:
        pool, oracle = numpy_pool.filled_pool(config)
        rng, loc = np.random.default_rng(1), [5, 27, 4, 0]
        rows = [jnp.array(numpy_pool.random_rows(rng, config.dtype, (4, *row))) for row in config.row_shapes]
        pool = pool.set_kv_buffer(1, slots(loc), *rows)
        oracle.write(1, loc, [np.asarray(array) for array in rows])
        oracle.expect(pool)
        pool = pool.move_kv_cache(slots([8, 9, 10]), slots([9, 10, 8]))
        oracle.move([8, 9, 10], [9, 10, 8])
        oracle.expect(pool)
        copy = pool.get_cpu_copy(slots([12, 13]))
        pool = pool.load_cpu_copy(copy, slots([20, 21]))
        oracle.move([20, 21], [12, 13])
        oracle.expect(pool)
        for buffer, lying in zip(pool.buffers, oracle.as_they_lie(), strict=True):
            same_bits(buffer, lying)
    return len(configs)


def check_huge_pool(implementation: Implementation) -> int:
    """Rows at the far end of a pool of more than 2^31 elements arrive there, and nothing else changes."""
    layers, slots, heads, dim, n = 8, 300_000, 8, 128, 1000
    pools = [jnp.zeros((layers, slots, heads, dim), jnp.uint8) for _ in range(2)]
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 256, (n, heads, dim), dtype=np.uint8) for _ in range(2)]
    loc = (slots - 1 - rng.permutation(5 * n)[:n]).astype(np.int32)
    step = jax.jit(partial(write_kv, implementation=implementation), donate_argnums=(0, 1))
    for pool, row in zip(step(*pools, np.int32(layers - 1), loc, *rows), rows, strict=True):
        same_bits(jax.jit(lambda pool: pool[layers - 1].at[loc].get())(pool), row)
        touched = jax.jit(lambda pool: jnp.sum(jnp.any(pool != 0, axis=(2, 3)), dtype=jnp.int32))(pool)
        assert int(touched) == n, f"{int(touched)} rows of the pool are not zero, {n} were written"
    return layers * slots * heads * dim


def same_bits(got: jax.Array, want: np.ndarray) -> None:
    np.testing.assert_array_equal(oracles.bits(got), oracles.bits(want))


def slots(values: list[int]) -> jax.Array:
    return jnp.array(values, jnp.int32)
