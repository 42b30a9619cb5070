"""Which implementation of an op runs here, and why.

`choose` reads a table, never the clock: GPU rows come from the measurements of `benchmarks/device.py`. An
`implementation=` argument of an op overrides it. Importing this module imports neither Triton nor jax-triton.
"""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax

from jaxcache.errors import UnsupportedError


class Op(enum.Enum):
    """The ops that have more than one implementation."""

    ALLOC_EXTEND = "alloc_extend"
    ALLOC_DECODE = "alloc_decode"
    WRITE_KV = "write_kv"
    WRITE_MLA_KV = "write_mla_kv"


class Implementation(enum.Enum):
    """How an op is carried out."""

    REFERENCE = "reference"
    """Plain `jax.numpy`: runs everywhere and is the oracle of the others."""
    TRITON = "triton"
    """A Triton kernel launched through jax-triton: NVIDIA GPUs."""


@dataclass(frozen=True)
class Choice:
    """An implementation and the sentence that explains it."""

    implementation: Implementation
    why: str


@dataclass(frozen=True)
class Target:
    """The kind of device that a trace is for. `device_kind` is JAX's, such as "NVIDIA H200"."""

    platform: str
    device_kind: str


_GPU_TABLE: Mapping[Op, Implementation] = MappingProxyType(
    {
        Op.ALLOC_EXTEND: Implementation.TRITON,
        Op.ALLOC_DECODE: Implementation.TRITON,
        Op.WRITE_KV: Implementation.TRITON,
        Op.WRITE_MLA_KV: Implementation.TRITON,
    }
)


def current_target() -> Target:
    """The device that a function traced now will run on.

    In this order: `abstract_target()`, JAX's default device, the default backend. JAX keys its traces by all three, so
    a cached trace never carries another target's choice.
    """
    abstract = abstract_target()
    if abstract is not None:
        return abstract
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]
    return Target(device.platform, device.device_kind)


def abstract_target() -> Target | None:
    """The abstract device of the mesh in use: how to compile for a GPU on a machine that has none.

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)): ...
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform is None:
        return None
    return Target(device.platform, device.device_kind)


def choose(op: Op, *, platform: str | None = None, implementation: Implementation | None = None) -> Choice:
    """Picks the implementation of `op`.

    Args:
      op: The op.
      platform: "cpu", "gpu" ("cuda" is the same) or "tpu"; by default the platform of `current_target()`.
      implementation: What the caller insists on, or None for the table's choice.

    Raises:
      UnsupportedError: if the caller insists on an implementation that cannot run on `platform`.
    """
    if platform is None:
        platform = current_target().platform
    missing = _missing_for_triton(platform)
    if implementation is Implementation.TRITON and missing:
        raise UnsupportedError(
            f"implementation=TRITON of {op.value} cannot run: {missing}. Leave implementation=None for the reference."
        )
    if implementation is not None:
        return Choice(implementation, "the caller asked for it")
    wanted = _GPU_TABLE[op] if platform in ("gpu", "cuda") else Implementation.REFERENCE
    if wanted is Implementation.TRITON and missing:
        return Choice(Implementation.REFERENCE, missing)
    return Choice(wanted, f"the table's choice for {op.value} on {platform}")


def _missing_for_triton(platform: str) -> str | None:
    """Why Triton kernels cannot run on `platform`, or None if they can."""
    if platform not in ("gpu", "cuda"):
        return f"Triton kernels need an NVIDIA GPU, and the platform is {platform!r}"
    for module, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(module) is None:
            return f"Triton kernels need the package {package!r}, which is not installed"
    return None
