"""Pools over several devices: first whether they hold the bits of one device's pool, then how fast a write is.

    python -m benchmarks.sharded [--small] [--devices N] [--out DIR] [--commit ID]

Runs on whatever devices there are; a machine with none but a CPU gets eight simulated ones, where the numbers only show
that it runs. Pools of keys and values are cut along the heads, latent pools are copied to every device. The time of a
write stands beside that of a copy of the same bytes, every device copying its share. Writes DIR/sharded.jsonl, by
default under benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # for a machine that has but a CPU; JAX reads it when it is imported

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.device import current_commit
from benchmarks.timing import Report, time_jax, time_jax_donated
from jaxcache.device.donation import donating
from jaxcache.errors import BrokenInvariantError
from jaxcache.kernels.in_place import assert_in_place
from jaxcache.pools.base import KVCache, KVCacheConfig
from jaxcache.pools.mha import MHAConfig, MHATokenToKVPool
from jaxcache.pools.mla import MLAConfig, MLATokenToKVPool

LAYERS = 8
REPEATS = 32
CHECKED_TOKENS = 32_768
"""Size of the pools that are read back whole to be compared."""
EVERYWHERE = PartitionSpec()


def main() -> None:
    parser = argparse.ArgumentParser(description="Sharded pools: right to the bit, then timed.")
    parser.add_argument("--small", action="store_true", help="small pools: any device, under a minute")
    parser.add_argument("--devices", type=int, help="at most so many; by default all")
    parser.add_argument("--out", type=Path, help="folder for sharded.jsonl")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    options = parser.parse_args()
    devices = jax.devices()[: options.devices]
    name = devices[0].device_kind.replace(" ", "-")
    counts = [n for n in (1, 2, 4, 8) if n <= len(devices)]
    print(f"jax {jax.__version__} on {len(devices)} x {name}", flush=True)
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        for config in configs(dtype, options.small):
            for n in counts:
                print(f"bit-exact: {check(config, devices[:n])}", flush=True)
    report = Report(
        (options.out or Path(__file__).parent / "results" / name) / "sharded.jsonl",
        name,
        options.commit or current_commit(),
    )
    for config in configs(jnp.bfloat16, options.small):
        for n in counts:
            for tokens in (64, 1024) if options.small else (256, 16_384, 65_536):
                bench_write(report, config, devices[:n], tokens)
    print(f"{len(report.rows)} rows in {report.path}")


def configs(dtype: Any, small: bool) -> tuple[KVCacheConfig, ...]:
    """Keys and values of 8 heads x 128, and latent rows of 512 + 64, in the widths of the single-device benchmark."""
    sizes: dict[str, Any] = {"size": 4096 if small else 262_144, "page_size": 16, "layer_num": LAYERS, "dtype": dtype}
    dim, rank, rope = (16, 96, 32) if small else (128, 512, 64)
    return (
        MHAConfig(head_num=8, head_dim=dim, **sizes),
        MLAConfig(kv_lora_rank=rank, qk_rope_head_dim=rope, **sizes),
    )


def make_pool(config: KVCacheConfig, devices: Sequence[Any]) -> KVCache:
    """A pool over these devices; with one device and no axis, the single pool."""
    mesh = None if config.axis_name is None else Mesh(np.array(devices), (config.axis_name,))
    kind = MHATokenToKVPool if isinstance(config, MHAConfig) else MLATokenToKVPool
    return kind.create(config, mesh=mesh, device=devices[0] if mesh is None else None)  # pyright: ignore


def over(config: KVCacheConfig, n: int) -> KVCacheConfig:
    """The same pool cut for `n` devices."""
    return dataclasses.replace(config, axis_name="tp", shards=n)


def sharded(step: Any, pool: KVCache, *specs: Any) -> Any:
    """`step(pool, ...) -> pool` for each shard, donated; as it is for a single pool."""
    if pool.mesh is None:
        return donating(step)
    pools = pool.partition_specs()
    return donating(jax.shard_map(step, mesh=pool.mesh, in_specs=(pools, *specs), out_specs=pools, check_vma=False))


def write_every_layer(pool: KVCache, loc: jax.Array, rows: tuple[jax.Array, ...]) -> KVCache:
    """The rows of a token in every layer, in a scan that carries the pool."""

    def body(pool: KVCache, layer_and_rows: Any) -> tuple[KVCache, None]:
        layer, rows = layer_and_rows
        return pool.set_kv_buffer(layer, loc, *rows), None  # pyright: ignore[reportAttributeAccessIssue]

    return jax.lax.scan(body, pool, (jnp.arange(LAYERS, dtype=jnp.int32), rows))[0]


def random_rows(rng: np.random.Generator, config: KVCacheConfig, n: int) -> tuple[np.ndarray, ...]:
    return tuple(rng.standard_normal((LAYERS, n, *row), np.float32).astype(config.dtype) for row in config.row_shapes)


def check(config: KVCacheConfig, devices: Sequence[Any]) -> str:
    """Random writes, moves and host copies on one device and on many; every bit of every shard must agree."""
    config = dataclasses.replace(config, size=min(config.size, CHECKED_TOKENS))
    many = over(config, len(devices))
    pools = [make_pool(config, devices), make_pool(many, devices)]
    addresses = pointers(pools[1])
    rng, n = np.random.default_rng(0), min(4096, config.size // 8)
    every = many.partition_spec
    steps = [
        (sharded(write_every_layer, p, EVERYWHERE, every), sharded(move, p, EVERYWHERE, EVERYWHERE)) for p in pools
    ]
    for _ in range(3):
        slots = rng.permutation(config.rows)[: 2 * n].astype(np.int32)
        rows = random_rows(rng, config, n)
        for i, (write, move_rows) in enumerate(steps):
            pool = write(pools[i], slots[:n], rows)
            pool = move_rows(pool, slots[n : n + 64], slots[:64])
            pools[i] = pool.load_cpu_copy(pool.get_cpu_copy(slots[64:96]), slots[n + 64 : n + 96])
    assert_in_place(steps[1][0], pools[1], slots[:16], tuple(row[:, :16] for row in rows))
    if pointers(pools[1]) != addresses:
        raise BrokenInvariantError(f"the pool moved in memory: {config} on {devices}")
    for mine, theirs in zip(pools[1].buffers, pools[0].buffers, strict=True):
        whole = np.asarray(theirs).view(f"u{theirs.dtype.itemsize}")
        for shard in mine.addressable_shards:
            if not np.array_equal(np.asarray(shard.data).view(whole.dtype), whole[shard.index]):
                raise BrokenInvariantError(f"{shard.device} differs from a single device: {config}")
    return f"{describe(config)} on {len(devices)}"


def pointers(pool: KVCache) -> list[int]:
    """The address of every shard."""
    return [shard.data.unsafe_buffer_pointer() for buffer in pool.buffers for shard in buffer.addressable_shards]


def move(pool: KVCache, tgt_loc: jax.Array, src_loc: jax.Array) -> KVCache:
    """A pool's own move, as a step."""
    return pool.move_kv_cache(tgt_loc, src_loc)


