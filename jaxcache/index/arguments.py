"""Checks of what callers hand to a cache."""

from __future__ import annotations

import numpy as np

from jaxcache.errors import ArgumentError


def require_amounts(**amounts: int) -> None:
    """Raises ArgumentError unless each is an integer that is not negative."""
    for name, amount in amounts.items():
        if not isinstance(amount, (int, np.integer)) or amount < 0:
            raise ArgumentError(f"{name} must be an integer and must not be negative, got {amount!r}")
