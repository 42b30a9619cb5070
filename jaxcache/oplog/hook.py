"""A hook around the operations of a class: one function sees every call before and after it is made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

_Hooked = TypeVar("_Hooked", bound=type)


class Around(Protocol):
    """What a hooked class has."""

    def around(self, name: str, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Makes one call of the operation `name`, by `call()`, and returns what it returns.

        Args:
          name: Of the method.
          arguments: By the names of its parameters, defaults included.
          call: The call; to be made once.
        """


def hooked(names: Iterable[str]) -> Callable[[_Hooked], _Hooked]:
    """A class decorator: calls of the methods `names`, inherited or not, go through the method `around`.

    Their signatures and docstrings stay.
    """

    def decorate(cls: _Hooked) -> _Hooked:
        for name in names:
            setattr(cls, name, _through_hook(name, getattr(cls, name)))
        return cls

    return decorate


def _through_hook(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self: Around, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        return self.around(name, arguments, functools.partial(method, self, *args, **kwargs))

    return call
