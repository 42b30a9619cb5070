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
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from jaxcache.errors import RequestStateError, UnsupportedError
from torch_bridge.sequences import Sequences

_PROVEN = ("attention_mask", "position_ids", "cache_position", "mm_token_type_ids")
"""Arguments that KV depends on, and that follow from the tokens of a session."""

_HARMLESS = ("input_ids", "past_key_values", "use_cache", "logits_to_keep", "labels", "return_dict")
"""Arguments that no KV depends on, or that are looked at by themselves."""

_KEPT_BESIDE = ("rope_deltas",)
"""Attributes in which models of images keep, from one call to the next, how far positions are from columns."""

_OF_GENERATE = inspect.signature(vars(GenerationMixin)["generate"]).parameters.keys() | vars(GenerationConfig()).keys()


class ForwardCheck:
    """Looks at the forward passes of a model in a session. `sequences` learns of the columns that are proven.

    Args:
      model: The model, or what wraps it.
      past: The cache of the session. A pass that is not given it, such as an assistant's, leaves nothing.
      sequences: The batch.

    Raises:
      UnsupportedError: The model's KV is not one of prefixes, or not for sequences of that length.
    """

    def __init__(self, model: Any, past: Any, sequences: Sequences):
        decoder = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
        if decoder.config.is_encoder_decoder:
            raise UnsupportedError("model is an encoder-decoder, whose cross attention is not in a prefix cache")
        self._model, self._past, self._sequences = decoder, past, sequences
        self._limit = longest_prefix(decoder)
        self._accepted = inspect.signature(decoder.forward)
        self._padding = torch.from_numpy(sequences.padding)[:, None].to(decoder.device)
        self._beside = [(part, name) for part in decoder.modules() for name in vars(part).keys() & _KEPT_BESIDE]
        self._tokens: np.ndarray | None = None
        self._require_length(sequences.prompt.shape[1])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Looks at every pass in the block."""
        self._clear_beside()
        with contextlib.ExitStack() as hooks:
            before = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
            hooks.callback(before.remove)
            after = self._model.register_forward_hook(self._after)
            hooks.callback(after.remove)
            yield

    def _clear_beside(self) -> None:
        """Forgets what other calls left in the model: the positions of a session are those of its tokens."""
        for part, name in self._beside:
            setattr(part, name, None)

    def _before(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises unless the pass computes the next tokens of the session, or leaves nothing in it."""
        self._tokens = None
        given = _arguments(self._accepted, args, kwargs)
        if given.get("past_key_values") is not self._past:
            return
        require_tokens_only(given)
        if "input_ids" not in given:
            raise UnsupportedError("input_ids are missing: a prefix is known by its token ids; give the model these")
        if self._sequences.confirmed != self._sequences.length:
            raise RequestStateError(
                "a forward pass before this one broke off, or was not one of the whole model: leave the session"
            )
        self._tokens = self._next_tokens(given)
        self._clear_beside()

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
        wrong = self._wrong_by_shape(given, first + columns)
        padding = self._padding
        column = torch.arange(first + columns, device=padding.device)
        is_token, position = column >= padding, column - padding
        agree = {
            "attention_mask": lambda value: (value != 0) == is_token,
            "position_ids": lambda value: (value == position[:, first:]) | ~is_token[:, first:],
            "cache_position": lambda value: value == column[first:],
            "mm_token_type_ids": lambda value: value == 0,  # text
        }
        names = [name for name in _PROVEN if name in given and name not in wrong]
        agreed = [agree[name](given[name].to(padding.device)).all().reshape(1) for name in names]
        seen = torch.cat([part.flatten().long().to(padding.device) for part in (ids, *agreed)]).cpu().numpy()
        wrong += [name for name, agrees in zip(names, seen[ids.numel() :], strict=True) if not agrees]
        if wrong:
            raise UnsupportedError(
                f"{wrong[0]} must be what follows from the session for {columns} columns behind the {first} that are "
                "there: positions count from the first token of each sequence, the mask has all columns; only where "
                "nothing is padded can they be left out"
            )
        tokens = seen[: ids.numel()].reshape(rows, columns)
        sequences.require_prompt(tokens)
        return tokens

    def _wrong_by_shape(self, given: Mapping[str, Any], last: int) -> list[str]:
        """Names of what is missing though the batch is padded, or has a shape that cannot be right."""
        rows, columns = given["input_ids"].shape
        wrong = []
        if self._sequences.padding.any():
            needed = ["attention_mask", *({"position_ids"} & self._accepted.parameters.keys())]
            wrong += [name for name in needed if name not in given]
        for name in given.keys() & _PROVEN:
            value, width = given[name], last if name == "attention_mask" else columns
            most = 2 if name == "attention_mask" else 3  # positions of images have a dimension more
            is_tensor = isinstance(value, torch.Tensor) and 1 <= value.ndim <= most
            if not is_tensor or value.shape[-1] != width or (value.ndim > 1 and value.shape[-2] not in (1, rows)):
                wrong.append(name)
        return wrong

    def _require_length(self, columns: int) -> None:
        longest = columns - int(self._sequences.padding.min())
        if self._limit is not None and longest > self._limit:
            raise UnsupportedError(
                f"a sequence would have {longest} tokens, and from {self._limit + 1} on this model rotates keys by the "
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


def require_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raises UnsupportedError on options of `generate` that do without the cache, or give the model more than tokens.

    What they bring to the model is looked at again in each forward pass; here it is refused before anything runs.
    """
    of_model = {name: value for name, value in options.items() if name not in _OF_GENERATE}
    require_tokens_only({name: value for name, value in of_model.items() if isinstance(value, torch.Tensor)})
    if options.get("use_cache") is False:
        raise UnsupportedError("use_cache=False: then nothing is cached; call model.generate itself")
    for name in ("inputs", "past_key_values"):
        if options.get(name) is not None:
            raise UnsupportedError(f"{name}: a session has its own: give the prompts as input_ids, and no other cache")
    implementation = effective_option(model, options, "cache_implementation")
    if implementation not in (None, "hybrid"):  # transformers takes "hybrid" for None
        raise UnsupportedError(
            f"cache_implementation is {implementation!r}: this is another cache; set it to None, also in "
            "model.generation_config"
        )


def effective_option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """An option as `generate` sees it: of the call, else of its generation config, else of the model's."""
    config = options.get("generation_config")
    for source in (options, {} if config is None else vars(config), vars(model.generation_config)):
        if source.get(name) is not None:
            return source[name]
    return None


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
