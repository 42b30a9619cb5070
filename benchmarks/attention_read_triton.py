"""A kernel that reads memory and does nothing else: what the device allows."""

import triton
import triton.language as tl

BLOCK = 16384


@triton.jit
def read_kernel(
    data,  # int32
    out,  # out (programs,) int32
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    tl.store(out + p, tl.sum(tl.load(data + p.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)), 0))
