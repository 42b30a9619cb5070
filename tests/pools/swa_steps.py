"""The oracle of the two-sided pool, and the shapes of a step of a model with both kinds of layers.

Each step is `step(pool, loc, rows, index, page)`: full slots of `TOKENS` tokens, their rows for one layer as a tuple
with one array for each of a side's, and entries of the map that have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcache.pools.swa import SWAConfig, SWAKVPool
from tests.pools.numpy_pool import NumpyPool, mha_config, mla_config
from tests.pools.steps import LAYERS, TOKENS, row_specs

MAKE_CONFIGS = [mha_config, mla_config]
CHANGES = 8


def swa_config(make_config=mha_config, dtype=np.float32, window=None, **sizes) -> SWAConfig:
    """A small pool: layers 2 and 0 are the window's, 4, 1 and 3 of full attention. `window` are sizes of that side."""
    full, small = make_config(dtype, **sizes), make_config(dtype, **sizes | {"layer_num": 2} | (window or {}))
    return SWAConfig(full=full, window=small, full_layers=(4, 1, 3), window_layers=(2, 0))


def large_config(make_config=mha_config, dtype=jnp.bfloat16, **sizes) -> SWAConfig:
    """Large enough for a copy of a side to be told from a temporary; odd layers are the window's."""
    sizes = {"size": 4096, "page_size": 16, "layer_num": LAYERS} | sizes
    full, window = make_config(dtype, **sizes), make_config(dtype, **sizes | {"size": 2048})
    layers = range(2 * LAYERS)
    return SWAConfig(full=full, window=window, full_layers=tuple(layers[::2]), window_layers=tuple(layers[1::2]))


