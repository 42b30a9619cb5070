"""Interrupts at each line that a call runs, as a signal or another thread could raise them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jaxcache

ROOT = str(Path(jaxcache.__file__).parent)
NOT_INTERRUPTED = str(Path(ROOT) / "guard.py")
"""CPython looks for signals after calls and at jumps back: none comes between the assignments of the guard itself."""


def interrupted(call: Callable[[], object], line: int, error: type[BaseException]) -> bool:
    """Makes a call that `error` ends before the `line`-th line of the package that it runs; whether it came so far."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        name = frame.f_code.co_filename
        if not name.startswith(ROOT) or name == NOT_INTERRUPTED:
            return None if not name.startswith(ROOT) else trace
        if event == "line":
            if not left:
                sys.settrace(None)
                left = -1
                raise error("planted")
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except BaseException:
        if left >= 0:
            raise
    finally:
        sys.settrace(before)
    return left < 0
