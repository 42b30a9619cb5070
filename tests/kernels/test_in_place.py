"""The proof must pass what is in place, and must fail each way in which a pool gets copied."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxcache.errors import NotInPlaceError
from jaxcache.kernels.in_place import InPlaceReport, assert_in_place, inspect_compiled, prove_in_place

LAYERS, SLOTS, DIM, TOKENS = 8, 4096, 16, 32
POOL = jax.ShapeDtypeStruct((LAYERS, SLOTS, DIM), jnp.float32)
LOC = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
ROWS = jax.ShapeDtypeStruct((TOKENS, DIM), jnp.float32)


def write(pool, loc, rows, layer=0):
    return pool.at[layer, loc].set(rows, mode="drop")


def prove(step, *args, **kwargs) -> InPlaceReport:
    return prove_in_place(step, *(args or (POOL, LOC, ROWS)), donate_argnums=0, **kwargs)


def scan_carry(pool, loc, rows):
    return jax.lax.scan(lambda p, layer: (write(p, loc, rows, layer), None), pool, jnp.arange(LAYERS))[0]


def write_then_read(pool, loc, rows):
    new = write(pool, loc, rows)
    return new, new[1, loc]


def read_what_is_written(pool, loc, rows):
    return write(pool, loc, pool[1, loc] + rows)


@pytest.mark.parametrize("step", [write, scan_carry, write_then_read, read_what_is_written])
def test_steps_that_own_their_pool_are_in_place(step):
    report = prove(step)
    assert report.ok, report.why
    assert report.why.startswith("in place: 1 donated buffers of 2,097,152 bytes")
    assert [(b.name, b.shape, b.aliased) for b in report.buffers] == [("args[0]", POOL.shape, True)]


def scan_inputs_and_outputs(pool, loc, rows):
    return jax.lax.scan(lambda _, layer: (None, layer.at[loc].set(rows)), None, pool)[1]


def old_pool_after_the_write(pool, loc, rows):
    new = write(pool, loc, rows)
    # Which old rows are read depends on what was written: no schedule can read them first.
    return new, pool[1, new[0, loc].astype(jnp.int32)[:, 0]]


@pytest.mark.parametrize("step", [scan_inputs_and_outputs, old_pool_after_the_write])
def test_a_copy_inside_the_step_is_found(step):
    report = prove(step)
    assert not report.ok
    assert report.copies
    assert f"copies {report.copies[0]}" in report.why


def test_a_transposed_pool_is_found():
    """As copies on the CPU, as temporary memory on a GPU, which transposes in fusions."""

    def step(pool, loc, rows):
        columns = jnp.swapaxes(pool, 0, 2).reshape(DIM, SLOTS * LAYERS).at[:, loc].set(rows.T)
        return jnp.swapaxes(columns.reshape(DIM, SLOTS, LAYERS), 0, 2)

    report = prove(step)
    assert not report.ok
    assert report.copies or "temporary memory" in report.why


def test_a_pool_that_is_not_donated_is_found():
    for report in (prove_in_place(write, POOL, LOC, ROWS), prove_in_place(jax.jit(write), POOL, LOC, ROWS)):
        assert not report.ok
        assert "nothing is donated" in report.why


def test_one_pool_of_two_that_is_not_donated_is_found_by_its_copy():
    def step(k, v, loc, rows):
        return write(k, loc, rows), write(v, loc, rows)

    report = prove_in_place(step, POOL, POOL, LOC, ROWS, donate_argnums=0)
    assert not report.ok
    assert prove_in_place(step, POOL, POOL, LOC, ROWS, donate_argnums=(0, 1)).ok


def test_a_donated_pool_that_the_step_does_not_return_is_found():
    report = prove(lambda pool, loc, rows: write(pool, loc, rows)[0, loc])
    assert not report.ok
    assert "args[0] float32[8, 4096, 16] is donated, but no output takes its memory" in report.why


def test_a_donated_pool_that_the_step_does_not_use_is_found_by_name():
    def step(pools, loc, rows):
        return {"k": write(pools["k"], loc, rows)}

    report = prove(step, {"k": POOL, "v": POOL}, LOC, ROWS)
    assert {b.name: b.aliased for b in report.buffers} == {"args[0]['k']": True, "args[0]['v']": False}
    assert not report.ok


def test_an_argument_that_the_step_does_not_use_shifts_nothing():
    def step(unused, pool, loc, rows):
        return write(pool, loc, rows)

    assert prove_in_place(step, ROWS, POOL, LOC, ROWS, donate_argnums=1).ok
    both = prove_in_place(lambda a, b, loc, rows: write(b, loc, rows), POOL, POOL, LOC, ROWS, donate_argnums=(0, 1))
    assert [buffer.aliased for buffer in both.buffers] == [False, True]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only XLA:CPU rewrites a float8 pool as float32")
def test_a_pool_that_the_backend_converts_is_found_by_its_temporary_memory():
    pool, rows = (jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn) for x in (POOL, ROWS))
    report = prove(write, pool, LOC, rows)
    assert not report.ok
    assert "temporary memory" in report.why


def test_a_layer_sliced_out_and_put_back_is_found_with_a_tighter_limit():
    def step(pool, loc, rows):
        def body(pool, layer):
            new = jax.lax.dynamic_index_in_dim(pool, layer, keepdims=False).at[loc].set(rows)
            return jax.lax.dynamic_update_index_in_dim(pool, new, layer, 0), None

        return jax.lax.scan(body, pool, jnp.arange(LAYERS))[0]

    layer_bytes = SLOTS * DIM * 4
    assert not prove(step, temp_limit_bytes=layer_bytes).ok
    assert prove(scan_carry, temp_limit_bytes=layer_bytes).ok


def test_assert_in_place_raises_the_reports_words():
    assert assert_in_place(write, POOL, LOC, ROWS, donate_argnums=0).ok
    with pytest.raises(NotInPlaceError, match="not in place:\n- nothing is donated"):
        assert_in_place(write, POOL, LOC, ROWS)


def test_the_arguments_are_not_consumed():
    pool = jnp.zeros(POOL.shape)
    assert prove(write, pool, jnp.arange(TOKENS), jnp.ones(ROWS.shape)).ok
    assert not pool.is_deleted()


def test_static_and_keyword_arguments_reach_the_step():
    def step(pool, loc, rows, *, layer):
        assert type(layer) is int
        return write(pool, loc, rows, layer)

    assert prove(step, POOL, LOC, ROWS, static_argnames="layer", layer=3).ok


class Compiled:
    """A program compiled for somewhere else, in the words of XLA:GPU."""

    HEADER = (
        "HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, "
        "entry_computation_layout={(s32[], bf16[2,64,128]{2,1,0})->(bf16[2,64,128]{2,1,0})}\n"
    )

    def __init__(self, line: str):
        self.text = self.HEADER + line
        step = jax.jit(lambda layer, pool: pool + layer.astype(pool.dtype), donate_argnums=1)
        real = step.lower(jnp.int32(0), jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16)).compile()
        self.args_info, self.input_shardings, self.memory = real.args_info, real.input_shardings, real.memory_analysis()

    def as_text(self):
        return self.text

    def memory_analysis(self):
        return self.memory


@pytest.mark.parametrize(
    "line",
    [
        "  %copy.3 = bf16[2,64,128]{2,1,0} copy(%param.1)",
        '  ROOT %copy.3 = bf16[2,64,128]{2,1,0:T(8,128)} copy(bf16[2,64,128]{2,1,0} %param.1), metadata={op_name="x"}',
        "  %copy-start = (bf16[2,64,128]{2,1,0:S(5)}, bf16[2,64,128]{2,1,0}, u32[]) copy-start(%param.1)",
        "  ROOT %wrapped = f8e4m3fn[4,64,128]{2,1,0} copy(%param_0)",
        "  %half = u8[16384]{0} copy(%param_0)",
    ],
)
def test_large_copies_of_any_kind_are_read_from_the_program(line):
    report = inspect_compiled(Compiled(line), temp_limit_bytes=2**30)  # pyright: ignore[reportArgumentType]
    assert len(report.copies) == 1
    assert "copies" in report.why


@pytest.mark.parametrize(
    "line",
    [
        "  %copy.3 = bf16[2,64]{1,0} copy(%param.1)",
        "  %done = bf16[2,64,128]{2,1,0} copy-done(%copy-start)",
        "  %fusion = bf16[2,64,128]{2,1,0} fusion(%copy.3, %param.1), kind=kLoop, calls=%fused_copy",
        "  %p = pred[8]{0} copy(%q)",
        "  %t = token[] copy(%u)",
    ],
)
def test_other_instructions_are_no_large_copies(line):
    report = inspect_compiled(Compiled(line), temp_limit_bytes=2**30)  # pyright: ignore[reportArgumentType]
    assert report.ok, report.why


def test_a_donated_table_beside_a_larger_pool_is_watched_too():
    def step(pool, table, loc, rows):
        new = table.at[0].set(1)
        return write(pool, loc, rows), jax.lax.optimization_barrier(jnp.flip(new)), table.at[1].set(2).sum()

    table = jax.ShapeDtypeStruct((4, 2048), jnp.int32)
    assert not prove_in_place(step, POOL, table, LOC, ROWS, donate_argnums=(0, 1), temp_limit_bytes=2**30).ok


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxcache.kernels.in_place import prove_in_place
mesh = jax.make_mesh((4,), ("tp",))
def shaped(shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
pool = shaped((8, 4096, 8, 4), None, None, "tp")
loc, rows = shaped((32,), dtype=jnp.int32), shaped((32, 8, 4), None, "tp")
def write(pool, loc, rows):
    return pool.at[0, loc].set(rows, mode="drop")
specs = pool.sharding.spec, loc.sharding.spec, rows.sharding.spec
local = jax.shard_map(write, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
report = prove_in_place(local, pool, loc, rows, donate_argnums=0)
assert report.ok, report.why
assert report.buffers[0].shape == (8, 4096, 2, 4), report.buffers
"""


def test_a_sharded_pool_is_proven_shard_by_shard():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=flags)
