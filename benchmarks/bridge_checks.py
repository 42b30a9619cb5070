"""Is one memory really one memory: addresses, order and content, on whatever device JAX has. A difference raises.

The oracles are those of the tests. A spin is work of some 50 ms that stands in front of a write or a read: whoever does
not wait for it sees something else, which `control` makes sure of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxcache import (
    ArgumentError,
    BorrowedError,
    CacheError,
    KVCache,
    MHAConfig,
    MHATokenToKVPool,
    MLAConfig,
    MLATokenToKVPool,
    donating,
    reading,
)
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import bits, to_tensor
from torch_bridge import TorchKVPool, adopt, adopt_pool, borrow, share
from torch_bridge.dtypes import torch_dtype

SPIN_MS = 50
SPIN_SIZE, SPINS = (8192, 24) if jax.default_backend() == "gpu" else (1024, 4)
"""Rows of the matrices whose products are the spin on JAX's side, and how many."""


def on_gpu() -> bool:
    """Whether pools lie on a GPU here."""
    return jax.default_backend() == "gpu"


def check_everything(alternations: int) -> Iterator[str]:
    """Yields a line for each thing that holds, else raises."""
    yield f"one address on both sides: {check_addresses()} arrays"
    yield f"torch's writes and moves: {check_writes()} pools"
    yield f"order: {', '.join(check_order())}"
    yield f"dead after the block: {check_dead_views()} ways to use a view"
    if on_gpu():
        yield f"pools in torch's memory, updated in place: {check_adopted_pools()} steps"
    yield f"{check_alternating(alternations):,} alternating writes of JAX and torch: 0 differences"


