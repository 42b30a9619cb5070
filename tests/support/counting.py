"""Costs that no clock blurs."""

from __future__ import annotations

import sys


def count_calls(function):
    """How many calls, of Python and of C functions, `function` makes: a cost that no clock blurs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
