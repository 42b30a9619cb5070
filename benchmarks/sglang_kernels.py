"""SGLang's Triton kernels as peers, from an installed or unpacked `sglang`, without the rest of that package.

Two of its files run, `memory_pool.py` and `allocator.py`, with stand-ins for what else they import while they load.
Nothing of SGLang is copied into this repository. Tested with sglang 0.5.2.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from jaxcache.errors import ArgumentError

_MEM_CACHE = "sglang.srt.mem_cache"
_STAND_INS = (
    "sglang",
    "sglang.srt",
    "sglang.srt.torch_memory_saver_adapter",
    "sglang.srt.constants",
    "sglang.srt.layers",
    "sglang.srt.layers.radix_attention",
    "sglang.srt.utils",
    _MEM_CACHE,
)


@dataclass(frozen=True)
class SGLangKernels:
    """The kernels as SGLang launches them: on torch tensors, on the current stream."""

    set_mla_kv_buffer: Any
    alloc_extend: Any
    alloc_decode: Any
    copy_all_layers: Any


def load_kernels(folder: Path | None) -> SGLangKernels | None:
    """SGLang's kernels out of `folder`, or of the installed package; None if there is none. Needs torch, Triton."""
    if folder is None:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0]).parent
    utils = ModuleType("sglang.srt.utils")
    vars(utils).update(
        get_bool_env_var=lambda *_: False,
        is_cuda=lambda: True,
        is_npu=lambda: False,
        next_power_of_2=lambda n: 1 << max(0, n - 1).bit_length(),
    )
    stand_ins: dict[str, Any] = {name: mock.MagicMock(name=name) for name in _STAND_INS}
    stand_ins["sglang.srt.utils"] = utils
    with mock.patch.dict(sys.modules, stand_ins):
        pool = _load(folder, "memory_pool")
        allocator = _load(folder, "allocator")
    return SGLangKernels(
        set_mla_kv_buffer=pool.set_mla_kv_buffer_triton,
        alloc_extend=allocator.alloc_extend_kernel,
        alloc_decode=allocator.alloc_decode_kernel,
        copy_all_layers=pool.copy_all_layer_kv_cache,
    )


def _load(folder: Path, name: str) -> ModuleType:
    path = folder / "sglang" / "srt" / "mem_cache" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{_MEM_CACHE}.{name}", path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"--sglang: {path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_decode_attention(folder: Path | None) -> Any:
    """`decode_attention_fwd` of SGLang's Triton backend, out of `folder` or of the installed package; None without."""
    if folder is None:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0]).parent
    path = folder / "sglang" / "srt" / "layers" / "attention" / "triton_ops" / "decode_attention.py"
    if not path.is_file():
        return None
    utils = ModuleType("sglang.srt.utils")
    vars(utils).update(is_hip=lambda: False, is_cuda=lambda: True, get_bool_env_var=lambda *_: False)
    stand_ins: dict[str, Any] = {name: mock.MagicMock(name=name) for name in _STAND_INS}
    stand_ins["sglang.srt.utils"] = utils
    with mock.patch.dict(sys.modules, stand_ins):
        spec = importlib.util.spec_from_file_location("sglang_decode_attention", path)
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.decode_attention_fwd