def check_addresses() -> int:
    """Every dtype and kind of pool, whole, by layer and by page; tensors back to JAX."""
    checked = 0
    for dtype in numpy_pool.DTYPES:
        makers: Any = numpy_pool.mha_config, numpy_pool.mla_config
        for config in (make(dtype) for make in makers):
            pool = numpy_pool.make_pool(config)
            with borrow(pool) as kv:
                for i, (tensor, buffer) in enumerate(zip(kv.buffers, pool.buffers, strict=True)):
                    assert tensor.data_ptr() == buffer.unsafe_buffer_pointer()
                    assert tensor.dtype == torch_dtype("pool", np.dtype(dtype)) and tensor.shape == buffer.shape
                    layer_bytes = tensor[0].nbytes
                    for layer in range(config.layer_num):
                        pages = kv.get_paged_buffers(layer)[i]
                        assert pages.shape == (config.rows // config.page_size, config.page_size, *buffer.shape[2:])
                        assert pages.data_ptr() == tensor.data_ptr() + layer * layer_bytes
                    checked += 1
            rows = to_tensor(np.zeros((4, 8), dtype)).to(kv.device)
            assert adopt(rows).unsafe_buffer_pointer() == rows.data_ptr()
    return checked


def check_writes() -> int:
    """set_kv_buffer, set_mla_kv_buffer and move_kv_cache of every dtype, with padding, on pools full of other rows."""
    makers: Any = numpy_pool.mha_config, numpy_pool.mla_config
    configs = [make(dtype) for dtype in numpy_pool.DTYPES for make in makers]
    for config in configs:
        pool, oracle = numpy_pool.filled_pool(config)
        rng, loc = np.random.default_rng(1), [5, 27, 4, 0, 10_000]
        rows = [numpy_pool.random_rows(rng, np.dtype(config.dtype), (len(loc), *row)) for row in config.row_shapes]
        kv = share(pool)
        write_rows(kv, 1, loc, rows)
        oracle.write(1, loc, rows)
        oracle.expect(kv.pool)
        targets, sources = [8, 9, 10, 0], [9, 10, 8, 7]
        kv.move_kv_cache(slots_of(targets, kv.device), slots_of(sources, kv.device))
        oracle.move(targets, sources)
        oracle.expect(kv.pool)
        kv.close()
    return len(configs)


def write_rows(kv: TorchKVPool, layer: int, loc: Sequence[int], rows: Sequence[np.ndarray]) -> None:
    """Rows of one layer, by torch."""
    tensors = [to_tensor(array).to(kv.device) for array in rows]
    slots = slots_of(loc, kv.device)
    if len(tensors) == 2:
        kv.set_kv_buffer(layer, slots, *tensors)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        kv.set_kv_buffer(layer, slots, tensors[0])  # pyright: ignore[reportAttributeAccessIssue]


def slots_of(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Slots as torch callers have them."""
    return torch.tensor(values, dtype=torch.int64, device=device)


# Order: who goes first says so with a spin.


def small_pool(value: float = 1.0) -> MHATokenToKVPool:
    """A pool of two layers, slot 16 of layer 0 holding `value`."""
    config = MHAConfig(size=64, page_size=16, dtype=jnp.bfloat16, layer_num=2, head_num=2, head_dim=64)
    return MHATokenToKVPool.create(config).set_kv_buffer(0, SLOT, *rows_of(value))


SLOT: Any = np.array([16], np.int32)


def rows_of(value: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one token."""
    rows = jnp.full((1, 2, 64), value, jnp.bfloat16)
    return rows, rows


def after_spin(spin: jax.Array, value: Any) -> jax.Array:
    """`value`, once the product of `spin`, which is zeros, has been computed a few times."""
    for _ in range(SPINS):
        spin = spin @ spin
    return value + jnp.minimum(spin[0, 0], 0.0)


@donating
def slow_write(pool: MHATokenToKVPool, spin: jax.Array, value: float) -> MHATokenToKVPool:
    """A write behind a spin."""
    return pool.set_kv_buffer(0, SLOT, *rows_of(after_spin(spin, value)))


@donating
def quick_write(pool: MHATokenToKVPool, value: float) -> MHATokenToKVPool:
    """The same write without it."""
    return pool.set_kv_buffer(0, SLOT, *rows_of(value))


def _slow_read(pool: MHATokenToKVPool, spin: jax.Array) -> jax.Array:
    at = (after_spin(spin, jnp.float32(SLOT[0]))).astype(jnp.int32)  # the slot is known when the spin is over
    return pool.gather(at[None], 0)[0]


slow_read, own_slow_read = reading(_slow_read), jax.jit(_slow_read)
own_read = jax.jit(lambda pool: pool.gather(SLOT, 0)[0])


def torch_spin() -> None:
    """Work of torch's on its current stream; a CPU has nothing that could be late."""
    if on_gpu():
        torch.cuda._sleep(SPIN_MS * 1_900_000)


def torch_write(kv: Any, value: float) -> None:
    """A write behind a spin."""
    torch_spin()
    kv.k[0, int(SLOT[0])] = value


def torch_read(kv: Any) -> torch.Tensor:
    """A read behind a spin."""
    torch_spin()
    return kv.k[0, int(SLOT[0])].clone()


def check_order() -> list[str]:
    """Each way in which one framework could overtake the other."""
    spin = jnp.zeros((SPIN_SIZE, SPIN_SIZE), jnp.float32)
    compile_all(spin)
    cases: list[Callable[[jax.Array], Any]] = [
        jax_write_torch_read,
        torch_write_jax_step,
        torch_write_jax_read,
        jax_read_torch_write,
        torch_read_jax_write,
        jax_write_borrow,
        borrow_then_own_jit,
        read_then_borrow,
        own_jit_read_then_fence,
        fenced_own_jit,
    ]
    for case in cases:
        settle()
        got = np.unique(np.asarray(case(spin), np.float32))
        assert got.tolist() == [2.0], f"{case.__name__}: {got}"
    return [case.__name__ for case in cases]


def compile_all(spin: jax.Array) -> None:
    """Compiles every step of the cases, for shared pools and others."""
    for pool in (small_pool, lambda: share(small_pool()).pool):
        slow_write(pool(), spin, 1.0)
        quick_write(pool(), 1.0)
        for read in (slow_read, own_slow_read):
            read(pool(), spin)
        own_read(pool())


def settle() -> None:
    """Waits until both frameworks are idle."""
    jax.block_until_ready(jax.live_arrays())
    if on_gpu():
        torch.cuda.synchronize()


def jax_write_torch_read(spin: jax.Array) -> Any:
    kv = share(small_pool())
    slow_write(kv.pool, spin, 2.0)
    return numpy_of(kv.k[0, int(SLOT[0])].clone())


def torch_write_jax_step(spin: jax.Array) -> Any:
    kv = share(small_pool())
    torch_write(kv, 5.0)
    quick_write(kv.pool, 2.0)  # must not be overwritten
    torch_spin()
    return own_read(kv.pool)


def torch_write_jax_read(spin: jax.Array) -> Any:
    kv = share(small_pool())
    torch_write(kv, 2.0)
    return kv.pool.gather(SLOT, 0)[0]


def jax_read_torch_write(spin: jax.Array) -> Any:
    kv = share(small_pool(2.0))
    read = slow_read(kv.pool, spin)
    kv.k[0, int(SLOT[0])] = 5.0
    return read


def torch_read_jax_write(spin: jax.Array) -> Any:
    kv = share(small_pool(2.0))
    read = torch_read(kv)
    quick_write(kv.pool, 5.0)
    return numpy_of(read)


def jax_write_borrow(spin: jax.Array) -> Any:
    pool = slow_write(small_pool(), spin, 2.0)
    with borrow(pool) as kv:
        return numpy_of(kv.k[0, int(SLOT[0])].clone())


def borrow_then_own_jit(spin: jax.Array) -> Any:
    pool = small_pool()
    with borrow(pool) as kv:
        torch_write(kv, 2.0)
    return own_read(pool)


def read_then_borrow(spin: jax.Array) -> Any:
    pool = small_pool(2.0)
    read = slow_read(pool, spin)
    with borrow(pool) as kv:
        kv.k[0, int(SLOT[0])] = 5.0
    return read


def own_jit_read_then_fence(spin: jax.Array) -> Any:
    pool = small_pool(2.0)
    read = own_slow_read(pool, spin)
    with borrow(pool) as kv:
        kv.fence()
        kv.k[0, int(SLOT[0])] = 5.0
    return read


def fenced_own_jit(spin: jax.Array) -> Any:
    kv = share(small_pool())
    torch_write(kv, 2.0)
    kv.fence()
    read = own_slow_read(kv.pool, spin)
    kv.fence()
    kv.k[0, int(SLOT[0])] = 5.0
    return read


def control() -> list[str]:
    """The same races with nobody waiting: on a GPU they must go wrong, or the spins prove nothing. Names of those."""
    spin, wrong = jnp.zeros((SPIN_SIZE, SPIN_SIZE), jnp.float32), []
    pool = small_pool(1.0)
    settle()
    raw = raw_view(pool.k)
    pool = slow_write(pool, spin, 2.0)
    if float(raw[0, int(SLOT[0]), 0, 0].clone()) != 2.0:
        wrong.append("jax_write_torch_read")
    settle()
    torch_spin()
    raw[0, int(SLOT[0])] = 7.0
    if float(own_read(pool)[0, 0, 0]) != 7.0:
        wrong.append("torch_write_jax_read")
    settle()
    return wrong


def raw_view(array: jax.Array) -> torch.Tensor:
    """A tensor over `array` that nothing orders."""
    data = array.unsafe_buffer_pointer(), False
    interface = {"shape": (array.nbytes,), "typestr": "|u1", "data": data, "version": 3}
    address = SimpleNamespace(__cuda_array_interface__=interface, __array_interface__=interface)
    raw = torch.as_tensor(address, device="cuda") if on_gpu() else torch.from_numpy(np.asarray(address))
    return raw.view(torch.bfloat16).view(array.shape)


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Values of a tensor, in float32."""
    return tensor.float().cpu().numpy()


def check_dead_views() -> int:
    """After the block whatever touches the memory raises, on slices too; in it, donating raises and loses nothing."""
    pool = small_pool()
    with borrow(pool) as kv:
        k, layer, piece = kv.k, kv.get_key_buffer(0), kv.k[1, 3:5]
        expect(BorrowedError, lambda: quick_write(pool, 3.0))
        expect(BorrowedError, lambda: pool.set_kv_buffer(0, SLOT, *rows_of(3.0)))
        if on_gpu():
            expect(Exception, lambda: jax.jit(lambda pool: pool, donate_argnums=0)(pool))
    uses: list[Callable[[], Any]] = [
        lambda: kv.k,
        lambda: kv.get_key_buffer(0),
        lambda: kv.set_kv_buffer(0, slots_of([16], kv.device), k[0, :1], k[0, :1]),
        lambda: k.sum().item(),
        lambda: layer[0].clone(),
        lambda: piece.add_(1),
        lambda: torch.cat([piece, piece]),
        lambda: piece.data_ptr(),
    ]
    for use in uses:
        expect((CacheError, RuntimeError), use)
    assert float(own_read(pool)[0, 0, 0]) == 1.0
    quick_write(pool, 3.0)
    return len(uses)


def expect(error: Any, call: Callable[[], Any]) -> None:
    """Fails unless `call` raises `error`."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"nothing raised {error}")


def check_adopted_pools(steps: int = 200) -> int:
    """Donated steps update memory that torch allocated, where it is; it outlives torch's own names for it."""
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.int8):
        config = MHAConfig(size=256, page_size=16, dtype=dtype, layer_num=2, head_num=2, head_dim=64)
        k, v = (torch.zeros((2, 272, 2, 64), dtype=torch_dtype("", np.dtype(dtype)), device="cuda") for _ in range(2))
        pool, oracle = adopt_pool(config, k, v), numpy_pool.NumpyPool(config)
        addresses = k.data_ptr(), v.data_ptr()
        rng = np.random.default_rng(0)
        for i in range(steps):
            loc: Any = 16 + rng.permutation(256)[:8].astype(np.int32)
            rows = [numpy_pool.random_rows(rng, np.dtype(dtype), (8, 2, 64)) for _ in range(2)]
            pool = pool.set_kv_buffer(i % 2, loc, *rows)  # pyright: ignore[reportAttributeAccessIssue]
            oracle.write(i % 2, loc.tolist(), rows)
        assert tuple(buffer.unsafe_buffer_pointer() for buffer in pool.buffers) == addresses
        with borrow(pool):  # torch after JAX
            for tensor, array in zip((k, v), oracle.arrays, strict=True):
                np.testing.assert_array_equal(bits(tensor), numpy_pool.bits(array).view(np.uint8).reshape(-1))
        del k, v, tensor
        torch.cuda.empty_cache()
        torch.full((2, 272, 2, 64), 7.0, device="cuda")  # would take the memory, were it free
        oracle.expect(pool)
    return steps


def check_alternating(steps: int) -> int:
    """Writes of random sizes to random slots, JAX and torch in random turns, against NumPy; nobody synchronises."""
    config = MLAConfig(size=1024, page_size=16, dtype=jnp.bfloat16, layer_num=2, kv_lora_rank=64, qk_rope_head_dim=16)
    width, most = 80, 32
    rng = np.random.default_rng(7)
    bank = numpy_pool.random_rows(rng, np.dtype(config.dtype), (4096, width))
    jax_bank, torch_bank = jnp.asarray(bank), to_tensor(bank)
    kv = share(MLATokenToKVPool.create(config))
    torch_bank, oracle = torch_bank.to(kv.device), np.zeros((2, config.rows, width), config.dtype)

    @donating
    def write(pool: MLATokenToKVPool, bank: jax.Array, packed: jax.Array) -> MLATokenToKVPool:
        loc, start, layer = packed[:most], packed[most], packed[most + 1]
        rows = jax.lax.dynamic_slice_in_dim(bank, start, most)
        return pool.set_kv_buffer(layer, loc, rows)

    for _ in range(steps):
        n, start, layer = int(rng.integers(1, most + 1)), int(rng.integers(4096 - most)), int(rng.integers(2))
        loc: Any = (1 + rng.choice(config.size, n, replace=False, shuffle=False)).astype(np.int32)
        oracle[layer, loc] = bank[start : start + n]
        if rng.integers(2):
            packed: Any = np.zeros(most + 2, np.int32)
            packed[:n], packed[most:] = loc, (start, layer)
            write(kv.pool, jax_bank, packed)
        else:
            slots = torch.from_numpy(loc).to(kv.device, non_blocking=True)
            kv.set_kv_buffer(layer, slots, torch_bank[start : start + n])
    mine = kv.pool.gather(np.arange(config.rows))
    np.testing.assert_array_equal(numpy_pool.bits(mine), numpy_pool.bits(oracle))
    np.testing.assert_array_equal(bits(kv.kv), numpy_pool.bits(oracle).view(np.uint8).reshape(-1))
    kv.close()
    return steps


def fresh_pool(kind: type[KVCache], layers: int, slots: int) -> KVCache:
    """A pool to time: MLA rows of 512 + 64, or 8 heads of 128, in bfloat16."""
    sizes: dict[str, Any] = dict(size=slots, page_size=64, dtype=jnp.bfloat16, layer_num=layers)
    if kind is MLATokenToKVPool:
        return kind.create(MLAConfig(**sizes, kv_lora_rank=512, qk_rope_head_dim=64))
    if kind is MHATokenToKVPool:
        return kind.create(MHAConfig(**sizes, head_num=8, head_dim=128))
    raise ArgumentError(f"kind must be an MHA or MLA pool, got {kind.__name__}")


@functools.partial(donating)
def touch(pool: Any) -> Any:
    """The smallest donated step: one row."""
    rows = jnp.zeros((1, *pool.buffers[0].shape[2:]), jnp.bfloat16)
    return pool.set_kv_buffer(0, SLOT, rows, rows)
