"""What a model is given in a session: looked at in each forward pass, and refused unless its KV follows from tokens.

A prefix is known by its token ids. So a column may stay only if it is the KV of one token, at the place that the token
has in its sequence, computed from the tokens before it and from nothing else. That is proven pass by pass, whatever
options brought it about:

    before a pass   the model is given the next tokens, at their positions, with the padding of the session
    after it        every layer has exactly these columns more; now they are confirmed, and can stay

What a pass may be given besides is a list of names that no KV depends on; all others are refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from jaxcache.errors import RequestStateError, UnsupportedError
from torch_bridge.sequences import Sequences
from torch_bridge.transformers_memory import ignores_padding

_PROVEN = ("attention_mask", "position_ids", "cache_position", "mm_token_type_ids")
"""Arguments that KV depends on, and that follow from the tokens of a session."""

_HARMLESS = ("input_ids", "past_key_values", "use_cache", "logits_to_keep", "labels", "return_dict")
"""Arguments that no KV depends on, or that are looked at by themselves."""

_KEPT_BESIDE = ("rope_deltas",)
"""Attributes in which models of images keep, from one call to the next, how far positions are from columns."""


class KnownModel:
    """What has a say in the KV of a model, beside the tokens before.

    Args:
      model: The model, or what wraps it.

    Attributes:
      given: As given.
      decoder: The model itself, which `generate` calls.
      accepted: What its forward pass can be given.
      limit: See `longest_prefix`.

    Raises:
      UnsupportedError: It is an encoder-decoder.
    """

    def __init__(self, model: Any):
        self.given = model
        self.decoder = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
        if self.decoder.config.is_encoder_decoder:
            raise UnsupportedError("model is an encoder-decoder, whose cross attention is not in a prefix cache")
        self.accepted = inspect.signature(self.decoder.forward)
        self.limit = longest_prefix(self.decoder)
        self._beside = [(part, name) for part in self.decoder.modules() for name in vars(part).keys() & _KEPT_BESIDE]
        self._ignores_padding: dict[tuple[int, ...] | None, bool] = {}

    def clear_beside(self) -> None:
        """Forgets what other calls left in the model: the positions of a session are those of its tokens."""
        for part, name in self._beside:
            setattr(part, name, None)

    def ignores_padding(self, positions: torch.Tensor | None) -> bool:
        """Whether KV behind padding is that of the tokens, with such positions or without; tried once."""
        dims = None if positions is None else tuple(positions.shape[:-2])
        if dims not in self._ignores_padding:
            self._ignores_padding[dims] = ignores_padding(self.decoder, dims)
        return self._ignores_padding[dims]


class ForwardCheck:
    """Looks at the forward passes of a model in a session. `sequences` learns of the columns that are proven.

    Args:
      model: The model.
      past: The cache of the session. A pass that is not given it, such as an assistant's, leaves nothing.
      sequences: The batch.

    Raises:
      UnsupportedError: KV of sequences of that length is not one of prefixes.
    """

    def __init__(self, model: KnownModel, past: Any, sequences: Sequences):
        self._model, self._past, self._sequences = model, past, sequences
        self._padding = torch.from_numpy(sequences.padding)[:, None].to(model.decoder.device)
        self._tokens: np.ndarray | None = None
        self._require_length(sequences.prompt.shape[1])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at every pass in the block."""
        self._model.clear_beside()
        with contextlib.ExitStack() as hooks:
            before = self._model.decoder.register_forward_pre_hook(self._before, with_kwargs=True)
            hooks.callback(before.remove)
            after = self._model.decoder.register_forward_hook(self._after)
            hooks.callback(after.remove)
            yield

    def _before(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises unless the pass computes the next tokens of the session, or leaves nothing in it."""
        self._tokens = None
        given = _arguments(self._model.accepted, args, kwargs)
        if given.get("past_key_values") is not self._past:
            return
        require_tokens_only(given)
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise UnsupportedError("input_ids must be (batch, columns): a prefix is known by its token ids, give these")
        if self._sequences.confirmed != self._sequences.length:
            raise RequestStateError(
                "a forward pass before this one broke off, or was not one of the whole model: leave the session"
            )
        self._tokens = self._next_tokens(given)
        self._model.clear_beside()

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Confirms the columns of a pass, if every layer has them."""
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return
        last = self._sequences.confirmed + tokens.shape[1]
        lengths = [layer.get_seq_length() for layer in self._past.layers]
        if any(length != last for length in (self._sequences.length, *lengths)):
            raise UnsupportedError(
                f"the model computed {tokens.shape[1]} columns, but its layers have {lengths} now instead of {last} "
                "each: it does not use the cache that it is given; use a DynamicCache"
            )
        self._sequences.confirm(tokens)

    def _next_tokens(self, given: Mapping[str, Any]) -> np.ndarray:
        """The tokens of a pass. Raises unless they, and what goes with them, are those of the session's next columns.

        Cost: one transfer from the device.
        """
        ids, sequences = given["input_ids"], self._sequences
        (rows, columns), first = ids.shape, sequences.length
        sequences.require_batch(rows)
        sequences.require_new(columns)
        self._require_length(first + columns)
        column = torch.arange(first + columns, device=self._padding.device)
        names = [name for name in _PROVEN if name in given]
        agreed = [self._agrees(name, given[name], first, column).reshape(1) for name in names]
        seen = torch.cat([part.flatten().long().to(column.device) for part in (ids, *agreed)]).cpu().numpy()
        wrong = [name for name, agrees in zip(names, seen[ids.numel() :], strict=True) if not agrees]
        wrong += self._missing_of_padding(given) if self._sequences.padding.any() else []
        if wrong:
            raise UnsupportedError(
                f"{wrong[0]} must be what follows from the session for {columns} columns behind the {first} that are "
                "there: positions count from the first token of each sequence, the mask has all columns; only where "
                "nothing is padded can they be left out"
            )
        tokens = seen[: ids.numel()].reshape(rows, columns)
        sequences.require_prompt(tokens)
        return tokens

    def _agrees(self, name: str, value: Any, first: int, column: torch.Tensor) -> torch.Tensor:
        """Whether an argument is what follows from the session, for the columns from `first` on."""
        no = column.new_zeros(())
        if not isinstance(value, torch.Tensor):
            return no
        value = value.to(column.device)
        if name == "mm_token_type_ids":
            return (value == 0).all()  # text
        is_token, position = column >= self._padding, column - self._padding
        if name == "attention_mask":
            return torch.all((value != 0) == is_token) if value.shape == is_token.shape else no
        rows, width = len(position), len(column) - first
        is_shaped = (
            1 <= value.ndim <= 3 and value.shape[-1] == width and (value.ndim == 1 or value.shape[-2] in (1, rows))
        )
        if not is_shaped:
            return no
        if name == "cache_position":
            return torch.all(value == column[first:])
        return torch.all((value == position[:, first:]) | ~is_token[:, first:])

    def _missing_of_padding(self, given: Mapping[str, Any]) -> list[str]:
        """What the model has to be told of padding, and is not."""
        positions = given.get("position_ids")
        if "attention_mask" not in given:
            return ["attention_mask"]
        if self._model.ignores_padding(positions):
            return []
        if positions is None and "position_ids" in self._model.accepted.parameters:
            return ["position_ids"]
        raise UnsupportedError(
            "attention_mask: this model counts positions from the first column, padding or not, so its KV is not that "
            "of the prompts: give it prompts of one length, without padding"
        )

    def _require_length(self, columns: int) -> None:
        longest = columns - int(self._sequences.padding.min())
        limit = self._model.limit
        if limit is not None and longest > limit:
            raise UnsupportedError(
                f"a sequence would have {longest} tokens, and from {limit + 1} on this model rotates keys by the "
                "length of the sequence (dynamic or longrope positions): KV does not belong to a prefix then, and none "
                "could be reused; use a DynamicCache for it"
            )


def longest_prefix(model: torch.nn.Module) -> int | None:
    """The most tokens of a sequence for which KV depends on nothing but the tokens before; None for any number.

    Rotary embeddings of two types take other frequencies for all of a sequence once it is longer than the model was
    trained for: `longrope` the long ones, `dynamic` (NTK) those of the greatest length so far. `dynamic` goes back to
    the first ones only below that length. All other types, yarn among them, scale by constants.

    Source: transformers 5.23 modeling_rope_utils.py, dynamic_rope_update.
    """
    limits = []
    for part in model.modules():
        own = vars(part)
        kinds = own.get("rope_type")
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                rope = own["config"].rope_parameters
                rope = rope if layer_type is None else rope[layer_type]
                limits.append(rope["original_max_position_embeddings"])
            elif isinstance(kind, str) and "dynamic" in kind:
                limits.append(own["original_max_seq_len"] - 1)
    return min(limits, default=None)


def require_tokens_only(given: Mapping[str, Any]) -> None:
    """Raises UnsupportedError if KV could depend on an argument of a forward pass that is not made of its tokens."""
    for name in given:
        if name not in (*_PROVEN, *_HARMLESS) and not name.startswith("output_"):
            raise UnsupportedError(
                f"{name}: KV may depend on it, and a prefix is known by its token ids alone: leave it out, or use a "
                "DynamicCache"
            )
    if given.get("use_cache") is False:
        raise UnsupportedError("use_cache is False, and the model is given a cache: set use_cache=True")


def _arguments(signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward pass is given, by name; without what is None, or a dict with nothing in it."""
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if is_rest else {name: value}
    return {name: value for name, value in given.items() if value is not None and not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value
