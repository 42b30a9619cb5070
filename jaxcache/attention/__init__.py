"""Attention over our pools: a plan once a step, an op in each layer. For use inside a jitted step.

    plan = attention_plan(batch, pool, num_heads=32)                      # once a step; one for each kind of window
    pool = pool.set_kv_buffer(layer, batch.slots, k, v)                   # in each layer, also in a scan over layers
    out = paged_attention(q, pool, layer, batch, plan, scale=dim**-0.5)   # decode: a token a request
    out = paged_extend(q, pool, layer, batch, plan, scale=dim**-0.5)      # prompts, chunks, drafts
    out = mla_attention(q, ...), mla_extend(q, ...)                       # over latent rows, absorbed

The pool is read in place. What the ops compute stands in `jaxcache.kernels.attention`.
"""

from jaxcache.attention.ops import mla_attention, mla_extend, paged_attention, paged_extend
from jaxcache.attention.plan import AttentionPlan, attention_plan
from jaxcache.kernels.attention.merge import merge_attention
from jaxcache.kernels.attention.plan import SharedPrefix

__all__ = [
    "AttentionPlan",
    "SharedPrefix",
    "attention_plan",
    "merge_attention",
    "mla_attention",
    "mla_extend",
    "paged_attention",
    "paged_extend",
]
