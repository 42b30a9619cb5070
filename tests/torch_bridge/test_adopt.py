"""adopt: torch's memory in JAX's hands, or why not."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxcache import ArgumentError, UnsupportedError
from tests.pools import numpy_pool
from tests.torch_bridge.tensors import ON_GPU
from torch_bridge import adopt, adopt_pool, borrow
from torch_bridge.dtypes import JAX_DTYPES

on_cpu = pytest.mark.skipif(ON_GPU, reason="what JAX does on a CPU")


def tensor_of(shape, dtype=torch.float32) -> torch.Tensor:
    """Bytes that count up, wherever they are no NaN."""
    size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    return (torch.arange(size) % 64).to(torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("dtype", JAX_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 16, 4), (1, 64, 8, 2), (0,), (4, 0, 8)], ids=str)
def test_one_address_in_every_dtype_and_shape(dtype, shape):
    tensor = tensor_of(shape, dtype) if shape else tensor_of((1,), dtype)[0].clone()
    array = adopt(tensor)
    assert (array.shape, array.dtype) == (shape, JAX_DTYPES[dtype])
    assert array.size == 0 or array.unsafe_buffer_pointer() == tensor.data_ptr()
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    np.testing.assert_array_equal(np.asarray(array).reshape(-1).view(np.uint8), flat.cpu().numpy())


def test_parts_that_are_contiguous_and_aligned_are_adopted_where_they_are():
    pool = tensor_of((3, 32, 2, 8))
    layer, pages, page = pool[1], pool.view(3, 8, 4, 2, 8), pool[2, 4:8]
    for part in (layer, pages, page):
        assert adopt(part).unsafe_buffer_pointer() == part.data_ptr()


def test_both_frameworks_see_the_same_bytes():
    tensor = torch.zeros(64)
    array = adopt(tensor)
    tensor[3] = 5
    assert jnp.sum(array) == 5


def test_the_memory_outlives_the_tensor():
    tensor = torch.full((1 << 16,), 3.0)
    array = adopt(tensor)
    del tensor
    gc.collect()
    churn = [torch.zeros(1 << 16) for _ in range(50)]
    assert (array == 3).all()
    del churn


def test_the_tensor_outlives_the_array():
    tensor = torch.full((1 << 16,), 3.0)
    adopt(tensor)
    gc.collect()
    churn = [jnp.zeros(1 << 16) for _ in range(50)]
    assert (tensor == 3).all()
    del churn


# What is refused.

REFUSED = {
    "strided": (lambda: torch.zeros(8, 8)[:, ::2], r"must be contiguous.*got strides \(8, 2\) for shape \(8, 4\)"),
    "transposed": (lambda: torch.zeros(4, 8).t(), "must be contiguous"),
    "expanded": (lambda: torch.zeros(1, 8).expand(4, 8), "must be contiguous"),
    "misaligned": (
        lambda: torch.zeros(65)[1:],
        f"multiple of {16 if ON_GPU else 64} bytes.*an address 4 bytes past one",
    ),
    "meta device": (lambda: torch.zeros(8, device="meta"), "CPU or an NVIDIA GPU.*got meta"),
    "float4": (lambda: torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "JAX and torch share.*float4"),
    "float64": (lambda: torch.zeros(8, dtype=torch.float64), "JAX and torch share.*got torch.float64"),
    "bool": (lambda: torch.zeros(8, dtype=torch.bool), "JAX and torch share"),
    "complex": (lambda: torch.zeros(8, dtype=torch.complex64), "JAX and torch share"),
    "sparse": (lambda: torch.zeros(8, 8).to_sparse(), "must be dense"),
    "gradient": (lambda: torch.zeros(8, requires_grad=True), "must not require a gradient; use .detach"),
    "negated": (lambda: torch.zeros(8, dtype=torch.complex64).conj().imag, "lazily conjugated or negated"),
    "NumPy array": (lambda: np.zeros(8), "must be a torch tensor, got ndarray"),
    "JAX array": (lambda: jnp.zeros(8), "must be a torch tensor"),
    "list": (lambda: [1, 2], "must be a torch tensor, got list"),
    "slots beyond int32": (lambda: torch.tensor([1, 2**31]), r"must fit int32, got values in \[1, 2147483648\]"),
    "slots of two dimensions": (lambda: torch.zeros(2, 2, dtype=torch.int64), "must be one-dimensional"),
}


@pytest.mark.parametrize(("make", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_adopted_says_why(make, match):
    with pytest.raises(ArgumentError, match=match):
        adopt(make())


@on_cpu
def test_a_device_that_jax_does_not_use_is_refused():
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 0)  # a CPU build of torch makes no real one

    with pytest.raises(ArgumentError, match="a device that JAX uses"):
        adopt(torch.zeros(8).as_subclass(Elsewhere))


@on_cpu
def test_a_view_of_a_pool_is_refused():
    pool = numpy_pool.make_pool(numpy_pool.mha_config())
    with borrow(pool) as kv, pytest.raises(ArgumentError, match="a view of a pool, which JAX has already"):
        adopt(kv.k)


@on_cpu
def test_donating_torchs_memory_is_refused_on_a_cpu():
    with pytest.raises(UnsupportedError, match="JAX copies memory that it does not own"):
        adopt(torch.zeros(16), donatable=True)


@on_cpu
def test_what_would_happen_without_the_refusal():
    """The reason for it: JAX says nothing, and torch does not see the update."""
    tensor = torch.zeros(64)
    new = jax.jit(lambda array: array + 1, donate_argnums=0)(adopt(tensor))
    assert new.sum() == 64 and tensor.sum() == 0


# Slots.


@pytest.mark.parametrize("slots", [[], [0], [5, 2**31 - 1, -1, 0]], ids=str)
def test_slots_become_int32(slots):
    array = adopt(torch.tensor(slots, dtype=torch.int64))
    assert isinstance(array, jax.Array)
    assert array.dtype == jnp.int32 and array.tolist() == slots


def test_slots_that_are_int32_are_adopted_as_they_are():
    slots = torch.arange(16, dtype=torch.int32)
    assert adopt(slots).unsafe_buffer_pointer() == slots.data_ptr()


def test_slots_cannot_be_donated():
    with pytest.raises(ArgumentError, match="donatable must be False for int64"):
        adopt(torch.zeros(4, dtype=torch.int64), donatable=True)


# Pools.


def pool_tensors(dtype=torch.bfloat16):
    return torch.zeros(3, 28, 2, 8, dtype=dtype), torch.zeros(3, 28, 2, 4, dtype=dtype)


@on_cpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn], ids=str)
def test_a_pool_in_torchs_memory_needs_a_gpu(dtype):
    tensors = pool_tensors({2: torch.bfloat16, 4: torch.float32, 1: torch.float8_e4m3fn}[jnp.dtype(dtype).itemsize])
    with pytest.raises(UnsupportedError, match="donatable=True needs a GPU"):
        adopt_pool(numpy_pool.mha_config(dtype), *tensors)


BAD_POOLS = {
    "one tensor": (lambda k, v: (k,), "tensors must be 2, one an array of the pool; got 1"),
    "another shape": (lambda k, v: (k, k), r"tensors\[1\] must have shape \(3, 28, 2, 4\)"),
    "another dtype": (lambda k, v: (k.half(), v), r"tensors\[0\] must be torch.bfloat16"),
    "no tensor": (lambda k, v: (k, np.zeros(3)), "must be a torch tensor, got ndarray"),
    "nowhere": (lambda k, v: (k.to("meta"), v), "got meta"),
}


@pytest.mark.parametrize(("change", "match"), BAD_POOLS.values(), ids=BAD_POOLS.keys())
def test_tensors_that_are_no_pool_say_why(change, match):
    with pytest.raises(ArgumentError, match=match):
        adopt_pool(numpy_pool.mha_config(jnp.bfloat16), *change(*pool_tensors()))


def test_a_sharded_pool_cannot_be_adopted():
    config = numpy_pool.mha_config(jnp.bfloat16, axis_name="tp", shards=2)
    with pytest.raises(ArgumentError, match="config must be that of a pool on one device"):
        adopt_pool(config, *pool_tensors())
