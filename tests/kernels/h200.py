"""Compiling for an H200 on a machine that has none: XLA's own GPU compiler, with nothing to execute on.

Needs the CUDA plugin wheels of the installed JAX (`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, and
`nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink nvidia-cuda-runtime`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def missing() -> str | None:
    """What keeps this machine from compiling for an H200, or None."""
    for module in ("jax_plugins", "jax_plugins.xla_cuda13", "jax_cuda13_plugin", "jax_triton"):
        if importlib.util.find_spec(module) is None:
            return f"needs {module} to compile for a GPU"
    return None


def h200_mesh(devices: int = 1, axis_name: str = "x") -> Mesh:
    """As many H200s of one host, none of which need exist."""
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # tuning would run kernels
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=f"1x1x{devices}")
    return topologies.make_mesh(topology, (devices,), (axis_name,))


def compile_for_h200(
    step: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), mesh: Mesh | None = None
) -> jax.stages.Compiled:
    """The compiled step, for arguments given as trees of `jax.ShapeDtypeStruct`s; those without a sharding lie on every
    device of the mesh, by default that of one H200."""
    mesh = h200_mesh() if mesh is None else mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(arg: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=arg.sharding or everywhere)

    args = jax.tree.map(placed, args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(step, donate_argnums=donate).trace(*args).lower(lowering_platforms=("cuda",)).compile()
