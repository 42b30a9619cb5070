"""How the attention kernels are launched: block sizes, warps, stages, programs. Measured on an H200.

Smaller GPUs have less shared memory; there a kernel keeps fewer blocks in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxcache.kernels.dispatch import Implementation

SHARED_BYTES = {80: 160 * 1024, 90: 224 * 1024, 100: 224 * 1024}
"""Shared memory of a program, by compute capability; others have `SMALL_SHARED_BYTES`."""
SMALL_SHARED_BYTES = 96 * 1024
PROGRAMS = 528
"""Programs that keep an H200 busy: four a multiprocessor."""
WGMMA_ROWS = 64
"""Rows of a wgmma: query heads of a program of the Mosaic decode, tokens of a tile of the Mosaic extend."""
WGMMA_LATENTS, WGMMA_KEYS = 128, 128
"""Tokens a step of the Mosaic kernels of `mla_decode` and `paged_extend`."""
HOPPER_PROGRAMS = 132
"""Multiprocessors of an H200: a Mosaic program fills one."""
TILE_ROWS = 128
"""Rows of queries of an extend tile: tokens by query heads of one KV head."""


@dataclass(frozen=True)
class DecodeLaunch:
    """One launch of a decode kernel.

    Attributes:
      block: Keys a step of its loop.
      programs: Programs for each KV head (each block of query heads, for latent rows), all running at once.
      warps: Warps a program.
      stages: Stages of the loop; page ids are loaded first, so `n` stages keep `(n - 1) // 2` blocks in flight.
      heads: Query heads a program, for latent rows.
      implementation: Whose launch it is.
    """

    block: int
    programs: int
    warps: int
    stages: int
    heads: int = 0
    implementation: Implementation = Implementation.TRITON


@dataclass(frozen=True)
class ExtendLaunch:
    """One launch of an extend kernel.

    Attributes:
      tokens: Tokens a tile.
      block: Keys a step of its loop.
      warps: Warps a program.
      stages: Stages of the loop.
      heads: Query heads a program, for latent rows.
      implementation: Whose launch it is.
    """

    tokens: int
    block: int
    warps: int
    stages: int
    heads: int = 0
    implementation: Implementation = Implementation.TRITON


@dataclass(frozen=True)
class Launches:
    """How the ops of one plan are launched; part of the compiled step.

    Attributes:
      decode: Of the decode op; its block is the unit of balance, so that the plan depends on it.
      shared: Of the decode op over a prefix that `members` requests attend to together.
      extend: Of the extend op; its tile is part of the plan, likewise.
      members: Requests whose queries stand in one block of rows of `shared`.
    """

    decode: DecodeLaunch
    shared: DecodeLaunch
    extend: ExtendLaunch
    members: int


def heads_launches(
    requests: int,
    heads: int,
    group: int,
    width: int,
    itemsize: int,
    capability: int | None = 90,
    extend_by: Implementation = Implementation.TRITON,
) -> Launches:
    """For keys and values of `width` elements together, in `heads` KV heads with `group` query heads each.

    `capability` is ten times the compute capability of the GPU; None is an unknown one. `extend_by` is whose extend the
    plan is for.
    """
    room = SHARED_BYTES.get(capability or 0, SMALL_SHARED_BYTES)
    rows, row_bytes = power_of_two(group), width * itemsize
    is_large = row_bytes > 512 or rows > 16
    if heads == 1 or is_large:
        block = 64 if row_bytes <= 512 else 32
        decode = DecodeLaunch(block, max(PROGRAMS // 2 // heads, 1), 4, _stages(block * row_bytes, 2, room // 2))
    elif requests <= 8 and itemsize == 2:
        decode = DecodeLaunch(64, max(PROGRAMS // 2 // heads, 1), 2, _stages(64 * row_bytes, 2, room // 2))
    else:
        busy = PROGRAMS if requests > 8 else PROGRAMS // 2
        decode = DecodeLaunch(32, max(busy // heads, 1), 1, _stages(32 * row_bytes, 3, room // 2))
    tile = TILE_ROWS if row_bytes <= 512 and room > SMALL_SHARED_BYTES else TILE_ROWS // 2
    if itemsize == 4:  # multiplied without tensor cores, in registers
        tile = TILE_ROWS // 8
    block = 64 if row_bytes <= (1024 if room > SMALL_SHARED_BYTES else 512) else 32
    warps, stages = max(tile // 16, 4), _stages(block * row_bytes, 2, room - 2 * tile * max(row_bytes, width * 2))
    shared = DecodeLaunch(block, max(PROGRAMS // 4 // heads, 1), warps, stages)
    extend = ExtendLaunch(max(tile // rows, 1), block, warps, stages)
    if extend_by is Implementation.MOSAIC:
        extend = ExtendLaunch(WGMMA_ROWS, WGMMA_KEYS, 4, 2, implementation=extend_by)
    return Launches(decode, shared, extend, members=max(tile // rows, 1))


def latent_launches(
    requests: int,
    heads: int,
    width: int,
    itemsize: int,
    capability: int | None = 90,
    decode_by: Implementation = Implementation.TRITON,
) -> Launches:
    """For latent rows of `width` elements and `heads` query heads. `capability` as for `heads_launches`.

    `decode_by` is whose decode the plan is for.
    """
    room = SHARED_BYTES.get(capability or 0, SMALL_SHARED_BYTES)
    is_small = capability not in (80, 90) or width * itemsize > 1536  # on sm100 wide tiles need more than there is
    rows = max(power_of_two(min(heads, 16 if is_small else 64)), 16)
    blocks, row_bytes = -(-heads // rows), width * itemsize
    block = 16 if is_small else 64
    stages = 2 if rows == 64 else 3  # 64 rows of queries leave no registers for a third
    wide = DecodeLaunch(block, max(PROGRAMS // 4 // blocks, 1), 4 if is_small else 8, stages, rows)
    decode = wide
    if rows <= 16 and requests > 8 and not is_small:
        decode = DecodeLaunch(32, PROGRAMS // 2, 4, _stages(32 * row_bytes, 2, room // 2), rows)
        if itemsize == 1:
            decode = DecodeLaunch(64, PROGRAMS // 2, 4, 3, rows)
    if decode_by is Implementation.MOSAIC:
        programs = max(HOPPER_PROGRAMS // (heads // WGMMA_ROWS), 1)
        decode = DecodeLaunch(WGMMA_LATENTS, programs, 4, 2, WGMMA_ROWS, decode_by)
    tile = 16 if is_small else 64
    extend = ExtendLaunch(max(tile // rows, 1), block, wide.warps, 3, rows)
    return Launches(decode, wide, extend, members=max(tile // rows, 1))


def takes_pairs(dtype: np.dtype, query_rows: int, *widths: int) -> bool:
    """Whether 8-bit rows, of parts that wide, are read as pairs of numbers (`half` in `common_triton`).

    That is for products whose right side goes through registers: those of fewer than 64 rows of queries. Half of a part
    has to be as wide as a tensor core takes, 16.
    """
    fits = all(width == 0 or (width % 2 == 0 and power_of_two(width) >= 32) for width in widths)
    return dtype.itemsize == 1 and query_rows < 64 and fits


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def _stages(block_bytes: int, buffers: int, room: int) -> int:
    """Stages of a loop that keeps `buffers` blocks in flight, or as many as shared memory has room for."""
    return 2 * max(min(buffers, room // block_bytes), 1) + 1
