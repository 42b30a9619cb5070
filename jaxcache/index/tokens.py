"""Token lists of a request. They only grow: a token that may have KV is never replaced, and each one is an int32.

    FixedTokens   a list that never changes              a prompt
    TokenList     a list that is appended to, checked    what was sampled behind it

Both read like lists, at the same cost; what is cut out of them or added to them is a plain list.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NoReturn, Self, SupportsIndex

import numpy as np

from jaxcache.errors import RequestStateError
from jaxcache.index.key import pack

_append, _extend = list.append, list.extend
_FEW = 16
_FORMS = tuple([struct.Struct(f"{n}i") for n in range(_FEW + 1)])


class FixedTokens(list[int]):
    """Tokens that stay as they are.

    Raises:
      RequestStateError: On every attempt to change them.
    """

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RequestStateError(
            "origin_input_ids is fixed: its tokens are the request's key, and may have KV; make another request"
        )

    __setitem__ = __delitem__ = __imul__ = __iadd__ = _refuse
    insert = pop = remove = clear = reverse = append = extend = _refuse
    sort = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


class TokenList(FixedTokens):
    """Tokens that others follow.

    Raises:
      ArgumentError: A token must be an integer in the int32 range; nothing was appended.
      RequestStateError: On every attempt to change or take back what is in it.

    Cost: some 50 ns more to append than a list's own; nothing to read.
    """

    __slots__ = ()

    def __init__(self, token_ids: Iterable[int] = ()):
        super().__init__(_checked(token_ids))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RequestStateError(
            "output_ids only grows: what is in it may have KV, and can neither be changed nor taken back; append what "
            "was sampled, once it is known, or make another request"
        )

    __setitem__ = __delitem__ = __imul__ = _refuse
    insert = pop = remove = clear = reverse = _refuse
    sort = _refuse  # pyright: ignore[reportAssignmentType]

    def append(self, token: SupportsIndex, /) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Adds one token."""
        if token.__class__ is not int or not -2147483648 <= token <= 2147483647:  # pyright: ignore[reportOperatorIssue]
            (token,) = _checked([token])  # pyright: ignore[reportArgumentType]
        _append(self, token)  # pyright: ignore[reportArgumentType]

    def extend(self, token_ids: Iterable[int], /) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Adds tokens, all or none."""
        _extend(self, _checked(token_ids))

    def __iadd__(self, token_ids: Iterable[int]) -> Self:  # pyright: ignore[reportIncompatibleVariableOverride]
        _extend(self, _checked(token_ids))
        return self


def _checked(token_ids: Any) -> Iterable[int]:
    """Tokens as Python ints, in any form that a key takes."""
    if token_ids.__class__ is list and len(token_ids) <= _FEW:  # a few sampled tokens: the shortest way
        try:
            form = _FORMS[len(token_ids)]
            return form.unpack(form.pack(*token_ids))
        except (struct.error, TypeError):  # `pack` says which rule was broken
            pass
    return np.frombuffer(pack(token_ids), "<i4").tolist()
