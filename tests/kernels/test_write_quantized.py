"""Quantising writes: against NumPy and ml_dtypes, in jnp and as interpreted Triton source."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcache.errors import ArgumentError
from jaxcache.kernels import write_quantized as quantized
from jaxcache.kernels.quantized_pool import QuantizedPool
from jaxcache.kernels.write_quantized import write_kv_fp8, write_kv_int8
from tests.kernels import conftest, oracles

N, HEADS, DIMS, SLOTS = 30, 2, (8, 5), 40
FORMATS = pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
SOURCES = pytest.mark.parametrize(
    "source", [ml_dtypes.bfloat16, np.float16, np.float32], ids=lambda d: np.dtype(d).name
)


def make(dtype, source):
    rng = np.random.default_rng()
    pools = [oracles.random_bits(rng, (2, SLOTS, HEADS, dim), dtype) for dim in DIMS]
    rows = [oracles.random_floats(rng, (N, HEADS, dim), source) for dim in DIMS]
    return rng, pools, rows, oracles.random_loc(rng, N, SLOTS)


def fp8_case(source):
    rng, pools, rows, loc = make(np.uint8, source)
    rows[0][0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    return pools, rows, [np.float32(rng.uniform(0.1, 3)), rng.uniform(0.1, 3, HEADS).astype(np.float32)], loc


def int8_case(source):
    _, payloads, rows, loc = make(np.int8, source)
    rows[0][:3, 0, :2] = [[np.inf, -1], [np.nan, 1], [-np.inf, np.nan]]
    return payloads, rows, loc


@FORMATS
@SOURCES
def test_fp8(dtype, source):
    pools, rows, scales, loc = fp8_case(source)
    before = [row.copy() for row in rows]
    got = write_kv_fp8(*map(jnp.array, pools), 1, loc, *rows, *map(np.asarray, scales), dtype=dtype)
    for pool, row, scale, result in zip(pools, rows, scales, got, strict=True):
        np.testing.assert_array_equal(result, oracles.put_rows(pool, 1, loc, oracles.fp8(row, scale, dtype)))
    assert all((oracles.bits(a) == oracles.bits(b)).all() for a, b in zip(before, rows, strict=True))


@SOURCES
def test_int8(source):
    payloads, rows, loc = int8_case(source)
    scales = [np.full(payload.shape[:3], -7, np.float32) for payload in payloads]
    pools = [QuantizedPool(jnp.array(p), jnp.array(s)) for p, s in zip(payloads, scales, strict=True)]
    got = write_kv_int8(*pools, 1, loc, *rows)
    for payload, scale, row, result in zip(payloads, scales, rows, got, strict=True):
        units, steps = oracles.int8(row)
        np.testing.assert_array_equal(result.payload, oracles.put_rows(payload, 1, loc, units))
        np.testing.assert_array_equal(result.scales, oracles.put_rows(scale, 1, loc, steps))


@pytest.fixture
def triton_kernels():
    if not conftest.INTERPRETS:
        pytest.skip("this process compiles Triton source")
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    from jaxcache.kernels import write_quantized_triton

    return write_quantized_triton


def torch_launch(kernel, arrays, num_updates, **launch):
    import torch

    from jaxcache.kernels.triton_call import torch_call

    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    torch_call(kernel, tensors, (N, 2, SLOTS), num_updates=num_updates, **launch)
    return [tensor.numpy() for tensor in tensors[:num_updates]]


@FORMATS
def test_fp8_triton_source(dtype, triton_kernels):
    pools, rows, scales, loc = fp8_case(np.float32)
    launch = triton_kernels.fp8_launch(N, HEADS, *DIMS, 4, np.dtype(dtype), False)
    arrays = (*pools, np.int32([1]), loc, *rows, scales[0].reshape(1), scales[1])
    got = torch_launch(triton_kernels.write_kv_fp8_kernel, arrays, 2, **launch, K_PER_HEAD=False, V_PER_HEAD=True)
    for pool, row, scale, result in zip(pools, rows, scales, got, strict=True):
        np.testing.assert_array_equal(result, oracles.put_rows(pool, 1, loc, oracles.fp8(row, scale, dtype)))


def test_int8_triton_source(triton_kernels):
    payloads, rows, loc = int8_case(np.float32)
    scales = [np.full(payload.shape[:3], -7, np.float32) for payload in payloads]
    arrays = (payloads[0], scales[0], payloads[1], scales[1], np.int32([1]), loc, *rows)
    launch = triton_kernels.int8_launch(N, HEADS, *DIMS, 4)
    got = torch_launch(triton_kernels.write_kv_int8_kernel, arrays, 4, **launch)
    for i, row in enumerate(rows):
        units, steps = oracles.int8(row)
        np.testing.assert_array_equal(got[2 * i], oracles.put_rows(payloads[i], 1, loc, units))
        np.testing.assert_array_equal(got[2 * i + 1], oracles.put_rows(scales[i], 1, loc, steps))


def test_ties_go_to_even_and_large_numbers_saturate():
    rows = np.array([[[17, 19, 449, 1e30, 2**-10, 3 * 2**-10, -(2**-10)]]], np.float32)
    codes = quantized.quantize_fp8(rows, np.float32(1), jnp.float8_e4m3fn)
    values = np.asarray(codes).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert values.ravel().tolist() == [16, 20, 448, 448, 0, 2**-8, 0]
    payload, scales = quantized.quantize_int8(np.array([[127, 0.5, 1.5, -2.5, 0]], np.float32))
    assert payload.tolist() == [[127, 0, 2, -2, 0]] and scales.tolist() == [1.0]


def test_the_reciprocal_is_correctly_rounded_even_where_division_is_not(monkeypatch):
    x = np.exp2(np.random.default_rng().uniform(-100, 100, 20_000)).astype(np.float32)
    x[:200] = np.exp2(np.arange(-100, 100, dtype=np.float32))
    want = np.float32(1) / x
    np.testing.assert_array_equal(quantized.reciprocal(jnp.asarray(x)), want)

    class Inexact:
        """Divides two last places off, as a GPU may."""

        def __init__(self, places):
            self.places = places

        def __rtruediv__(self, one):
            return (want.view(np.int32) + self.places).view(np.float32)

    real = jax.lax.bitcast_convert_type
    for places in (-2, -1, 1, 2):
        inexact = Inexact(places)
        monkeypatch.setattr(jax.lax, "bitcast_convert_type", lambda v, d, i=inexact: real(x if v is i else v, d))
        got = quantized.reciprocal(inexact)  # pyright: ignore[reportArgumentType]
        monkeypatch.undo()
        plain = np.log2(x) % 1 != 0  # one last place below a power of two is half as wide
        np.testing.assert_array_equal(np.asarray(got)[plain], want[plain])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": jnp.zeros((3, 2, 4), jnp.int32)}, "k must be bfloat16, float16 or float32"),
        ({"v": jnp.zeros((3, 2, 4))}, "v must have shape"),
        ({"k_scale": jnp.zeros(3)}, "k_scale must be float32, a scalar or one for each of 2 heads"),
        ({"v_scale": jnp.zeros((), jnp.int32)}, "v_scale must be float32"),
        ({"dtype": None}, "k_pool must be float8_e4m3fn or float8_e5m2, or uint8 with dtype="),
        ({"dtype": jnp.int8}, "k_pool must be float8"),
        ({"layer": 2}, "layer must be in"),
    ],
)
def test_fp8_refuses(change, named):
    good = {
        "k_pool": jnp.zeros((2, 8, 2, 4), jnp.uint8), "v_pool": jnp.zeros((2, 8, 2, 6), jnp.uint8), "layer": 0,
        "loc": jnp.zeros(3, jnp.int32), "k": jnp.zeros((3, 2, 4)), "v": jnp.zeros((3, 2, 6)),
        "k_scale": jnp.ones(()), "v_scale": jnp.ones(2), "dtype": jnp.float8_e5m2,
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=named):
        write_kv_fp8(**{**good, **change})


def test_int8_refuses():
    pool = QuantizedPool(jnp.zeros((2, 8, 2, 4), jnp.int8), jnp.zeros((2, 8, 2)))
    write = partial(write_kv_int8, layer=0, loc=jnp.zeros(3, jnp.int32), k=jnp.zeros((3, 2, 4)), v=jnp.zeros((3, 2, 4)))
    with pytest.raises(ArgumentError, match="k_pool must be int8 with float32 scales"):
        write(pool._replace(payload=jnp.zeros((2, 8, 2, 4), jnp.uint8)), pool)
    with pytest.raises(ArgumentError, match=r"v_pool\.scales must have shape"):
        write(pool, pool._replace(scales=jnp.zeros((2, 8))))
