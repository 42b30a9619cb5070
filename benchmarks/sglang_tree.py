"""SGLang's Python RadixCache and allocators, from an installed or unpacked `sglang`, without the rest of that package.

Only three of its files run: `base_prefix_cache.py`, `radix_cache.py` and `allocator.py`. What else they import (Triton,
servers, CUDA) is replaced by stand-ins while they load. Nothing of SGLang is copied into this repository.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxcache.errors import ArgumentError

HOW_TO_GET_IT = "pip install --no-deps --target DIR sglang==0.5.2, pip install torch, and give --sglang DIR"

_MEM_CACHE = "sglang.srt.mem_cache"
_STAND_INS: dict[str, dict[str, Any]] = {
    "triton": {"jit": lambda kernel: kernel},
    "triton.language": {"constexpr": int},
    "sglang": {},
    "sglang.srt": {},
    "sglang.srt.utils": {"get_bool_env_var": lambda name: False, "next_power_of_2": None},
    "sglang.srt.disaggregation": {},
    "sglang.srt.disaggregation.kv_events": {"AllBlocksCleared": None, "BlockRemoved": None, "BlockStored": None},
    _MEM_CACHE: {},
    f"{_MEM_CACHE}.memory_pool": {"ReqToTokenPool": None, "SWAKVPool": None},
}


@dataclass(frozen=True)
class SGLangClasses:
    """What the benchmark uses of SGLang."""

    version: str
    radix_cache: Any
    token_allocator: Any
    paged_allocator: Any


def find_sglang(folder: Path | None) -> Path | None:
    """The folder that holds the package `sglang`; None if no folder is given and it is not installed.

    Raises:
      ArgumentError: `folder` does not hold it.
    """
    if folder is None:
        spec = importlib.util.find_spec("sglang")
        return Path(spec.submodule_search_locations[0]).parent if spec and spec.submodule_search_locations else None
    if not _source(folder, "radix_cache").is_file():
        raise ArgumentError(f"--sglang: {folder} has no sglang/srt/mem_cache/radix_cache.py: {HOW_TO_GET_IT}")
    return folder


def load_sglang(folder: Path) -> SGLangClasses:
    """SGLang's classes out of `folder`. Needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise ArgumentError(f"SGLang's RadixCache needs torch, which is not installed: {HOW_TO_GET_IT}")
    before = dict(sys.modules)
    try:
        for name, names in _STAND_INS.items():
            sys.modules[name] = stand_in = ModuleType(name)
            vars(stand_in).update(names)
        vars(sys.modules["triton"])["language"] = sys.modules["triton.language"]
        allocator = _load(folder, "allocator")
        _load(folder, "base_prefix_cache")
        radix_cache = _load(folder, "radix_cache")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("sglang", "triton")]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})
    return SGLangClasses(
        _version_of(folder),
        radix_cache.RadixCache,
        allocator.TokenToKVPoolAllocator,
        allocator.PagedTokenToKVPoolAllocator,
    )


def _version_of(folder: Path) -> str:
    for distribution in importlib.metadata.distributions(name="sglang", path=[str(folder)]):
        return distribution.version
    return "unknown"


def _source(folder: Path, module: str) -> Path:
    return folder / "sglang" / "srt" / "mem_cache" / f"{module}.py"


def _load(folder: Path, module: str) -> ModuleType:
    name = f"{_MEM_CACHE}.{module}"
    spec = importlib.util.spec_from_file_location(name, _source(folder, module))
    if spec is None or spec.loader is None:
        raise ArgumentError(f"--sglang: {_source(folder, module)} cannot be loaded: {HOW_TO_GET_IT}")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
