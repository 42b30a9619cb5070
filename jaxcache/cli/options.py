"""Options of a command from the fields of a config record: name, type and default are said once, in the record."""

# No `from __future__ import annotations` here: typer reads the annotations as objects.
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, get_type_hints


def takes(record: type, options: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes `command(config, **own)` a command for typer that takes the fields of `record` as options.

    Args:
      record: A frozen dataclass, each of whose fields has a default.
      options: What typer is told of each field (an `Option` or an `Argument`), in the order of the help.
    """
    hints, defaults = get_type_hints(record), {field.name: field.default for field in fields(record)}
    taken = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=Annotated[hints[name], option]
        )
        for name, option in options.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(inspect.signature(command).parameters.values())[1:]]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            config = record(**{name: given.pop(name) for name in options})
            command(config, **given)

        signature = inspect.Signature([*taken, *own])
        run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate
