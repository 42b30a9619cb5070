"""Hugging Face `generate()` on a jaxcache pool, with prefixes shared between calls.

    cache = JaxPagedCache.for_model(model, tokens=65536)
    output = cache.generate(model, input_ids, max_new_tokens=100)     # the prompt is computed
    output = cache.generate(model, longer_ids, max_new_tokens=100)    # only what the first call did not compute

Keys and values are written through a shared torch view of the pool, and gathered for each layer's attention, which
transformers computes as ever. `DynamicCache` copies as much, when it appends.

A prefix is known by its token ids. So a cache is for one model; what else KV depends on, such as an adapter, goes into
`extra_key`; and a model that is given something else than tokens (`inputs_embeds`, images, positions of its own) is
refused before it runs: `torch_bridge.transformers_forward` looks at each forward pass, and what it confirms can stay.

Written for transformers 5.17 to 5.23, whose caches are lists of layers that say themselves how long they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Self

import numpy as np
import torch

from jaxcache.errors import ArgumentError, RequestStateError, UnsupportedError
from jaxcache.index.key import Namespace
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pools.layout import Layout
from jaxcache.pools.mha import MHAConfig
from jaxcache.pools.swa import SWAConfig
from torch_bridge.lend import share
from torch_bridge.sequences import Sequences
from torch_bridge.sequences import ShortageError as ShortageError

try:
    import transformers
    from transformers.cache_utils import Cache, CacheLayerMixin
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    message = "torch_bridge.transformers needs the extra `transformers`: pip install 'jaxcache[transformers]'"
    raise ModuleNotFoundError(message, name="transformers") from error

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        "torch_bridge.transformers needs transformers 5.17 or newer, whose caches know how long they are, got "
        f"{transformers.__version__}: pip install 'jaxcache[transformers]'"
    )

# ruff: isort: split
from torch_bridge.transformers_forward import ForwardCheck, KnownModel
from torch_bridge.transformers_memory import memory_config_for
from torch_bridge.transformers_options import effective_option, guesses_tokens, require_options


class JaxPagedCache(Cache):
    """A cache for `generate()` whose keys and values stay in a jaxcache pool between calls.

    A batch reuses as many columns as its sequences have in common: all that is cached of a single sequence, else the
    shortest hit, padding counted. Padding is on the left. Afterwards prompts and answers stay, in whole pages, until
    their room is needed.

    Not for beam search, several answers to one prompt (repeat it in `input_ids` instead), encoder-decoder models,
    recurrent layers, training, offloading or `torch.compile` of the model: each is refused. Assisted and prompt-lookup
    decoding work. Where positions are rotated by the length of the sequence (dynamic NTK, longrope), sequences longer
    than the model was trained for are refused, since KV is not that of a prefix then.

    Args:
      memory: Owner of the pool, an `MHAConfig` or `SWAConfig` one, on the device of the model. Its other requests may
        run and be cached beside those of `generate()`, under the same token ids.
      windows: Tokens that each layer attends to; None for all.
      model: The model that the cache is for. `session` needs to know it, here or there; `generate` is told.

    Attributes:
      memory: As given.

    Raises:
      UnsupportedError: The memory is of another kind.
      ArgumentError: `windows` is not one for each layer of the pool, or longer than the memory keeps.
    """

    def __init__(self, memory: MemoryManager, windows: Sequence[int | None], model: Any = None):
        kv = memory.config.kv
        if not isinstance(kv, (MHAConfig, SWAConfig)) or memory.config.states is not None:
            raise UnsupportedError(f"memory: need one for keys and values, an MHAConfig or SWAConfig, got {kv}")
        sides = (kv.full, kv.window) if isinstance(kv, SWAConfig) else (kv,)
        if any(side.layout is Layout.PAGE_MAJOR for side in sides):
            raise UnsupportedError("memory: need Layout.LAYER_MAJOR, since layers are read whole; got page-major")
        num_layers = len(kv.full_layers) + len(kv.window_layers) if isinstance(kv, SWAConfig) else kv.layer_num
        if len(windows) != num_layers:
            raise ArgumentError(f"windows must be one for each of the {num_layers} layers, got {len(windows)}")
        for layer in kv.window_layers if isinstance(kv, SWAConfig) else ():
            window, most = windows[layer], memory.config.sliding_window_size or 0
            if window is None or window > most:
                raise ArgumentError(
                    f"windows: layer {layer} is on the window side, which keeps {most} tokens, got {window}"
                )
        self.memory = memory
        self._model = None if model is None else KnownModel(model)
        self._session: _Session | None = None
        self._paged = [PagedLayer(self, i, window) for i, window in enumerate(windows)]
        super().__init__(layers=[*self._paged])

    @classmethod
    def for_model(
        cls,
        model: Any,
        tokens: int,
        *,
        page_size: int = 16,
        max_batch: int = 16,
        window_tokens: int | None = None,
    ) -> Self:
        """A cache with memory of its own, with the layers, dtype and widths that the model shows on one token.

        Args:
          model: A decoder with a language model's head, on the device that JAX uses by default.
          tokens: Room in the pool: of running sequences and of what stays. A multiple of `page_size`.
          page_size: Tokens a page; prefixes are shared in whole pages.
          max_batch: Most sequences at once.
          window_tokens: Room for the layers with a sliding window, if there are others too. By default `tokens`. Less
            will do: what a forward pass computes at once, some windows before it, and what is generated.

        Raises:
          UnsupportedError: A layer keeps something else than keys and values of its own, or those of a kind differ, or
            they do not follow from the tokens before.
          ArgumentError: The sizes do not fit together.

        Cost: four forward passes of one or two tokens.
        """
        config, windows = memory_config_for(model, tokens, page_size, max_batch, window_tokens)
        return cls(init_memory_pool_and_cache(config), windows, model)

    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        extra_key: str | bytes | Namespace | None = None,
        **options: Any,
    ) -> Any:
        """`model.generate(input_ids, **options)` in a session, with what it generates kept.

        Args:
          model: The model that the cache is for.
          input_ids: `(batch, columns)` whole prompts, padded on the left.
          attention_mask: Likewise, 0 for padding. None if there is none: padding is not guessed from token ids.
          extra_key: Namespace, such as the name of an adapter.
          **options: Any of `generate`'s. Where the model or its configs say `use_cache=False`, it is used nevertheless.

        Returns:
          What `generate` returns.

        Raises:
          ArgumentError: No such prompts, or a sequence becomes longer than the memory allows.
          ShortageError: Memory is short, though all that can be is evicted.
          UnsupportedError: The options ask for what a `JaxPagedCache` cannot do, or give the model more than tokens.

        After an error nothing is held; the prompt stays cached as far as it was computed. Where `generate` guesses
        tokens (prompt lookup, an assistant), it gives the model whole prompts, and they are computed.
        """
        require_options(model, options)
        if effective_option(model, options, "use_cache") is False:
            options["use_cache"] = True
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        reuse = not guesses_tokens(model, options)
        with self.session(input_ids, mask, extra_key=extra_key, reuse=reuse, model=model):
            output = model.generate(input_ids, attention_mask=mask, past_key_values=self, **options)
            sequences = self.open_session.sequences
            if sequences.confirmed == sequences.reused:
                raise UnsupportedError("the model did not use the cache that it was given: call model.generate itself")
            sequences.keep()
        return output

    @contextlib.contextmanager
    def session(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        extra_key: str | bytes | Namespace | None = None,
        reuse: bool = True,
        model: Any = None,
    ) -> Iterator[Self]:
        """What `generate` does around the model, for a loop of your own.

            with cache.session(input_ids, mask) as past:
                output = model.generate(input_ids, attention_mask=mask, past_key_values=past)
                past.keep(output)

        In the block, `get_seq_length()` columns are there already: pass the model what comes after them, or `generate`
        everything. Without `keep`, only the prompts stay. A forward pass of the model that is given more than the next
        tokens raises UnsupportedError, and what is computed otherwise than by passes of the whole model does not stay.

        Args:
          input_ids, attention_mask, extra_key: As for `generate`.
          reuse: False if the model will be given whole prompts, whatever is cached of them.
          model: The model of the loop; by default the cache's. If there is none, nothing that is computed stays.

        Raises:
          RequestStateError: A session is open already.
          ArgumentError, ShortageError, UnsupportedError: As `generate`.
        """
        if self._session is not None:
            raise RequestStateError("a session of this JaxPagedCache is open: leave it first, or make another cache")
        tokens = input_ids.detach().cpu().numpy()
        is_token = np.ones_like(tokens, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
        with contextlib.ExitStack() as stack:
            view = stack.enter_context(share(self.memory.pool))
            sequences = Sequences(self.memory, view.device, tokens, is_token, extra_key, reuse)
            stack.callback(sequences.close)
            is_own = model is None or (self._model is not None and self._model.given is model)
            known = self._model if is_own else KnownModel(model)
            if known is not None:
                stack.enter_context(ForwardCheck(known, self, sequences).watching())
            for layer in self._paged:
                layer.length = sequences.reused
            self._session = session = _Session(sequences, view, is_watched=known is not None)
            stack.callback(setattr, self, "_session", None)
            yield self
            if session.kept is not None:
                sequences.keep(session.kept)

    def keep(self, output_ids: torch.Tensor) -> None:
        """Says, in a session, which tokens the model was given: what `generate` returns.

        Args:
          output_ids: `(batch, columns)`, beginning with the prompts. It is kept as far as the model was given it.

        Raises:
          ArgumentError: (leaving the session) It does not begin with the prompts.
          RequestStateError: No session is open, or one without a model.
        """
        session = self.open_session
        if not session.is_watched:
            raise RequestStateError("nothing is known of what a model was given: open the session with model=...")
        session.kept = output_ids.detach().cpu().numpy()

    @property
    def open_session(self) -> _Session:
        """For the layers: the batch and the torch view of the pool. Raises RequestStateError outside of a session."""
        if self._session is None:
            raise RequestStateError("no session is open: `with cache.session(input_ids) as past:`, or cache.generate")
        return self._session

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Forgets the last `-tokens_to_remove` columns, which were generated. For assisted decoding.

        Raises:
          ArgumentError: The number is positive, or reaches into the prompts.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding counts on the device
        if tokens_to_remove > 0:
            raise ArgumentError(f"tokens_to_remove must be negative or 0, as in transformers, got {tokens_to_remove}")
        self.open_session.sequences.shrink(-tokens_to_remove)
        for layer in self._paged:
            layer.length += tokens_to_remove

    def reset(self) -> NoReturn:
        """Refused: leave the session instead."""
        _refuse("reset", "leave the session; `cache.memory.cache.drop(None)` forgets what is cached")

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Refused: beam search moves sequences about."""
        _refuse("reorder_cache", "use num_beams=1, or a DynamicCache")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused: a batch is what the session was opened with."""
        _refuse("batch_repeat_interleave", "repeat the prompts in input_ids; they share their pages afterwards")

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        """Refused, as `batch_repeat_interleave`."""
        _refuse("batch_select_indices", "open a session with the prompts that are left")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> NoReturn:
        """Refused: a pool is in one memory."""
        _refuse("prefetch", "use a DynamicCache(offloading=True)")

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> NoReturn:
        """Refused, as `prefetch`."""
        _refuse("offload", "use a DynamicCache(offloading=True)")

    def early_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the pool is there already."""
        _refuse("early_initialization", "it is not needed; models with this cache cannot be exported")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refused: copies would own the same pages. They are not needed to reuse a prefix."""
        _refuse("copy.deepcopy", "use the cache itself again: it finds the prefix")


class PagedLayer(CacheLayerMixin):
    """One layer of a `JaxPagedCache`.

    Args:
      cache: Whose.
      index: Which, from 0.
      window: Tokens that it attends to; None for all.

    Attributes:
      length: Columns that the layer has keys and values of.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: JaxPagedCache, index: int, window: int | None):
        super().__init__()
        self._cache, self._index, self._window = cache, index, window
        kv = cache.memory.config.kv
        self._is_window = isinstance(kv, SWAConfig) and index in kv.window_layers
        self.is_sliding = window is not None
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the KV of the next columns, `(batch, heads, n, dim)`, and returns that of all that are attended to.

        Raises:
          ArgumentError: The batch is not that of the session; or as `grow` and the pool's setter.
          UnsupportedError: A gradient is to flow through, or some layers were left out.
          ShortageError: Memory is short.
          RequestStateError: No session is open.
        """
        session = self._cache.open_session
        sequences, view = session.sequences, session.view
        rows, _, columns, _ = key_states.shape
        sequences.require_batch(rows)
        if key_states.requires_grad or value_states.requires_grad:
            raise UnsupportedError("no gradient flows through a pool: run the model under torch.no_grad()")
        if self.length == sequences.length:
            sequences.grow(columns)
        if self.length + columns != sequences.length or columns != sequences.fresh.shape[1]:
            raise UnsupportedError(
                f"layer {self._index} has {self.length} columns and gets {columns} more, others have "
                f"{sequences.length}: every layer must be updated once in each forward pass"
            )
        flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (key_states, value_states))
        view.set_kv_buffer(self._index, sequences.fresh.flatten(), *flat)
        visible, _ = self.get_mask_sizes(columns)
        self.length = sequences.length
        slots = sequences.window_slots if self._is_window else sequences.slots
        slots = slots[:, -visible:]
        keys, values = (buffer[slots].transpose(1, 2) for buffer in view.get_kv_buffer(self._index))
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `update` will return for that many new ones, and which is the first."""
        past = self.length if self._window is None else min(self.length, self._window - 1)
        return past + query_length, self.length - past

    def get_seq_length(self) -> int:
        """Columns that the layer has keys and values of."""
        return self.length

    def get_max_length(self) -> int:
        """Most tokens of a sequence."""
        return self._cache.memory.config.max_context_len

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the pool is there already."""

    def reset(self) -> NoReturn:
        """Refused, as all of the cache is one."""
        self._cache.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Refused, as `JaxPagedCache.reorder_cache`."""
        self._cache.reorder_cache(beam_idx)

    def offload(self) -> NoReturn:
        """Refused, as `JaxPagedCache.offload`."""
        self._cache.offload(self._index)

    def prefetch(self) -> NoReturn:
        """Refused, as `JaxPagedCache.prefetch`."""
        self._cache.prefetch(self._index)


class _Session:
    """What an open session consists of."""

    def __init__(self, sequences: Sequences, view: Any, is_watched: bool):
        self.sequences, self.view, self.is_watched = sequences, view, is_watched
        self.kept: np.ndarray | None = None


def _refuse(what: str, remedy: str) -> NoReturn:
    raise UnsupportedError(f"a JaxPagedCache does not support {what}: {remedy}")
