"""The tree behind every prefix cache. pymllm's caches, by keys and slots, are imported from here on first use.

`jaxcache.RadixCache` is SGLang's, driven by requests; `jaxcache.index.RadixCache` is pymllm's: see
`jaxcache.compat.pymllm`.
"""

from importlib import import_module
from typing import Any

from jaxcache.index.key import RadixKey as RadixKey

_PYMLLM = frozenset(("BasePrefixCache", "EvictResult", "InsertResult", "MambaRadixCache", "MatchResult", "RadixCache"))


def __getattr__(name: str) -> Any:
    """pymllm's names, which stand on the tree and so cannot be imported with it."""
    if name in _PYMLLM:
        return getattr(import_module("jaxcache.compat.pymllm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
