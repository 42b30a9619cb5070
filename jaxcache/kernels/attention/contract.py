"""What all attention ops agree on: how KV lies in pages, who attends to what, and what is refused.

    page table (rows, max_pages)   row of a request, page i  ->  page of its tokens [i * P, (i + 1) * P)
    PageOrder.physical             layer, page               ->  page of the array seen as (-1, P, heads, dim)

An op reads the tokens of a request through its row of the page table, in place. Slots that no request owns are never
part of a result: those behind a request's last token, free pages, the sink. A NaN there stays there.

Logits are `scale * (q . k)`, capped as `cap * tanh(logit / cap)` if there is a soft cap. The softmax runs over the keys
of a query and, if there are sinks, one more logit without a value for each head. All of it is float32.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcache.errors import ArgumentError, UnsupportedError
from jaxcache.kernels.arguments import AnyArray, require_array, require_layer

if TYPE_CHECKING:
    from jaxtyping import Float32, Int32, Shaped

T = TypeVar("T")


@dataclass(frozen=True)
class PageOrder:
    """Where the pages of all layers lie in an array that is seen as `(pages of all layers, page_size, ...)`.

    Attributes:
      layers: Layers in the array.
      pages: Pages of each layer, the sink included.
      page_size: Tokens a page.
      page_major: Whether a page of all layers is one piece, rather than a layer.
    """

    layers: int
    pages: int
    page_size: int
    page_major: bool = False

    def physical(self, layer: Any, page: Any) -> Any:
        """The page of the array that is `page` of `layer`; for a layer outside the array, of the nearest one."""
        layer = jnp.clip(layer, 0, self.layers - 1)
        return page * self.layers + layer if self.page_major else layer * self.pages + page

    @property
    def rows(self) -> int:
        """Rows of all layers."""
        return self.layers * self.pages * self.page_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """The requests of a batch, as attention sees them. Padding requests have `seq_len == 0`.

    Attributes:
      pages: int32, the page table.
      row: int32, row of each request in it.
      prefix_len: int32, tokens a request had before this step.
      seq_len: int32, tokens it has now, those of this step included.
      first_token: int32, where the tokens of a request begin among those of the step: request after request, with or
        without padding between them.
    """

    pages: Int32[AnyArray, "rows max_pages"]
    row: Int32[AnyArray, " requests"]
    prefix_len: Int32[AnyArray, " requests"]
    seq_len: Int32[AnyArray, " requests"]
    first_token: Int32[AnyArray, " requests"]

    @property
    def requests(self) -> int:
        """Requests, padding included."""
        return self.row.shape[0]

    def check(self, page_size: int) -> None:
        """Refuses arrays that do not fit together, and lengths beyond the table as far as they are known on the host.

        Raises:
          ArgumentError: names the array.
        """
        for name in ("row", "prefix_len", "seq_len", "first_token"):
            array = getattr(self, name)
            require_array(name, array)
            if array.shape != self.row.shape or array.ndim != 1 or array.dtype != np.int32:
                raise ArgumentError(f"{name} must be int32, one a request, got {array.dtype}{list(array.shape)}")
        require_array("pages", self.pages)
        if self.pages.ndim != 2 or self.pages.dtype != np.int32:
            raise ArgumentError(
                f"pages must be an int32 table (rows, max_pages), got {self.pages.dtype}{list(self.pages.shape)}"
            )
        capacity = self.pages.shape[1] * page_size
        if isinstance(self.seq_len, Tracer) or not self.requests:
            return
        longest = int(np.max(self.seq_len))
        if longest > capacity:
            raise ArgumentError(
                f"seq_len must be at most {capacity}, what {self.pages.shape[1]} pages of {page_size} tokens hold, "
                f"got {longest}: raise max_context_len of the request table"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKV:
    """Keys and values of all layers, where they lie.

    Attributes:
      k: Keys in storage dtype, `(layers, slots, heads, k_dim)`, or page-major `(1, rows, heads, k_dim)`.
      v: Values, likewise; their heads may be of another width.
      k_scale: What an element of a key is worth: float32, one for all `()`, one a head `(heads,)`, or one for each row
        and head, shaped like `k` without its last dimension. None is 1.
      v_scale: The same for values.
      order: Where the pages of a layer lie.
      dtype: What the rows are. Arrays of unsigned integers of its width are bitcast.
    """

    k: Shaped[AnyArray, "stack rows heads k_dim"]
    v: Shaped[AnyArray, "stack rows heads v_dim"]
    k_scale: Float32[AnyArray, "..."] | None
    v_scale: Float32[AnyArray, "..."] | None
    order: PageOrder = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.k.shape[-2]

    def check(self) -> None:
        """Refuses arrays that do not have this order's pages, dtypes without numbers, and scales that fit neither.

        Raises:
          ArgumentError: names the array.
        """
        for name, array in (("k", self.k), ("v", self.v)):
            _check_rows(name, array, 4, self.order, self.dtype)
            if array.shape[:3] != self.k.shape[:3]:
                raise ArgumentError(f"v must have the rows and heads of k {self.k.shape}, got {array.shape}")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            scale_kind(name, scale, self.k.shape[:3])
        if self.dtype == np.int8 and (self.k_scale is None or self.v_scale is None):
            raise ArgumentError("k_scale and v_scale must be given for int8 rows: what their elements are worth")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLatent:
    """Latent rows of all layers, where they lie: one a token, its latent part and its rope part side by side.

    Attributes:
      rows: `(layers, slots, rank + rope)` in storage dtype, or page-major `(1, rows, rank + rope)`.
      scale: What an element is worth, float32 `()`; None is 1.
      order: Where the pages of a layer lie.
      dtype: What the rows are. Arrays of unsigned integers of its width are bitcast.
      rank: Width of the latent part, which is the value as well.
    """

    rows: Shaped[AnyArray, "stack rows rank+rope"]
    scale: Float32[AnyArray, ""] | None
    order: PageOrder = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})
    rank: int = field(metadata={"static": True})

    @property
    def rope(self) -> int:
        """Width of the rope part."""
        return self.rows.shape[-1] - self.rank

    def check(self) -> None:
        """As `PagedKV.check`."""
        _check_rows("rows", self.rows, 3, self.order, self.dtype)
        if not 0 < self.rank <= self.rows.shape[-1]:
            raise ArgumentError(f"rank must be in (0, {self.rows.shape[-1]}], the width of a row, got {self.rank}")
        if self.scale is not None and scale_kind("scale", self.scale, self.rows.shape[:2]) is not ScaleKind.TENSOR:
            raise ArgumentError(f"scale must be one float32 for all rows, got shape {np.shape(self.scale)}")
        if self.dtype == np.int8 and self.scale is None:
            raise ArgumentError("scale must be given for int8 rows: what their elements are worth")


class ScaleKind(enum.Enum):
    """What one scale stands for."""

    NONE = 0
    TENSOR = 1
    HEAD = 2
    ROW = 3


def scale_kind(name: str, scale: Any, rows: tuple[int, ...]) -> ScaleKind:
    """What `scale` is one of, for rows `(stack, rows, heads)`.

    Raises:
      ArgumentError: if it is none of them, or is not float32.
    """
    if scale is None:
        return ScaleKind.NONE
    require_array(name, scale)
    kinds = {(): ScaleKind.TENSOR, rows[2:]: ScaleKind.HEAD, rows: ScaleKind.ROW}
    if scale.dtype != np.float32 or scale.shape not in kinds:
        raise ArgumentError(
            f"{name} must be float32 of shape (), {rows[2:]} (one a head) or {rows} (one a row and head), "
            f"got {scale.dtype}{list(scale.shape)}"
        )
    return kinds[scale.shape] if scale.shape else ScaleKind.TENSOR


@dataclass(frozen=True)
class Masking:
    """How logits become weights; part of the compiled step.

    Attributes:
      scale: Multiplies `q . k`.
      window: How many of the last tokens a query attends to, its own included; None is all.
      soft_cap: Bound of a logit, or None.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, Tracer) or not math.isfinite(self.scale):
            raise ArgumentError(f"scale must be a finite number that is known while tracing, got {self.scale}")
        if self.window is not None and (not isinstance(self.window, (int, np.integer)) or self.window < 1):
            raise ArgumentError(f"window must be a positive integer, or None, got {self.window!r}")
        if self.soft_cap is not None and not (isinstance(self.soft_cap, (int, float)) and self.soft_cap > 0):
            raise ArgumentError(f"soft_cap must be a positive number, or None, got {self.soft_cap!r}")


