"""Does loading a prefix layer by layer hide behind the computation that needs it? Three ways, in turns, in one run.

    python -m benchmarks.tiers_overlap --json OUT.json        a GPU
    python -m benchmarks.tiers_overlap --small                does it work?

A prompt's last chunk is computed over a long prefix that lies in page-locked host memory, a block a layer. A jitted
step starts when all its inputs are there, so what can overlap is:

    first     every block is on the device before the one step starts: what `Transfers` does today
    in step   the step takes the blocks in host memory, and fetches that of layer k + 1 before it computes layer k
    groups    one executable for each group of layers: while a group computes, the blocks of the next ones travel

Told: the time until the chunk's result is there, that of the link alone, and that of the step alone. Whatever overlaps
cannot be faster than the longer of these two; "first" is their sum.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figures import as_command, machine, write_figures


@dataclass(frozen=True)
class Sizes:
    """Of the model, the prefix and the chunk."""

    layers: int = 32
    heads: int = 8
    queries: int = 4  # heads of queries for one of keys
    dim: int = 128
    prefix: int = 16384
    chunk: int = 512

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.heads * self.queries * self.dim


SMALL = Sizes(layers=4, heads=2, dim=32, prefix=128, chunk=16)


def layer(x: Any, weight: Any, kv: Any, sizes: Sizes) -> Any:
    """One layer: attention of the chunk over the prefix, and the matrices of a layer."""
    q = (x @ weight[0]).reshape(sizes.chunk, sizes.heads, sizes.queries, sizes.dim)
    scores = jnp.einsum("thqd,phd->hqtp", q, kv[0], preferred_element_type=jnp.float32)
    mixed = jnp.einsum("hqtp,phd->thqd", jax.nn.softmax(scores * sizes.dim**-0.5).astype(x.dtype), kv[1])
    x = x + mixed.reshape(x.shape) @ weight[1]
    return x + jax.nn.silu(x @ weight[2]) @ weight[3]


@functools.partial(jax.jit, static_argnames=("sizes",))
def on_device(x: Any, weights: Any, blocks: Any, *, sizes: Sizes) -> Any:
    """Layers whose blocks are on the device."""
    for weight, kv in zip(weights, blocks, strict=True):
        x = layer(x, weight, kv, sizes)
    return x


@functools.partial(jax.jit, static_argnames=("sizes",))
def in_step(x: Any, weights: Any, blocks: Any, *, sizes: Sizes) -> Any:
    """Layers whose blocks are in host memory; each is fetched a layer ahead."""
    there = jax.device_put(blocks[0], jax.memory.Space.Device)
    for i, weight in enumerate(weights):
        following = jax.device_put(blocks[i + 1], jax.memory.Space.Device) if i + 1 < len(blocks) else None
        x = layer(x, weight, there, sizes)
        if following is not None:
            there = following
    return x


class Prompt:
    """A chunk, the weights, and the prefix in host memory.

    Args:
      sizes: Of all of it.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        device = jax.devices()[0]
        self.here = jax.sharding.SingleDeviceSharding(device)
        host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        keys = iter(jax.random.split(jax.random.key(0), 2 * sizes.layers + 1))
        width, scale = sizes.width, np.float32(sizes.width) ** -0.5

        def random(shape: tuple[int, ...]) -> Any:
            return jax.device_put(jax.random.normal(next(keys), shape, jnp.bfloat16), self.here)

        self.x = random((sizes.chunk, width))
        self.weights = [(random((4, width, width)) * scale).astype(jnp.bfloat16) for _ in range(sizes.layers)]
        shape = 2, sizes.prefix, sizes.heads, sizes.dim
        self.blocks = [jax.device_put(random(shape), host) for _ in range(sizes.layers)]
        self.there = [jax.device_put(block, self.here) for block in self.blocks]
        jax.block_until_ready((self.x, self.weights, self.blocks, self.there))

    @property
    def num_bytes(self) -> int:
        """Of the prefix."""
        return sum(block.nbytes for block in self.blocks)

    def link(self) -> Any:
        """The blocks alone."""
        return [jax.device_put(block, self.here) for block in self.blocks]

    def step(self) -> Any:
        """The computation alone."""
        return on_device(self.x, self.weights, self.there, sizes=self.sizes)

    def first(self) -> Any:
        """All blocks, then the step."""
        return on_device(self.x, self.weights, jax.block_until_ready(self.link()), sizes=self.sizes)

    def in_step(self) -> Any:
        """The step fetches them."""
        return in_step(self.x, self.weights, self.blocks, sizes=self.sizes)

    def groups(self, count: int) -> Any:
        """All blocks start to travel; a group's executable is dispatched behind those that it needs."""
        blocks, x = self.link(), self.x
        size = -(-self.sizes.layers // count)
        for start in range(0, self.sizes.layers, size):
            part = slice(start, start + size)
            x = on_device(x, self.weights[part], blocks[part], sizes=self.sizes)
        return x


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefix", type=int, nargs="+", help="tokens (default: 16384 65536)")
    parser.add_argument("--chunk", type=int, nargs="+", help="tokens (default: 512 4096)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    base = SMALL if options.small else Sizes()
    prefixes = options.prefix or ([base.prefix] if options.small else [16384, 65536])
    chunks = options.chunk or ([base.chunk] if options.small else [512, 4096])
    figures = machine() | {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    for prefix in prefixes:
        for chunk in chunks:
            row = measured(Sizes(base.layers, base.heads, base.queries, base.dim, prefix, chunk), options.rounds)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            figures["rows"].append(row)
            write_figures(options.json, figures)
    return figures


def measured(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of each way, and how much of what could be hidden was."""
    prompt = Prompt(sizes)
    ways: dict[str, Callable[[], Any]] = {
        "link": prompt.link,
        "step": prompt.step,
        "first": prompt.first,
        "in_step": prompt.in_step,
        "groups_of_4": lambda: prompt.groups(max(1, sizes.layers // 4)),
        "groups_of_1": lambda: prompt.groups(sizes.layers),
    }
    wanted = np.asarray(prompt.step(), np.float32)
    for name, way in ways.items():
        if name != "link" and not np.allclose(np.asarray(way(), np.float32), wanted, rtol=0.05, atol=0.05):
            raise RuntimeError(f"{name} computes something else")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - begin)
    took = {name: statistics.median(of) for name, of in times.items()}
    could = min(took["link"], took["step"])
    row: dict[str, Any] = {"prefix": sizes.prefix, "chunk": sizes.chunk, "gb": round(prompt.num_bytes / 1e9, 3)}
    row |= {f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in took.items()}
    row |= {f"hidden_{name}": round((took["first"] - took[name]) / could, 3) for name in list(ways)[3:]}
    return row


if __name__ == "__main__":
    as_command("tiers_overlap", main)
