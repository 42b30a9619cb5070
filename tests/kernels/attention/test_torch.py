"""Attention from torch: the Triton source launched on a pool's tensors gives what SDPA over gathered pages gives."""

import numpy as np
import pytest

from jaxcache import Layout, MemoryConfig, MHAConfig, MLAConfig, Request, UnsupportedError, init_memory_pool_and_cache
from jaxcache.kernels.attention import common_triton
from tests.kernels.conftest import HAS_GPU, INTERPRETS

torch = pytest.importorskip("torch")

from tests.torch_bridge.tensors import random  # noqa: E402  needs torch
from torch_bridge import borrow  # noqa: E402
from torch_bridge.attention import Backend, PagedAttention, PagedLatentAttention, PageTable  # noqa: E402

SIZES = dict(size=256, page_size=4, dtype=np.float32, layer_num=3)
LENS = (70, 4, 1, 9)
POOLS = {
    "gqa": MHAConfig(**SIZES, head_num=2, head_dim=16),
    "narrow_values": MHAConfig(**SIZES, head_num=2, head_dim=16, v_head_dim=8, layout=Layout.PAGE_MAJOR),
    "latent": MLAConfig(**SIZES, kv_lora_rank=16, qk_rope_head_dim=8),
}


def running(kv):
    memory = init_memory_pool_and_cache(MemoryConfig(kv, max_running=4, max_context_len=128))
    requests = [Request(str(i), list(range(100 * i, 100 * i + n))) for i, n in enumerate(LENS)]
    for request in requests:
        memory.admit(request)
        memory.planner.commit(memory.extend([(request, request.num_tokens)]))
    return memory, requests


@pytest.mark.skipif(not (INTERPRETS or HAS_GPU), reason="this process compiles Triton source instead of running it")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("query_lens", [None, (9, 2, 1, 3)])
@pytest.mark.parametrize("name", POOLS)
def test_triton_is_sdpa(name, query_lens, window):
    if name == "latent" and window:
        return  # `PagedLatentAttention` has none
    memory, requests = running(POOLS[name])
    count = sum(query_lens or (1,) * 4)
    table = PageTable.of(memory, requests)
    with borrow(memory.pool) as kv:
        for i, buffer in enumerate(kv.buffers):
            buffer[:] = random(*buffer.shape, seed=i).to(buffer)
        outs = []
        for backend in (Backend.SDPA, Backend.TRITON):
            if name == "latent":
                attend = PagedLatentAttention(kv, 3, 0.2, backend=backend)
                q = [random(count, 3, width, seed=9).to(kv.device) for width in (16, 8)]
            else:
                attend = PagedAttention(kv, 4, window=window, backend=backend)
                q = [random(count, 4, 16, seed=9).to(kv.device)]
            assert attend.backend is backend
            attend.plan(table, query_lens)
            with np.errstate(all="ignore"):  # the interpreter computes what is masked, too
                outs.append(attend(*q, 1).cpu().numpy())
        np.testing.assert_allclose(outs[1], outs[0], rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(HAS_GPU, reason="about a machine without a GPU")
def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(common_triton, "COMPILES", common_triton.tl.constexpr(True))
    memory, _ = running(POOLS["gqa"])
    with borrow(memory.pool) as kv:
        assert PagedAttention(kv, 4).backend is Backend.SDPA
        with pytest.raises(UnsupportedError, match="our Triton kernels cannot attend here, they need a GPU"):
            PagedAttention(kv, 4, backend=Backend.TRITON)
