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

GPU_PLATFORMS = ("gpu", "cuda")


class Op(enum.Enum):
    """The ops that have more than one implementation."""

    ALLOC_EXTEND = "alloc_extend"
    ALLOC_DECODE = "alloc_decode"
    WRITE_KV = "write_kv"
    WRITE_MLA_KV = "write_mla_kv"
    WRITE_KV_FP8 = "write_kv_fp8"
    WRITE_KV_INT8 = "write_kv_int8"
    MOVE_ROWS = "move_rows"
    GATHER_PAGES = "gather_pages"
    SCATTER_PAGES = "scatter_pages"
    PAGED_DECODE = "paged_decode"
    PAGED_EXTEND = "paged_extend"
    MLA_DECODE = "mla_decode"
    MLA_EXTEND = "mla_extend"


class Implementation(enum.Enum):
    """How an op is carried out."""

    REFERENCE = "reference"
    """Plain `jax.numpy`: runs everywhere and is the oracle of the others."""
    TRITON = "triton"
    """A Triton kernel launched through jax-triton: NVIDIA GPUs."""
    MOSAIC = "mosaic"
    """A Pallas kernel compiled by Mosaic GPU: Hopper and newer GPUs, JAX 0.11 and newer, no further package."""


@dataclass(frozen=True)
class Choice:
    """An implementation and the sentence that explains it."""

    implementation: Implementation
    why: str


@dataclass(frozen=True)
class Target:
    """The kind of device that a trace is for. `device_kind` is JAX's, such as "NVIDIA H200"; empty if unknown."""

    platform: str
    device_kind: str

    def compute_capability(self) -> int | None:
        """Ten times the compute capability of a GPU, or None for a kind that is not in the list."""
        words = self.device_kind.replace("-", " ").split()
        return next((_COMPUTE_CAPABILITY[word] for word in words if word in _COMPUTE_CAPABILITY), None)


@dataclass(frozen=True)
class Rule:
    """A row of the table: this implementation, perhaps only up to so many rows (tokens, requests, pages)."""

    implementation: Implementation
    measured: str
    up_to_rows: int | None = None


_COMPUTE_CAPABILITY: Mapping[str, int] = MappingProxyType(
    {
        "A100": 80,
        "A10": 86,
        "L4": 89,
        "L40S": 89,
        "H100": 90,
        "H200": 90,
        "GH200": 90,
        "B200": 100,
        "GB200": 100,
        "5090": 120,
    }
)
HOPPER_OPS = frozenset({Op.PAGED_EXTEND, Op.MLA_DECODE})
"""Ops whose Mosaic kernel multiplies by wgmma, which GPUs of compute capability 9.0 have and no others."""
MOSAIC_OPS = HOPPER_OPS | {Op.ALLOC_EXTEND, Op.ALLOC_DECODE, Op.WRITE_KV, Op.WRITE_MLA_KV}
"""Ops that have a Mosaic kernel; all have a Triton kernel."""

_BOTH = (
    Rule(Implementation.TRITON, "as fast as Mosaic on an H200, and takes rows of any width"),
    Rule(Implementation.MOSAIC, "faster than the reference on an H200, and needs no package"),
)
_EXTEND = (
    Rule(Implementation.TRITON, "more than twice as fast as Mosaic on an H200"),
    Rule(Implementation.MOSAIC, "faster than the reference on an H200 up to some 100 requests", up_to_rows=128),
)
_LATENT = (
    Rule(Implementation.REFERENCE, "one XLA scatter, as fast as a kernel up to some 500 rows and launched sooner", 512),
    *_BOTH,
)
_TRITON = (Rule(Implementation.TRITON, "faster than the reference on an H200"),)
_WGMMA_DECODE = (Rule(Implementation.MOSAIC, "twice as fast as Triton on an H200, by wgmma"), *_TRITON)
_WGMMA_EXTEND = (Rule(Implementation.MOSAIC, "1.25 times as fast as Triton on an H200, by wgmma"), *_TRITON)
_GPU_TABLE: Mapping[Op, tuple[Rule, ...]] = MappingProxyType(
    {op: _BOTH if op in MOSAIC_OPS else _TRITON for op in Op}
    | {Op.ALLOC_EXTEND: _EXTEND, Op.WRITE_MLA_KV: _LATENT}
    | {Op.MLA_DECODE: _WGMMA_DECODE, Op.PAGED_EXTEND: _WGMMA_EXTEND}
)
"""Rules of an op, the one to try first in front."""


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