def bench_write(report: Report, config: KVCacheConfig, devices: Sequence[Any], tokens: int) -> None:
    """Rows of `tokens` tokens to random slots, one layer after another; all devices at once."""
    many = over(config, len(devices))
    pool = make_pool(many, devices)
    rng = np.random.default_rng(tokens)
    one = PartitionSpec(*many.partition_spec[1:])
    loc = jnp.asarray(1 + rng.permutation(config.rows - 1)[:tokens], jnp.int32)
    rows = tuple(
        jax.device_put(np.ones((tokens, *row), config.dtype), NamedSharding(pool.mesh, one))  # pyright: ignore
        for row in config.row_shapes
    )
    copies = 1 if isinstance(config, MHAConfig) else len(devices)
    moved = 2 * copies * sum(row.nbytes for row in rows)
    bench, case = "write_sharded", f"n={tokens} {describe(config)} on {len(devices)}"
    copies_at_once = max(1, min(REPEATS, 2**32 // moved))
    halves = NamedSharding(pool.mesh, PartitionSpec(None, "tp"))  # pyright: ignore[reportArgumentType]
    source = jnp.zeros((copies_at_once, moved // 2), jnp.uint8, device=halves)
    copy_time = time_jax(jax.jit(jnp.copy), source, repeats=copies_at_once)
    report.add(bench, case, "device-copy", copy_time, moved=moved, is_peer=True)
    report.copy_us[moved] = report.rows[-1].median_us
    step = sharded(repeat_write, pool, EVERYWHERE, one)
    write_time, _ = time_jax_donated(step, pool, loc, rows, repeats=REPEATS)
    report.add(bench, case, "jaxcache", write_time, moved=moved)


def repeat_write(pool: KVCache, loc: jax.Array, rows: tuple[jax.Array, ...]) -> KVCache:
    """Unrolled, so that the host dispatches once."""
    for i in range(REPEATS):
        pool = pool.set_kv_buffer(i % LAYERS, loc, *rows)  # pyright: ignore[reportAttributeAccessIssue]
    return pool


def describe(config: KVCacheConfig) -> str:
    """Kind of rows and dtype, as a case of the benchmark names it."""
    if isinstance(config, MHAConfig):
        return f"{config.head_num}x{config.head_dim} {config.dtype}"
    widths = "+".join(map(str, (config.kv_lora_rank, config.qk_rope_head_dim)))  # pyright: ignore
    return f"{widths} {config.dtype}"


if __name__ == "__main__":
    main()
