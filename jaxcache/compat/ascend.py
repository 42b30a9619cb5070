"""SGLang's names for page-major pools. Nothing in them is bound to a device.

`MHAConfig(..., layout=Layout.PAGE_MAJOR)` is what they select, and all that they add. Methods, layer ids, dtypes and
shapes are those of the pools that they are; in SGLang, the value buffer of the MLA pool is the rope part.

Source: SGLang 0.5.2 memory_pool.py, AscendTokenToKVPool and AscendMLAPagedTokenToKVPool.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax

from jaxcache.pools.base import KVCache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.pools.mla import MLATokenToKVPool


class _PageMajor(KVCache):
    """Makes page-major pools, whatever the config says."""

    @classmethod
    def create(cls, config: Any, **where: Any) -> Self:
        return super().create(dataclasses.replace(config, layout=Layout.PAGE_MAJOR), **where)

    @classmethod
    def abstract(cls, config: Any, **where: Any) -> Self:
        return super().abstract(dataclasses.replace(config, layout=Layout.PAGE_MAJOR), **where)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("config",))
@dataclasses.dataclass(frozen=True)
class AscendTokenToKVPool(_PageMajor, MHATokenToKVPool):
    """An `MHATokenToKVPool` that is page-major."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kv",), meta_fields=("config",))
@dataclasses.dataclass(frozen=True)
class AscendMLAPagedTokenToKVPool(_PageMajor, MLATokenToKVPool):
    """An `MLATokenToKVPool` that is page-major."""
