"""What rows are of: which layers of a model, which kind of row, of what shape and dtype.

Whatever leaves a pool carries the sizes of that pool, and is refused by another one unless both agree in every field
that says what a row is. Fields that say how many rows there are, and where they lie, may differ: a host copy goes to
other slots, to a pool of another size, layout or sharding. A snapshot, whose state dict names pages, wants more fields
the same (`jaxcache.snapshot.manifest`), by the same rule.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxcache.errors import ArgumentError

_WHERE = frozenset({"size", "num_states", "page_size", "layout", "axis_name", "shards", "end_layer"})
_MOST_NAMED = 4


def described(name: str, value: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """A record of sizes field by field, by dotted name, as JSON has it; a record within it likewise, and its kind.

    Args:
      name: That of the whole, in front of those of its fields.
      value: A config, or a field of one.
      without: Fields to leave out, at any depth.
    """
    if dataclasses.is_dataclass(value):
        fields: dict[str, Any] = {name: type(value).__name__}
        for field in dataclasses.fields(value):
            if field.name not in without:
                fields |= described(f"{name}.{field.name}", getattr(value, field.name), without)
        return fields
    if isinstance(value, enum.Enum):
        return {name: value.value}
    if isinstance(value, tuple):
        return {name: [int(item) for item in value]}
    if isinstance(value, np.dtype):
        return {name: value.name}
    return {name: value if value is None or isinstance(value, (bool, str)) else int(value)}


def require_same_rows(name: str, here: Any, there: Any) -> None:
    """Raises ArgumentError, naming both, unless rows of a pool of sizes `there` are rows of one of sizes `here`."""
    if here == there:
        return
    mine, theirs = (described("config", config, _WHERE) for config in (here, there))
    differ = [
        f"{field} is {mine.get(field)!r} here and {theirs.get(field)!r} there"
        for field in sorted(mine.keys() | theirs.keys())
        if mine.get(field) != theirs.get(field)
    ]
    if differ:
        raise ArgumentError(
            f"{name} must come from a pool of the same layers, rows and dtype, but {', '.join(differ[:_MOST_NAMED])}: "
            "what it holds would be wrong here; load it where it comes from, or compute it again"
        )
