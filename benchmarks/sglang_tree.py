"""SGLang's Python RadixCache, loaded from an installed or unpacked `sglang` without the rest of that package.

Only two of its files run: `radix_cache.py` and `base_prefix_cache.py`. What else they import (kernels, servers, CUDA)
is replaced by empty modules while they load. Nothing of SGLang is copied into this repository.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from jaxcache.errors import ArgumentError

HOW_TO_GET_IT = "pip install --no-deps --target DIR sglang==0.5.2, pip install torch, and give --sglang DIR"

_MEM_CACHE = "sglang.srt.mem_cache"
_STUBS: dict[str, tuple[str, ...]] = {
    "sglang": (),
    "sglang.srt": (),
    _MEM_CACHE: (),
    "sglang.srt.disaggregation": (),
    "sglang.srt.disaggregation.kv_events": ("AllBlocksCleared", "BlockRemoved", "BlockStored"),
    f"{_MEM_CACHE}.allocator": ("BaseTokenToKVPoolAllocator",),
    f"{_MEM_CACHE}.memory_pool": ("ReqToTokenPool",),
}


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


def load_radix_cache(folder: Path) -> type:
    """SGLang's class `RadixCache` out of `folder`. Needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise ArgumentError(f"SGLang's RadixCache needs torch, which is not installed: {HOW_TO_GET_IT}")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "sglang"}
    try:
        for name, classes in _STUBS.items():
            stub = ModuleType(name)
            vars(stub).update({cls: type(cls, (), {}) for cls in classes})
            sys.modules[name] = stub
        _load(folder, "base_prefix_cache")
        return _load(folder, "radix_cache").RadixCache
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]
        sys.modules.update(before)


def version_of(folder: Path) -> str:
    """Version of the `sglang` in `folder`."""
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
