"""Attention over a pool's pages: SDPA against a float32 reference, and what FlashInfer is given."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch

from jaxcache import (
    ArgumentError,
    DeadViewError,
    Layout,
    MemoryConfig,
    MHAConfig,
    MLAConfig,
    Request,
    RequestStateError,
    SWAConfig,
    UnsupportedError,
    init_memory_pool_and_cache,
)
from tests.torch_bridge.tensors import random
from torch_bridge import borrow
from torch_bridge.attention import Backend, PagedAttention, PagedLatentAttention, PageTable

PAGE, LENS = 4, (9, 4, 1)
MHA = dict(size=64, page_size=PAGE, dtype=np.float32, layer_num=3, head_num=2, head_dim=8)
MLA = dict(size=64, page_size=PAGE, dtype=np.float32, layer_num=3, kv_lora_rank=8, qk_rope_head_dim=4)


def running(kv, lens=LENS, **options):
    """A memory with requests of so many tokens, whose pages are not in order."""
    memory = init_memory_pool_and_cache(MemoryConfig(kv, max_running=4, max_context_len=32, **options))
    if isinstance(kv, SWAConfig):
        memory.allocator.alloc_pages(3, without_window=3)  # so that window pages have other numbers than full ones
    requests = [Request(str(i), list(range(32 * i, 32 * i + n))) for i, n in enumerate(lens)]
    for request in requests:
        memory.admit(request)
    for request in [*reversed(requests), *requests]:  # in two parts each
        more = (request.num_tokens + 1) // 2 if not request.kv_len else request.num_tokens - request.kv_len
        if more:
            memory.planner.commit(memory.extend([(request, more)]))
    return memory, requests


def fill(kv, seed=0):
    for i, buffer in enumerate(kv.buffers):
        if buffer.is_floating_point():
            buffer[:, PAGE:] = random(*buffer[:, PAGE:].shape, seed=seed + i).to(buffer.dtype)


def queries(count, heads, dim, seed=1):
    return random(count, heads, dim, seed=seed)


def reference(memory, requests, q, k, v, query_lens, scale, window=None):
    """Attention token by token, in float32: `k` and `v` are `(slots, heads, dim)`."""
    outs, row = [], 0
    table = memory.req_to_token_pool.req_to_token
    for request, count in zip(requests, query_lens, strict=True):
        slots = table[request.req_pool_idx, : request.kv_len]
        for position in range(request.kv_len - count, request.kv_len):
            first = 0 if window is None else max(0, position - window + 1)
            seen = slots[first : position + 1]
            group = q.shape[1] // k.shape[1]
            keys, values = (x[seen].repeat(group, axis=1).astype(np.float32) for x in (k, v))
            scores = np.einsum("hd,thd->ht", q[row].cpu().numpy(), keys) * scale
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            outs.append(np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), values))
            row += 1
    return np.stack(outs)


@pytest.mark.parametrize(
    ("v_head_dim", "layout"), [(8, Layout.LAYER_MAJOR), (6, Layout.LAYER_MAJOR), (6, Layout.PAGE_MAJOR)]
)
@pytest.mark.parametrize("query_lens", [None, (9, 2, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_sdpa_is_attention(v_head_dim, layout, query_lens, window):
    memory, requests = running(MHAConfig(**MHA, v_head_dim=v_head_dim, layout=layout))
    counts = query_lens or (1, 1, 1)
    q = queries(sum(counts), 4, 8)
    with borrow(memory.pool) as kv:
        fill(kv)
        attend = PagedAttention(kv, 4, window=window)
        assert attend.backend is Backend.SDPA
        attend.plan(PageTable.of(memory, requests), query_lens)
        for layer in range(3):
            k, v = (pages.flatten(0, 1).clone().cpu().numpy() for pages in kv.get_paged_buffers(layer))
            expected = reference(memory, requests, q, k, v, counts, 8**-0.5, window)
            np.testing.assert_allclose(attend(q, layer).cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_lens", [None, (4, 3, 1)])
def test_sdpa_is_latent_attention(query_lens):
    memory, requests = running(MLAConfig(**MLA))
    counts = query_lens or (1, 1, 1)
    q_nope, q_rope = queries(sum(counts), 3, 8), queries(sum(counts), 3, 4, seed=2)
    with borrow(memory.pool) as kv:
        fill(kv)
        attend = PagedLatentAttention(kv, 3, sm_scale=0.2)
        attend.plan(PageTable.of(memory, requests), query_lens)
        rows = kv.get_key_buffer(1).clone().cpu().numpy()
        q = torch.cat([q_nope, q_rope], dim=-1)
        expected = reference(memory, requests, q, rows, rows[..., :8], counts, 0.2)
        np.testing.assert_allclose(attend(q_nope, q_rope, 1).cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_window_side_is_attended_through_its_own_pages():
    sizes = dict(MHA, layer_num=1)
    kv_config = SWAConfig(full=MHAConfig(**sizes), window=MHAConfig(**sizes), full_layers=(0,), window_layers=(1,))
    memory, requests = running(kv_config, sliding_window_size=5)
    table = PageTable.of(memory, requests)
    windows = table.in_window(memory.allocator)
    assert windows.kv_lens.tolist() == list(LENS)
    assert (windows.indices > 0).all() and (windows.indices != table.indices).all()
    q = queries(3, 4, 8)
    with borrow(memory.pool) as kv:
        fill(kv.window)
        attend = PagedAttention(kv.window, 4, window=5)
        attend.plan(windows)
        by_full_slots = memory.allocator.translate_loc_from_full_to_swa(np.arange(64 + PAGE))
        k, v = (buffer.clone().cpu().numpy()[by_full_slots] for buffer in kv.window.get_kv_buffer(0))
        expected = reference(memory, requests, q, k, v, (1, 1, 1), 8**-0.5, window=5)
        np.testing.assert_allclose(attend(q, 0).cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_window_page_that_is_gone_is_not_read_as_page_0():
    """Its rows are zeros, whose scores are as good as any. What lies before the window of every query may be gone."""
    sizes = dict(MHA, layer_num=1)
    kv_config = SWAConfig(full=MHAConfig(**sizes), window=MHAConfig(**sizes), full_layers=(0,), window_layers=(1,))
    memory, requests = running(kv_config, lens=(14, 3), sliding_window_size=5)
    whole = PageTable.of(memory, requests).in_window(memory.allocator)
    memory.cache.drop_out_of_window(requests[0])
    memory.cache.evict(0, swa_num_tokens=64)  # the windows of tokens 0 .. 3 or more are gone
    windows = PageTable.of(memory, requests).in_window(memory.allocator)
    gone = np.flatnonzero(windows.indices == 0)
    assert gone.tolist() == [0]
    with borrow(memory.pool) as kv:
        fill(kv.window)
        for window, counts, is_refused in (
            (5, None, False),  # tokens 9 .. 13
            (5, (6, 1), False),  # 4 .. 13
            (5, (7, 1), True),  # 3 .. 13
            (10, None, False),
            (11, None, True),
            (None, None, True),
        ):
            attend = PagedAttention(kv.window, 4, window=window)
            if is_refused:
                with pytest.raises(ArgumentError, match=r"window page of some tokens is gone.* 0 at \[0\]"):
                    attend.plan(windows, counts)
                continue
            q = queries(sum(counts or (1, 1)), 4, 8)
            attend.plan(windows, counts)
            with_hole = attend(q, 0)
            attend.plan(whole, counts)
            assert torch.equal(with_hole, attend(q, 0))


def test_page_tables_are_those_of_the_requests():
    memory, requests = running(MHAConfig(**MHA))
    table = PageTable.of(memory, requests)
    assert table.indptr.tolist() == [0, 3, 4, 5]
    assert table.last_page_len.tolist() == [1, 4, 1]
    assert table.kv_lens.tolist() == list(LENS)
    rows = memory.req_to_token_pool.pages
    assert table.indices.tolist() == [*rows[0, :3], rows[1, 0], rows[2, 0]]
    shorter = PageTable.of(memory, requests[:2], [8, 3])
    assert (shorter.indptr.tolist(), shorter.last_page_len.tolist()) == ([0, 2, 3], [4, 3])
    for lens in ([9, 0, 1], [9, 5, 1], [9, 4]):
        with pytest.raises(ArgumentError, match="kv_lens"):
            PageTable.of(memory, requests, lens)
    memory.abort(requests[1])
    with pytest.raises(RequestStateError):
        PageTable.of(memory, requests)


class Recorder:
    """One of FlashInfer's wrappers that remembers what it is given, and answers with its name."""

    made: list[Recorder]

    def __init__(self, name, *args):
        self.name, self.args = name, args
        self.plans, self.runs = [], []
        Recorder.made.append(self)

    def plan(self, *args, **kwargs):
        self.plans.append((args, kwargs))

    def run(self, *args):
        self.runs.append(args)
        return self.name


