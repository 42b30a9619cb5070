"""The tree behind every prefix cache; and pymllm's public names, imported on first use.

`jaxcache.RadixCache` is SGLang's, driven by requests; `jaxcache.index.RadixCache` is pymllm's, driven by keys and
slots: see `jaxcache.compat.pymllm`.
"""

from importlib import import_module
from typing import Any

from jaxcache.index.key import RadixKey as RadixKey

_PYMLLM = {
    **dict.fromkeys(("hash_bytes", "hash_to_int64", "hash_token_ids"), "jaxcache.index.hashing"),
    **dict.fromkeys(("BasePrefixCache", "ChunkCache", "MambaRadixCache", "RadixCache"), "jaxcache.compat.pymllm"),
    **dict.fromkeys(("EvictResult", "InsertResult", "MatchResult"), "jaxcache.compat.pymllm"),
}


def __getattr__(name: str) -> Any:
    """pymllm's names: its caches stand on the tree, so they cannot be imported with it."""
    if name in _PYMLLM:
        return getattr(import_module(_PYMLLM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
