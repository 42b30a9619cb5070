"""Attention of torch engines over a pool's pages: FlashInfer's kernels or ours, in place, or torch's SDPA over a copy.

    attend = PagedAttention(kv, num_heads=32)              # kv from borrow or share; once
    attend.plan(PageTable.of(memory, requests))            # once a step; query_lens= for prompts
    out = attend(q, layer)                                 # in each layer

FlashInfer is given the pages where they lie, as the pool has its NHD layout: a layer is a slice of the stack, so page
ids are the same in all layers and one plan serves them all. Of latent rows it is given both parts, as strided views.
Where FlashInfer is not installed or cannot, the Triton kernels of `jaxcache.attention` are launched from torch. Without
a GPU, SDPA attends to keys and values that are gathered first, sequence by sequence, which is right, and slow.
`backend` tells which it is.

Tests compare SDPA with a float32 reference, and what FlashInfer is given with what its documentation asks for. That
FlashInfer computes the same from it on a GPU has not been measured.
"""

from __future__ import annotations

import abc
import enum
import importlib.util
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from jaxcache.arguments import as_int32
from jaxcache.errors import ArgumentError, RequestStateError, UnsupportedError
from jaxcache.pools.config import require
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.mla import MLAConfig
from torch_bridge.page_table import PageTable as PageTable
from torch_bridge.page_table import require_pages_there
from torch_bridge.pool import TorchKVPool
from torch_bridge.triton_attention import PlannedTriton, triton_obstacle

if TYPE_CHECKING:
    pass

_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""


class Backend(enum.Enum):
    """What attends."""

    FLASHINFER = "flashinfer"  # in place; needs a GPU
    TRITON = "triton"  # jaxcache's own kernels, in place; needs a GPU
    SDPA = "sdpa"  # over gathered pages; anywhere


class _Plan(NamedTuple):
    """A batch, checked."""

    pages: PageTable
    query_lens: np.ndarray
    wrapper: Any  # FlashInfer's, or a `PlannedTriton`; None for SDPA