@pytest.fixture
def flashinfer(monkeypatch):
    """A module by that name, with wrappers that record."""
    Recorder.made = []
    module, mla = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.mla")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    for owner, name in (
        (module, "BatchDecodeWithPagedKVCacheWrapper"),
        (module, "BatchPrefillWithPagedKVCacheWrapper"),
        (mla, "BatchMLAPagedAttentionWrapper"),
    ):
        setattr(owner, name, lambda *args, name=name: Recorder(name, *args))
    module.mla = mla
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", mla)
    return module


def address_of(array, layer):
    """Where a layer of a pool's array lies."""
    return array.unsafe_buffer_pointer() + array.nbytes // len(array) * layer


def lists(*tensors):
    assert all(tensor.dtype == torch.int32 for tensor in tensors)
    return [tensor.tolist() for tensor in tensors]


def test_flashinfer_is_given_the_pages_where_they_lie(flashinfer):
    memory, requests = running(MHAConfig(**MHA))
    table = PageTable.of(memory, requests)
    workspace = torch.zeros(16, dtype=torch.uint8)
    with borrow(memory.pool) as kv:
        attend = PagedAttention(kv, 4, window=7, sm_scale=0.5, backend=Backend.FLASHINFER, workspace=workspace)
        attend.plan(table)
        attend.plan(table, q_dtype=torch.bfloat16)  # the same wrapper is planned anew
        assert attend(queries(3, 4, 8), 2) == "BatchDecodeWithPagedKVCacheWrapper"
        attend.plan(table, (9, 2, 1))
        assert attend(queries(12, 4, 8), 0) == "BatchPrefillWithPagedKVCacheWrapper"
        decode, prefill = Recorder.made
        assert decode.args[0] is prefill.args[0] is workspace
        assert decode.args[1] == prefill.args[1] == "NHD"
        ((args, options), (_, other)) = decode.plans
        expected = [[0, 3, 4, 5], table.indices.tolist(), [1, 4, 1]]
        assert lists(*args[:3]) == expected
        assert args[3:] == (4, 2, 8, PAGE)
        assert options == dict(sm_scale=0.5, window_left=6, q_data_type=torch.float32, kv_data_type=torch.float32)
        assert other == options | dict(q_data_type=torch.bfloat16)
        ((args, prompt_options),) = prefill.plans
        assert lists(*args[:4]) == [[0, 9, 11, 12], *expected]
        assert args[4:] == (4, 2, 8, PAGE)
        assert prompt_options == options | dict(causal=True)
        for recorder, layer in ((decode, 2), (prefill, 0)):
            ((_, pages),) = recorder.runs
            assert [page.data_ptr() for page in pages] == [address_of(x, layer) for x in (memory.pool.k, memory.pool.v)]
            assert all(page.shape == (17, PAGE, 2, 8) and page.is_contiguous() for page in pages)