def check_queries(q: Any, width: int, tokens: int | None = None) -> None:
    """Refuses queries that are not floats `(tokens, heads, width)`.

    Raises:
      ArgumentError: names what was expected.
    """
    require_array("q", q)
    fits = q.ndim == 3 and q.shape[2] == width and tokens in (None, q.shape[0])
    if not fits:
        raise ArgumentError(
            f"q must have shape ({'tokens' if tokens is None else tokens}, heads, {width}), got {q.shape}"
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ArgumentError(f"q must be float32, bfloat16 or float16, got {q.dtype}")


def check_group(q_heads: int, kv_heads: int) -> None:
    """Refuses query heads whose number is not a multiple of that of the KV heads.

    Raises:
      ArgumentError: names both.
    """
    if q_heads % kv_heads:
        raise ArgumentError(
            f"q must have a multiple of the pool's {kv_heads} KV heads, got {q_heads}: give it the heads of this shard"
        )


def check_sinks(sinks: Any, heads: int) -> None:
    """Refuses sinks that are not one float32 for each query head.

    Raises:
      ArgumentError: names what was expected.
    """
    if sinks is None:
        return
    require_array("sinks", sinks)
    if sinks.shape != (heads,) or sinks.dtype != np.float32:
        raise ArgumentError(f"sinks must be float32 of shape ({heads},), got {sinks.dtype}{list(sinks.shape)}")


def check_layer(layer: Any, order: PageOrder) -> None:
    """Refuses a layer that is not in the array, or is not an int32 scalar."""
    require_layer(layer, order.layers)


@jax.custom_jvp
def without_gradient(arrays: T) -> T:
    """The arrays as they are; to differentiate through them is refused.

    Raises:
      UnsupportedError: while a gradient is traced.
    """
    return arrays


@without_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise UnsupportedError(
        "attention over a paged cache has no gradient: it is for inference. "
        "Use jax.lax.stop_gradient on what goes in, or dense attention for training"
    )


def _check_rows(name: str, array: Any, ndim: int, order: PageOrder, dtype: np.dtype) -> None:
    require_array(name, array)
    if array.ndim != ndim or array.shape[0] * array.shape[1] != order.rows:
        raise ArgumentError(
            f"{name} must have {ndim} dimensions and {order.layers} x {order.pages} x {order.page_size} rows, "
            f"got {array.shape}"
        )
    is_number = dtype == np.int8 or jnp.issubdtype(dtype, jnp.floating)
    if not is_number:
        raise ArgumentError(f"dtype must be a float or int8, for attention to know what rows are worth, got {dtype}")
    is_stored = array.dtype == dtype or (array.dtype.kind == "u" and array.dtype.itemsize == dtype.itemsize)
    if not is_stored:
        raise ArgumentError(f"{name} must be stored as {dtype} or unsigned integers of its width, got {array.dtype}")