class _PagedBase(abc.ABC):
    """What both kinds of attention have in common."""

    def __init__(
        self,
        kv: TorchKVPool,
        num_heads: int,
        sm_scale: float,
        backend: Backend | None,
        workspace: torch.Tensor | None,
        obstacle: str | None,
        window: int | None = None,
    ):
        self.kv, self.num_heads, self.sm_scale, self._window = kv, num_heads, float(sm_scale), window
        dtype = kv.buffers[0].dtype
        require(dtype.is_floating_point, "kv", "must hold floats: what stands for them, attention cannot read", dtype)
        is_there = importlib.util.find_spec("flashinfer") is not None
        obstacle = obstacle if is_there else "it is not installed: pip install flashinfer-python"
        if backend is Backend.FLASHINFER and obstacle is not None:
            raise UnsupportedError(f"backend: FlashInfer cannot attend here, {obstacle}; use Backend.SDPA")
        no_triton = triton_obstacle(kv)
        if backend is Backend.TRITON and no_triton is not None:
            raise UnsupportedError(f"backend: our Triton kernels cannot attend here, {no_triton}; use Backend.SDPA")
        if backend is None:
            on_gpu = Backend.FLASHINFER if obstacle is None else Backend.TRITON if no_triton is None else Backend.SDPA
            backend = on_gpu if kv.device.type == "cuda" else Backend.SDPA
        self.backend = backend
        if backend is Backend.FLASHINFER and workspace is None:
            workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=kv.device)
        self._workspace = workspace
        self._wrappers: dict[bool, Any] = {}
        self._planned: _Plan | None = None

    def plan(self, pages: PageTable, query_lens: Any = None, *, q_dtype: torch.dtype | None = None) -> None:
        """Says what the next calls attend to, in any number of layers.

        Args:
          pages: Pages and lengths of each sequence, what this step writes included.
          query_lens: Queries of each sequence, which are its last tokens; each attends to itself and all before it. By
            default one of each: a decode step.
          q_dtype: Of the queries; by default that of the pool.

        Raises:
          ArgumentError: The pages are of another size, or a sequence has more queries than tokens, or none; or a window
            page that a query attends to is gone, and page 0 would be read.

        Cost: with FlashInfer, its planning on the host and some small uploads.
        """
        size = self.kv.config.page_size
        require(pages.page_size == size, "pages", f"must be of {size} tokens, as the pool's", pages.page_size)
        kv_lens = pages.kv_lens
        is_decode = query_lens is None
        lens = np.ones_like(kv_lens) if query_lens is None else as_int32("query_lens", query_lens)
        fits = lens.shape == kv_lens.shape and bool((lens >= 1).all() and (lens <= kv_lens).all())
        require(fits, "query_lens", f"must be one a sequence, from 1 to its tokens, {kv_lens.tolist()}", lens.tolist())
        require_pages_there(pages, kv_lens - lens, self._window)
        wrapper = None
        if self.backend is Backend.FLASHINFER:
            if is_decode not in self._wrappers:
                self._wrappers[is_decode] = self._wrapper(_flashinfer(), is_decode)
            wrapper = self._wrappers[is_decode]
            self._plan_wrapper(wrapper, pages, lens, is_decode, q_dtype or self.kv.buffers[0].dtype)
        if self.backend is Backend.TRITON:
            wrapper = PlannedTriton.of(self.kv, pages, lens, self.num_heads, self.sm_scale, self._window, is_decode)
        self._planned = _Plan(pages, lens, wrapper)

    @abc.abstractmethod
    def _wrapper(self, flashinfer: types.ModuleType, is_decode: bool) -> Any:
        """FlashInfer's for decode steps or prompts."""

    @abc.abstractmethod
    def _plan_wrapper(
        self, wrapper: Any, pages: PageTable, query_lens: np.ndarray, is_decode: bool, q_dtype: torch.dtype
    ) -> None:
        """Its `plan`, with what it asks for."""

    def _plan_for(self, **queries: tuple[torch.Tensor, int]) -> _Plan:
        """The plan, if each of `queries` has the shape that it and its width ask for."""
        if self._planned is None:
            raise RequestStateError("nothing is planned: call plan with the pages of this step first")
        num_queries = int(self._planned.query_lens.sum())
        for name, (tensor, width) in queries.items():
            shape = (num_queries, self.num_heads, width)
            require(tensor.shape == shape, name, f"must have shape {shape}, as planned", tuple(tensor.shape))
        return self._planned

    def _gathered(self, plan: _Plan, q: torch.Tensor, buffers: Sequence[torch.Tensor], window: int | None) -> Any:
        """SDPA of each sequence over its pages of `buffers`: `(pages, page_size, heads, dim)` keys and values."""
        outs, first = [], 0
        lens = zip(plan.query_lens.tolist(), plan.pages.kv_lens.tolist(), strict=True)
        for i, (q_len, kv_len) in enumerate(lens):
            start, stop = plan.pages.indptr[i : i + 2]
            ids = torch.from_numpy(plan.pages.indices[start:stop].astype(np.int64)).to(q.device)
            k, v = (pages[ids].flatten(0, 1)[:kv_len].to(q.dtype).transpose(0, 1) for pages in buffers)
            position = torch.arange(kv_len - q_len, kv_len, device=q.device)[:, None]
            key = torch.arange(kv_len, device=q.device)
            mask = key <= position
            mask = mask if window is None else mask & (key > position - window)
            queries = q[first : first + q_len].transpose(0, 1)
            out = torch.nn.functional.scaled_dot_product_attention(
                queries[None], k[None], v[None], attn_mask=mask, scale=self.sm_scale, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
            first += q_len
        return torch.cat(outs)


class PagedAttention(_PagedBase):
    """Multi-head or grouped-query attention over a `TorchMHAPool`.

    Args:
      kv: The view of the pool, or of the side of a sliding-window pool that the layers use.
      num_heads: Query heads.
      sm_scale: Of the scores; by default `1 / sqrt(head_dim)`.
      window: Tokens that a query attends to, itself included; None for all.
      backend: By default FlashInfer, where it is installed and can, else our Triton kernels, where they can.
      workspace: uint8 scratch memory on the device for FlashInfer, which objects may share; by default 128 MiB.

    Attributes:
      backend: What attends.

    Raises:
      ArgumentError: The pool is of another kind or holds no floats, or the heads do not fit.
      UnsupportedError: FlashInfer is asked for, but missing, or values are not as wide as keys, which it refuses.
    """

    def __init__(
        self,
        kv: TorchKVPool,
        num_heads: int,
        *,
        sm_scale: float | None = None,
        window: int | None = None,
        backend: Backend | None = None,
        workspace: torch.Tensor | None = None,
    ):
        config = kv.config
        if not isinstance(config, MHAConfig):
            raise ArgumentError(
                f"kv must be a view of an MHATokenToKVPool, or a side of a pool, got {type(kv).__name__}"
            )
        heads = config.head_num
        require(num_heads % heads == 0, "num_heads", f"must be a multiple of the pool's {heads} heads", num_heads)
        require(window is None or window >= 1, "window", "must be at least 1, or None", window)
        widths = f"its keys and values must be of one width, got {config.head_dim} and {config.v_head_dim}"
        obstacle = None if config.v_head_dim == config.head_dim else widths
        self._config = config
        scale = config.head_dim**-0.5 if sm_scale is None else sm_scale
        super().__init__(kv, num_heads, scale, backend, workspace, obstacle, window)

    def __call__(self, q: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Attends in one layer.

        Args:
          q: `(queries, heads, head_dim)`, sequence after sequence.
          layer_id: As of the pool's getters.

        Returns:
          `(queries, heads, v_head_dim)`.

        Raises:
          RequestStateError: Nothing is planned.
          ArgumentError: Another shape is planned.
          DeadViewError: The view has ended.
        """
        plan = self._plan_for(q=(q, self._config.head_dim))
        if self.backend is Backend.TRITON:
            return plan.wrapper.run(q, layer_id)
        buffers = self.kv.get_paged_buffers(layer_id)
        return self._gathered(plan, q, buffers, self._window) if plan.wrapper is None else plan.wrapper.run(q, buffers)

    def _wrapper(self, flashinfer: types.ModuleType, is_decode: bool) -> Any:
        if is_decode:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD")
        return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")

    def _plan_wrapper(
        self, wrapper: Any, pages: PageTable, query_lens: np.ndarray, is_decode: bool, q_dtype: torch.dtype
    ) -> None:
        config = self._config
        table = torch.from_numpy(pages.indptr), torch.from_numpy(pages.indices).to(self.kv.device)
        sizes = self.num_heads, config.head_num, config.head_dim, config.page_size
        prompts = () if is_decode else (_starts(query_lens),)
        wrapper.plan(
            *prompts,
            *table,
            torch.from_numpy(pages.last_page_len),
            *sizes,
            **({} if is_decode else {"causal": True}),
            sm_scale=self.sm_scale,
            window_left=-1 if self._window is None else self._window - 1,
            q_data_type=q_dtype,
            kv_data_type=self.kv.buffers[0].dtype,
        )


class PagedLatentAttention(_PagedBase):
    """Multi-head latent attention over a `TorchMLAPool`, with the projections absorbed: one latent head for all.

    Args:
      kv: The view of the pool.
      num_heads: Query heads.
      sm_scale: Of the scores: `1 / sqrt(width of a head before absorption)`, and what the model multiplies it with.
      backend, workspace: As of `PagedAttention`.

    Attributes:
      backend: What attends.

    Raises:
      ArgumentError: The pool is of another kind or holds no floats.
      UnsupportedError: FlashInfer is asked for, but missing.
    """

    def __init__(
        self,
        kv: TorchKVPool,
        num_heads: int,
        sm_scale: float,
        *,
        backend: Backend | None = None,
        workspace: torch.Tensor | None = None,
    ):
        if not isinstance(kv.config, MLAConfig):
            raise ArgumentError(f"kv must be a view of an MLATokenToKVPool, got {type(kv).__name__}")
        self._rank, self._rope = kv.config.kv_lora_rank, kv.config.qk_rope_head_dim
        super().__init__(kv, num_heads, sm_scale, backend, workspace, None)

    def __call__(self, q_nope: torch.Tensor, q_rope: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Attends in one layer.

        Args:
          q_nope: `(queries, heads, rank)`, sequence after sequence, in the latent space.
          q_rope: `(queries, heads, rope)`.
          layer_id: As of the pool's getters.

        Returns:
          `(queries, heads, rank)`, in the latent space.

        Raises:
          As `PagedAttention`.
        """
        plan = self._plan_for(q_nope=(q_nope, self._rank), q_rope=(q_rope, self._rope))
        if self.backend is Backend.TRITON:
            return plan.wrapper.run(torch.cat([q_nope, q_rope], dim=-1), layer_id)
        (rows,) = self.kv.get_paged_buffers(layer_id)
        latent, rope = rows.split((self._rank, self._rope), dim=-1)
        if plan.wrapper is not None:
            return plan.wrapper.run(q_nope, q_rope, latent, rope)
        q = torch.cat([q_nope, q_rope], dim=-1)
        return self._gathered(plan, q, (rows.unsqueeze(2), latent.unsqueeze(2)), None)

    def _wrapper(self, flashinfer: types.ModuleType, is_decode: bool) -> Any:
        return flashinfer.mla.BatchMLAPagedAttentionWrapper(self._workspace)

    def _plan_wrapper(
        self, wrapper: Any, pages: PageTable, query_lens: np.ndarray, is_decode: bool, q_dtype: torch.dtype
    ) -> None:
        wrapper.plan(
            _starts(query_lens),
            torch.from_numpy(pages.indptr),
            torch.from_numpy(pages.indices).to(self.kv.device),
            torch.from_numpy(pages.kv_lens),
            self.num_heads,
            self._rank,
            self._rope,
            pages.page_size,
            not is_decode,  # causal
            self.sm_scale,
            q_dtype,
            self.kv.buffers[0].dtype,
        )


def _starts(query_lens: np.ndarray) -> torch.Tensor:
    """Where the queries of each sequence begin and end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32))


def _flashinfer() -> Any:
    import flashinfer
    import flashinfer.mla

    return flashinfer