def choose(
    op: Op,
    *,
    platform: str | None = None,
    implementation: Implementation | None = None,
    rows: int | None = None,
    unfit: Mapping[Implementation, str] = MappingProxyType({}),
) -> Choice:
    """Picks the implementation of `op`.

    Args:
      op: The op.
      platform: "cpu", "gpu" ("cuda" is the same) or "tpu"; by default the platform of `current_target()`.
      implementation: What the caller insists on, or None for the table's choice.
      rows: How many tokens, requests or pages the call is for; None takes no rule that needs a number.
      unfit: Implementations that cannot take these arguments, and why.

    Raises:
      UnsupportedError: if the caller insists on an implementation that cannot run on `platform`.
    """
    target = current_target() if platform is None else Target(platform, "")
    if implementation is not None:
        missing = unfit.get(implementation) or why_not(op, implementation, target)
        if missing:
            raise UnsupportedError(
                f"implementation={implementation.name} of {op.value} cannot run: {missing}. "
                "Leave implementation=None for the table's choice."
            )
        return Choice(implementation, "the caller asked for it")
    if target.platform not in GPU_PLATFORMS:
        return Choice(Implementation.REFERENCE, f"the table's choice for {op.value} on {target.platform}")
    passed_over = []
    for rule in _GPU_TABLE[op]:
        if rule.up_to_rows is not None and (rows is None or rows > rule.up_to_rows):
            passed_over.append(f"{rule.implementation.value} is for at most {rule.up_to_rows} rows")
            continue
        missing = unfit.get(rule.implementation) or why_not(op, rule.implementation, target)
        if missing is None:
            reason = f"the table's choice for {op.value} on {target.platform}: {rule.measured}"
            return Choice(rule.implementation, "; ".join([reason, *passed_over]))
        passed_over.append(missing)
    return Choice(Implementation.REFERENCE, "; ".join(passed_over) or f"no kernel of {op.value} is faster here")


def why_not(op: Op, implementation: Implementation, target: Target) -> str | None:
    """Why an implementation of `op` cannot run on `target`, or None if it can."""
    if implementation is Implementation.TRITON:
        return _missing_for_triton(target.platform)
    if implementation is Implementation.MOSAIC:
        if op not in MOSAIC_OPS:
            return f"{op.value} has no Mosaic kernel"
        return _missing_for_mosaic(target) or (_missing_for_wgmma(target) if op in HOPPER_OPS else None)
    return None


def _missing_for_triton(platform: str) -> str | None:
    if platform not in GPU_PLATFORMS:
        return f"Triton kernels need an NVIDIA GPU, and the platform is {platform!r}"
    for module, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(module) is None:
            return f"Triton kernels need the package {package!r}, which is not installed"
    return None


def _missing_for_mosaic(target: Target) -> str | None:
    if target.platform not in GPU_PLATFORMS:
        return f"Mosaic kernels need an NVIDIA GPU, and the platform is {target.platform!r}"
    if jax.__version_info__ < (0, 11):
        return f"Mosaic kernels need JAX 0.11 or newer, and this is {jax.__version__}"
    capability = target.compute_capability()
    if capability is not None and capability < 90:
        return f"Mosaic kernels need a Hopper GPU or newer, and this is {target.device_kind}"
    return None


def _missing_for_wgmma(target: Target) -> str | None:
    if target.compute_capability() == 90:
        return None
    return f"wgmma is an instruction of Hopper GPUs alone, and this is {target.device_kind or 'an unknown GPU'}"
