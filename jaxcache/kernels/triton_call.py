"""Launches a Triton kernel from JAX through whichever jax-triton is installed.

What differs between its versions, and what a kernel must look like to run under all of them and from PyTorch:

| jax-triton | an array updated in place is | its kernel gets |
|---|---|---|
| 0.3.x | an input aliased with an output | the input pointer and, after all inputs, the same address as an output |
| 0.4 and newer | a `jax.Ref` | the input pointer only |

PyTorch passes a tensor. So the parameters of our kernels stand in this order: arrays, scalars, one `*_alias` per
updated array, the outputs, constexprs. A kernel reads and writes through the input pointer; the `*_alias` parameters
are never used, and are None except under 0.3.x.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import jax

from jaxcache.errors import UnsupportedError
from jaxcache.kernels.dispatch import abstract_target

if TYPE_CHECKING:
    from jaxcache.kernels.arguments import AnyArray


_FFI_TARGET = "triton_kernel_call_ffi"


def triton_call(
    kernel: Any,
    arrays: Sequence[AnyArray],
    scalars: Sequence[int] = (),
    *,
    updates: Mapping[int, str] = MappingProxyType({}),
    outputs: Sequence[jax.ShapeDtypeStruct] = (),
    grid: tuple[int, ...],
    num_warps: int = 4,
    **constexprs: Any,
) -> tuple[jax.Array, ...]:
    """Calls `kernel` inside a traced function.

    Args:
      kernel: A `triton.jit` function with its parameters in the order described above.
      arrays: Array arguments.
      scalars: Integer arguments, part of the compiled call: they must be static.
      updates: Which of `arrays` the kernel updates in place: its index, and the name of its `*_alias` parameter. Inside
        a jitted step this costs no copy when the step owns the array (donated, or a loop carry).
      outputs: Shapes and dtypes of fresh outputs.
      grid: Programs to launch along each axis.
      num_warps: Warps a program.
      **constexprs: Compile-time arguments of the kernel.

    Returns:
      The updated arrays in the order of `updates`, then the outputs.
    """
    jax_triton = _import_jax_triton()
    arrays = [jax.numpy.asarray(array) for array in arrays]
    options = dict(
        kernel=kernel, grid=grid, num_warps=num_warps, compute_capability=_compute_capability(), **constexprs
    )
    if jax_triton.__version_info__ < (0, 4):
        updated = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in updates]
        aliases = {operand: output for output, operand in enumerate(updates)}
        call = _call_through_ffi if jax.__version_info__ >= (0, 11) else _call_directly
        return tuple(call(jax_triton, arrays, scalars, [*updated, *outputs], aliases, options))
    refs = {i: jax.new_ref(arrays[i]) for i in updates}
    operands = [refs.get(i, array) for i, array in enumerate(arrays)]
    unused = dict.fromkeys(updates.values())
    results = jax_triton.triton_call(*operands, *scalars, out_type=list(outputs), **unused, **options)
    return (*(jax.freeze(ref) for ref in refs.values()), *results)


def torch_call(
    kernel: Any,
    arrays: Sequence[Any],
    scalars: Sequence[int] = (),
    *,
    num_updates: int = 0,
    outputs: Sequence[Any] = (),
    grid: tuple[int, ...],
    num_warps: int = 4,
    **constexprs: Any,
) -> None:
    """Calls the same kernel on PyTorch tensors, on PyTorch's current stream. Updates and outputs are written in place.

    Args are those of `triton_call`, but that `num_updates` counts the `*_alias` parameters and `outputs` are tensors.
    """
    kernel[grid](*arrays, *scalars, *[None] * num_updates, *outputs, num_warps=num_warps, **constexprs)


def _call_directly(
    jax_triton: ModuleType, arrays: list, scalars: Sequence[int], results: list, aliases: dict[int, int], options: dict
) -> Sequence[jax.Array]:
    """The call of jax-triton 0.3 as it is meant. XLA launches such a kernel from the host each time, 5 us apart."""
    return jax_triton.triton_call(*arrays, *scalars, out_shape=results, input_output_aliases=aliases, **options)


def _call_through_ffi(
    jax_triton: ModuleType, arrays: list, scalars: Sequence[int], results: list, aliases: dict[int, int], options: dict
) -> Sequence[jax.Array]:
    """The same kernel through the entry point of jax-triton 0.4, which jaxlib 0.11 has.

    XLA records calls of this one in a CUDA graph: the launches of a step follow one another within a tenth of a us.
    """
    from jax.core import ShapedArray
    from jaxlib import gpu_triton

    lib = jax_triton.triton_lib
    kernel, grid, num_warps, capability, constexprs = _split(options)
    abstract = [jax.typeof(array) for array in arrays]
    produced = [ShapedArray(result.shape, result.dtype) for result in results]
    arguments = [*abstract, *scalars, *produced]
    kinds = [lib.get_triton_type(argument) for argument in arguments]
    numbers = {len(arrays) + i: int(value) for i, value in enumerate(scalars)}
    unaligned = [i for i, array in enumerate(arguments) if i not in numbers and not is_aligned(array)]
    compiled, attributes = lib.get_or_create_triton_kernel(
        lib.get_cuda_backend,
        "cuda",
        kernel,
        kinds,
        # To this function, numbers are what Triton may not take for divisible by 16, and that alone.
        [(i, kinds[i], value) for i, value in numbers.items()] + [(i, kinds[i], 0) for i in unaligned],
        num_warps=num_warps,
        num_stages=None,
        num_ctas=1,
        compute_capability=capability,
        enable_fp_fusion=True,
        metaparams=constexprs,
        dump=False,
    )
    parameters = []
    for i, kind in enumerate(kinds):
        if i not in numbers:
            aligned = ["tt.divisibility", 16] in attributes[(i,)]
            parameters.append(gpu_triton.create_array_parameter(0, 16 if aligned else 0))
        elif numbers[i] != 1:  # Triton makes a 1 part of the kernel
            parameters.append(gpu_triton.create_scalar_parameter(numbers[i], kind))
    call = gpu_triton.TritonKernelCall(compiled, *grid, *[1] * (3 - len(grid)), parameters)
    opaque = zlib.compress(call.to_proto(kernel.__name__, b""))
    return jax.ffi.ffi_call(_FFI_TARGET, results, input_output_aliases=aliases)(*arrays, opaque=opaque)


def is_aligned(array: Any) -> bool:
    """Whether an array's address is surely divisible by 16.

    XLA gives a kernel what is cut out of a larger array, or put into one, where it lies, without a copy: the slots of
    one step of a loop of one request are 4 bytes further on than those of the step before. A cut lies between rows of
    the last axis.
    """
    return array.ndim > 1 and array.shape[-1] * array.dtype.itemsize % 16 == 0


def _split(options: dict) -> tuple[Any, tuple[int, ...], int, int | None, dict]:
    constexprs = dict(options)
    named = [constexprs.pop(name) for name in ("kernel", "grid", "num_warps", "compute_capability")]
    return (*named, constexprs)


def _import_jax_triton() -> ModuleType:
    """jax-triton without its side effect: it changes TRITON_CACHE_DIR, and 0.3 so that PyTorch can launch no kernel."""
    before = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before
    else:
        os.environ.pop("TRITON_CACHE_DIR", None)
    return jax_triton


def _compute_capability() -> int | None:
    """What to compile for: None lets jax-triton ask the GPU. Where there is none, the abstract device's name tells."""
    target = abstract_target()
    if target is None or jax.default_backend() == "gpu":
        return None
    capability = target.compute_capability()
    if capability is None:
        raise UnsupportedError(f"abstract device {target.device_kind!r} has no known compute capability")
    return capability
