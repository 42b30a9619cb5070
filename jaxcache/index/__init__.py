"""The tree behind every prefix cache, and pymllm's caches over it, which know no requests.

`jaxcache.RadixCache` is SGLang's, driven by requests; `jaxcache.index.RadixCache` is pymllm's, by keys and slots.
"""

from jaxcache.index.key import RadixKey as RadixKey
from jaxcache.index.prefix_cache import BasePrefixCache as BasePrefixCache
from jaxcache.index.prefix_cache import EvictResult as EvictResult
from jaxcache.index.prefix_cache import InsertResult as InsertResult
from jaxcache.index.prefix_cache import MambaRadixCache as MambaRadixCache
from jaxcache.index.prefix_cache import MatchResult as MatchResult
from jaxcache.index.prefix_cache import RadixCache as RadixCache
