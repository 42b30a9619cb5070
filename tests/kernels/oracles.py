"""What the ops must do, in plain Python and NumPy, written from the specification. Slow on purpose."""

import jax
import ml_dtypes
import numpy as np

STORAGE_DTYPES = [np.float32, np.float16, np.uint16, np.uint8, np.int8]
"""What a pool may be made of here. XLA:CPU moves bfloat16 and float8 as float32, which changes the bits of NaNs, so a
CPU pool holds unsigned integers instead."""
if jax.default_backend() == "gpu":
    STORAGE_DTYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def extend(prefix_lens, seq_lens, last_loc, new_pages, page_size: int, num_tokens: int) -> np.ndarray:
    """The three-part rule: tail of the old page, whole new pages, partial last page. A missing page gives slot 0."""
    pages = [int(page) for page in new_pages]
    out: list[int] = []

    def slots_of(page: int, count: int) -> list[int]:
        return [page * page_size + j if page else 0 for j in range(count)]

    for p, s, last in zip(map(int, prefix_lens), map(int, seq_lens), map(int, last_loc), strict=True):
        tail = min(s, ceil_div(p, page_size) * page_size) - p
        out += [last + 1 + k for k in range(tail)]
        left = s - p - tail
        while left > 0:
            page = pages.pop(0) if pages else 0
            out += slots_of(page, min(left, page_size))
            left -= page_size
    assert len(out) <= num_tokens
    return np.array(out + [0] * (num_tokens - len(out)), np.int32)


def decode(seq_lens, last_loc, new_pages, page_size: int) -> np.ndarray:
    pages = [int(page) for page in new_pages]
    out = []
    for s, last in zip(map(int, seq_lens), map(int, last_loc), strict=True):
        if s == 0:
            out.append(0)
        elif (s - 1) % page_size == 0:
            out.append(pages.pop(0) * page_size if pages else 0)
        else:
            out.append(last + 1)
    return np.array(out, np.int32)


def random_batch(rng: np.random.Generator, bs: int, page_size: int, max_len: int, *, decode: bool = False):
    """A legal batch: prefix_lens, seq_lens, last_loc and exactly the pages it needs (shuffled, never page 0)."""
    prefix = rng.integers(0, max_len, bs)
    grow = rng.integers(0, max_len, bs) * rng.integers(0, 2, bs)  # about half the rows are padding
    seq = prefix + (1 if decode else grow)
    old_pages = 1 + rng.permutation(10 * bs)[:bs]
    last = np.where(prefix > 0, old_pages * page_size + (prefix - 1) % page_size, -1)
    need = int(sum(ceil_div(int(s), page_size) - ceil_div(int(p), page_size) for p, s in zip(prefix, seq, strict=True)))
    pages = 10 * bs + 1 + rng.permutation(need)
    return tuple(np.asarray(x, np.int32) for x in (prefix, seq, last, pages))


def put_rows(pool: np.ndarray, layer: int, loc, rows: np.ndarray) -> np.ndarray:
    """`pool` with the rows at their slots; the sink and what lies outside the pool stay as they are."""
    pool = pool.copy()
    for slot, row in zip(map(int, loc), rows, strict=True):
        if 0 < slot < pool.shape[1] and 0 <= layer < pool.shape[0]:
            pool[layer, slot] = row
    return pool


def random_loc(rng: np.random.Generator, n: int, slots: int) -> np.ndarray:
    """Distinct slots, with sink slots and slots outside the pool (both sides) strewn in."""
    loc = 1 + rng.permutation(max(n, slots - 1))[:n]  # some are >= slots when n is large
    loc = np.where(rng.random(n) < 0.2, 0, loc)
    outside = rng.choice([-1, -slots, -(2**31), slots, slots + 7, 2**31 - 1], n)
    return np.where(rng.random(n) < 0.2, outside, loc).astype(np.int32)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Poison: every bit pattern of `dtype`, NaNs with payloads included."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(shape)