def test_flashinfer_is_given_both_parts_of_latent_rows_where_they_lie(flashinfer):
    memory, requests = running(MLAConfig(**MLA))
    table = PageTable.of(memory, requests)
    address = address_of(memory.pool.kv, layer=1)
    with borrow(memory.pool) as kv:
        attend = PagedLatentAttention(kv, 3, 0.25, backend=Backend.FLASHINFER, workspace=torch.zeros(1))
        for query_lens, starts in ((None, [0, 1, 2, 3]), ((9, 2, 1), [0, 9, 11, 12])):
            attend.plan(table, query_lens)
            attend(queries(starts[-1], 3, 8), queries(starts[-1], 3, 4), 1)
            recorder = Recorder.made[-1]
            ((args, options),) = recorder.plans
            assert lists(*args[:4]) == [starts, [0, 3, 4, 5], table.indices.tolist(), list(LENS)]
            assert args[4:] == (3, 8, 4, PAGE, query_lens is not None, 0.25, torch.float32, torch.float32)
            assert not options
            ((_, _, latent, rope),) = recorder.runs
            assert (latent.shape, rope.shape) == ((17, PAGE, 8), (17, PAGE, 4))
            assert latent.data_ptr() == address == rope.data_ptr() - 8 * 4
            assert latent.stride() == rope.stride() == (12 * PAGE, 12, 1)


