"""Rows of a table, and what is said of each of them, as callers hand them over. NumPy only.

They run at every step: each is a test of a type or a length. That rows are not there NumPy finds out by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from jaxcache.arguments import as_integers
from jaxcache.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Integer

_Method = TypeVar("_Method", bound=Callable[..., Any])


def of_rows(method: _Method) -> _Method:
    """A method of a table whose first argument is `rows`: it gets integers, and refuses rows that are not there.

    The method must have looked at all its rows before it changes anything.
    """

    @functools.wraps(method)
    def call(self: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        rows = as_integers("rows", rows)
        try:
            return method(self, rows, *args, **kwargs)
        except IndexError as error:
            raise ArgumentError(f"rows must be in [0, {self.size}), and have what is said of them: {error}") from error

    return call  # pyright: ignore[reportReturnType]


def one_a_row(name: str, values: Any, rows: np.ndarray) -> Integer[np.ndarray, " rows"]:
    """`values` as integers, one for each of `rows`. Raises ArgumentError if they are not."""
    values = as_integers(name, values)
    if len(values) != len(rows):
        raise ArgumentError(f"{name} must be one a row, got {len(values)} for {len(rows)} rows")
    return values