def bits(array) -> np.ndarray:
    """The bytes of an array, for comparisons that must not trust floating-point equality."""
    return np.ascontiguousarray(np.asarray(array)).view(np.uint8)


def gather_pages(pool: np.ndarray, pages, page_size: int) -> np.ndarray:
    """One block a page; pages that are not there are zeros."""
    by_page = pool.reshape(pool.shape[0], -1, page_size, *pool.shape[2:])
    blocks = np.zeros((len(pages), pool.shape[0], *by_page.shape[2:]), pool.dtype)
    for block, page in zip(blocks, map(int, pages), strict=True):
        if 0 < page < by_page.shape[1]:
            block[...] = by_page[:, page]
    return blocks


def scatter_pages(pool: np.ndarray, pages, blocks: np.ndarray, page_size: int) -> np.ndarray:
    by_page = pool.reshape(pool.shape[0], -1, page_size, *pool.shape[2:]).copy()
    for block, page in zip(blocks, map(int, pages), strict=True):
        if 0 < page < by_page.shape[1]:
            by_page[:, page] = block
    return by_page.reshape(pool.shape)


def move_rows(pool: np.ndarray, tgt, src) -> np.ndarray:
    """All rows are read before any is written."""
    out = pool.copy()
    out[:, np.asarray(tgt)] = pool[:, np.asarray(src)]
    return out


def fp8(rows: np.ndarray, scale, dtype) -> np.ndarray:
    """Bytes of `rows * (1 / scale)`, saturated; the rounding is ml_dtypes'."""
    factor = np.float32(1) / np.asarray(scale, np.float32)
    x = rows.astype(np.float32) * (factor[:, None] if factor.ndim else factor)
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.where(np.isnan(x), np.uint8(0x7F), np.clip(x, -largest, largest).astype(dtype).view(np.uint8))


def int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Payload, and a scale for each head of each row; of a head with a NaN, payload 0 and scale NaN."""
    largest = np.finfo(np.float32).max
    x = np.clip(rows.astype(np.float32), -largest, largest)
    scale = np.abs(x).max(-1) * np.float32(1 / 127)
    factor = np.float32(1) / np.where(scale > 0, scale, np.float32(1))
    units = np.clip(np.round(x * factor[..., None]), -127, 127)
    return np.where(np.isnan(scale)[..., None], 0, units).astype(np.int8), scale


def random_floats(rng: np.random.Generator, shape: tuple[int, ...], dtype, decades: float = 3) -> np.ndarray:
    """Numbers of many sizes, some of them zero, with heads of zeros among them."""
    size = 10.0 ** rng.uniform(-decades, decades, (*shape[:-1], 1))
    x = rng.standard_normal(shape) * size * (rng.random(shape) > 0.1) * (rng.random((*shape[:-1], 1)) > 0.1)
    return x.astype(np.float32).astype(dtype)


FLOAT8_DTYPES = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def float8_edges(dtype) -> np.ndarray:
    """What a cast to float8 may do wrong, float32 `(128,)`: where it overflows, where it rounds, no numbers."""
    largest = float(ml_dtypes.finfo(dtype).max)
    steps = np.array([1, 1.03, 1.04, 1.07, 1.08, 1.12, 1.13, 2, 1e3, 1e30], np.float32) * np.float32(largest)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal) * np.float32([0.4, 0.5, 0.6, 1, 1.5, 2.5])
    edges = np.concatenate([steps, tiny, np.float32([0, 17, 19, 500, 3.3e38, np.inf, np.nan])]).astype(np.float32)
    return np.resize(np.concatenate([edges, -edges]), 128)


def saturated(rows: np.ndarray, dtype) -> np.ndarray:
    """Rows in a float8 format: the nearest number, or the largest one where it is too large; a NaN is a NaN."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(rows.astype(np.float32), -largest, largest).astype(dtype)


def assert_same_float8(got, want: np.ndarray) -> None:
    """The same bits; of a NaN, which has several, that it is one."""
    got = np.asarray(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    is_nan = np.isnan(want.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(np.where(is_nan, 0, bits(got)), np.where(is_nan, 0, bits(want)))