class NumpySWAPool:
    """Rows of both sides as NumPy arrays, and the map as a dict from full page to window page."""

    def __init__(self, config: SWAConfig):
        self.config = config
        self.full, self.window = NumpyPool(config.full), NumpyPool(config.window)
        self.window_of: dict[int, int] = {}

    def translate(self, slots: Sequence[int]) -> list[int]:
        """Window slots; 0 where there is none."""
        size = self.config.full.page_size
        pairs = ((self.window_of.get(slot // size), slot % size) for slot in slots)
        return [0 if window is None else window * size + offset for window, offset in pairs]

    def side_of(self, layer: int) -> tuple[NumpyPool, int]:
        """The side of a global layer, and its index there."""
        if layer in self.config.full_layers:
            return self.full, self.config.full_layers.index(layer)
        return self.window, self.config.window_layers.index(layer)

    def write(self, layer: int, slots: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """Rows of one global layer."""
        side, index = self.side_of(layer)
        side.write(index, slots if side is self.full else self.translate(slots), rows)

    def read(self, layer: int, slots: Sequence[int]) -> list[np.ndarray]:
        """Rows of one global layer."""
        side, index = self.side_of(layer)
        return [array[index, slots if side is self.full else self.translate(slots)] for array in side.arrays]

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """All moves at the same instant, in every layer."""
        self.full.move(targets, sources)
        self.window.move(self.translate(targets), self.translate(sources))

    def reload(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """A copy of tokens to other slots, through the host: what has no window page is not copied there."""
        self.full.move(targets, sources)
        pairs = zip(self.translate(targets), self.translate(sources), strict=True)
        pairs = [(target, source) for target, source in pairs if source]
        self.window.move([target for target, _ in pairs], [source for _, source in pairs])

    def expect(self, pool: SWAKVPool) -> None:
        """Fails unless both sides hold the same bits everywhere, the sinks included, and the maps are the same."""
        self.full.expect(pool.full)
        self.window.expect(pool.window)
        pages = range(self.config.num_pages + 1)
        assert pool.full_to_window.tolist() == [self.window_of.get(page, 0) for page in pages]


def write_full(pool, loc, rows, index, page):
    return pool.set_kv_buffer(2, loc, *rows)


def write_window(pool, loc, rows, index, page):
    return pool.set_kv_buffer(3, loc, *rows)


def patch_map(pool, loc, rows, index, page):
    return pool.with_window_map(index, page)


def patch_and_write_every_layer(pool, loc, rows, index, page):
    pool = pool.with_window_map(index, page)
    for layer in range(pool.config.layer_num):
        pool = pool.set_kv_buffer(layer, loc, *rows)
    return pool


def scan_over_both_sides(pool, loc, rows, index, page):
    pool = pool.with_window_map(index, page)
    window_loc = pool.translate_loc_from_full_to_swa(loc)

    def two_layers(pool, i):
        full = pool.full.set_kv_buffer(i, loc, *rows)
        window = pool.window.set_kv_buffer(i, window_loc, *rows)
        return pool.with_full(full).with_window(window), (full.gather(loc, i), window.gather(window_loc, i))

    return jax.lax.scan(two_layers, pool, jnp.arange(LAYERS, dtype=jnp.int32))


def scan_over_one_side_after_the_other(pool, loc, rows, index, page):
    window_loc = pool.translate_loc_from_full_to_swa(loc)

    def layer(loc):
        return lambda side, i: (side.set_kv_buffer(i, loc, *rows), None)

    layers = jnp.arange(LAYERS, dtype=jnp.int32)
    pool = pool.with_full(jax.lax.scan(layer(loc), pool.full, layers)[0])
    return pool.with_window(jax.lax.scan(layer(window_loc), pool.window, layers)[0])


def write_then_gather(pool, loc, rows, index, page):
    pool = pool.set_kv_buffer(2, loc, *rows).set_kv_buffer(3, loc, *rows)
    return pool, pool.gather(loc, 2), pool.gather(loc, 3)


def gather_then_write(pool, loc, rows, index, page):
    read = pool.gather(loc[::-1], 1)
    return pool.set_kv_buffer(3, loc, *(read if isinstance(read, tuple) else (read,)))


def move(pool, loc, rows, index, page):
    return pool.move_kv_cache(loc, loc[::-1])


def decode_loop(pool, loc, rows, index, page):
    """Many steps in one call: the map changes in between."""

    def one_step(pool, i):
        pool = pool.with_window_map(index + i, page)
        return pool.set_kv_buffer(2, loc + i, *rows).set_kv_buffer(3, loc + i, *rows), None

    return jax.lax.scan(one_step, pool, jnp.arange(3, dtype=jnp.int32))[0]


STEPS = [
    write_full,
    write_window,
    patch_map,
    patch_and_write_every_layer,
    scan_over_both_sides,
    scan_over_one_side_after_the_other,
    write_then_gather,
    gather_then_write,
    move,
    decode_loop,
]


def abstract_args(config: SWAConfig, platform, mesh=None):
    """The arguments of a step without memory, on a mesh if one is given."""

    def shaped(shape, dtype, spec):
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    everywhere = PartitionSpec()
    pool = SWAKVPool.abstract(config, platform=platform, mesh=mesh if config.axis_name else None)
    one, _ = row_specs(config.full)
    rows = tuple(shaped((TOKENS, *row), config.full.dtype, one) for row in config.full.row_shapes)
    changes = (shaped((CHANGES,), jnp.int32, everywhere) for _ in range(2))
    return pool, shaped((TOKENS,), jnp.int32, everywhere), rows, *changes


def on_mesh(step, config: SWAConfig, mesh, pool_specs):
    """`step` for each shard; whatever it returns beside the pool stays unlooked at."""

    def shard_step(*args):
        out = step(*args)
        pool, *rest = out if isinstance(out, tuple) else (out,)
        return pool, jax.tree.map(lambda x: x[None], rest)

    one, _ = row_specs(config.full)
    in_specs = (pool_specs, PartitionSpec(), one, PartitionSpec(), PartitionSpec())
    out_specs = (pool_specs, PartitionSpec(config.axis_name))
    return jax.shard_map(shard_step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