def test_backends_are_chosen_and_refused(flashinfer, monkeypatch):
    memory, _ = running(MHAConfig(**MHA, v_head_dim=6))
    with borrow(memory.pool) as kv:
        assert PagedAttention(kv, 2).backend is Backend.SDPA
        with pytest.raises(UnsupportedError, match="one width, got 8 and 6"):
            PagedAttention(kv, 2, backend=Backend.FLASHINFER)
        monkeypatch.delitem(sys.modules, "flashinfer")
        with pytest.raises(UnsupportedError, match="not installed"):
            PagedAttention(kv, 2, backend=Backend.FLASHINFER)


def test_wrong_use_is_refused():
    memory, requests = running(MHAConfig(**MHA))
    table = PageTable.of(memory, requests)
    with borrow(memory.pool) as kv:
        attend = PagedAttention(kv, 4)
        with pytest.raises(RequestStateError, match="call plan"):
            attend(queries(3, 4, 8), 0)
        for bad in ((0, 1, 1), (9, 5, 1), (1, 1)):
            with pytest.raises(ArgumentError, match="query_lens"):
                attend.plan(table, bad)
        with pytest.raises(ArgumentError, match="pages must be of 4"):
            attend.plan(PageTable(2, *(np.ones(2, np.int32) for _ in range(3))))
        attend.plan(table)
        for shape in ((2, 4, 8), (3, 2, 8), (3, 4, 6)):
            with pytest.raises(ArgumentError, match="q must have shape"):
                attend(queries(*shape), 0)
        with pytest.raises(ArgumentError, match="multiple of the pool's 2"):
            PagedAttention(kv, 3)
        with pytest.raises(ArgumentError, match="window"):
            PagedAttention(kv, 2, window=0)
        with pytest.raises(ArgumentError, match="MLATokenToKVPool"):
            PagedLatentAttention(kv, 2, 1.0)
    with pytest.raises(DeadViewError):
        attend(queries(3, 4, 8), 0)
    latent, _ = running(MLAConfig(**MLA))
    with borrow(latent.pool) as kv, pytest.raises(ArgumentError, match="MHATokenToKVPool"):
        PagedAttention(kv, 2)
    payload, _ = running(MHAConfig(**dict(MHA, dtype=np.int8)))
    with borrow(payload.pool) as kv, pytest.raises(ArgumentError, match="floats"):
        PagedAttention(kv, 2)
