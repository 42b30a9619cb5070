"""What `generate` is asked for: refused before anything runs, where a `JaxPagedCache` could not serve it rightly."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from jaxcache.errors import UnsupportedError
from torch_bridge.transformers_forward import require_tokens_only

_OF_GENERATE = inspect.signature(vars(GenerationMixin)["generate"]).parameters.keys() | vars(GenerationConfig()).keys()


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


def guesses_tokens(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether `generate` guesses tokens, which it then gives the model behind the whole prompt, cached or not."""
    names = ("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model", "use_mtp")
    return any(effective_option(model, options, name) for name in names)
