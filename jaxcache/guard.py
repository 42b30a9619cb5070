"""Who may call, and what becomes of a call that is cut short: one rule for managers and caches, kept here.

    thread      the first call that changes something makes its thread the owner; other threads are refused,
                until `hand_over` or the owner's end
    cut short   a CacheError was raised before anything changed; the next call runs
                another Exception may have stopped a call halfway: before the next call the audit looks, once
                what can strike anywhere (KeyboardInterrupt, SystemExit, MemoryError) may leave what no audit sees, such
                as a lock that no request holds: the next call is refused

A call that runs to its end pays one comparison, that of its thread with the owner.

Source: jaxcache's own.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Any, Protocol, TypeVar

from jaxcache.errors import BrokenInvariantError, CacheError, ThreadError

_Read = TypeVar("_Read")
_Method = TypeVar("_Method", bound=Callable[..., Any])
_NOBODY = 0
"""No thread has this identity."""


class Guard:
    """Guards what belongs together: a manager with its cache, or a cache alone.

    Args:
      audit: Raises BrokenInvariantError if what is guarded is inconsistent.
      remedy: What to call where that is not to be mended: "call reset()".

    Attributes:
      thread: The owner's identity, while its calls need no closer look; compared by every guarded call.
      turn: Odd while a guarded call changes something; a number is never used again.
    """

    __slots__ = ("_audit", "_cut_short", "_doubtful", "_is_excused", "_owner", "_remedy", "thread", "turn")

    def __init__(self, audit: Callable[[], None], remedy: str):
        self._audit, self._remedy = audit, remedy
        self._owner = self.thread = _NOBODY
        self.turn = 0
        self.mend()

    def begin_anew(self, name: str) -> None:
        """A call makes all of it new, whatever it was: until `mend`, it is cut short.

        Raises:
          ThreadError: Another thread is the owner.
        """
        self.require_owner(name)
        self.thread, self._cut_short = _NOBODY, name

    def mend(self) -> None:
        """What is guarded is as new: nothing is cut short or doubtful any more."""
        self._cut_short = self._doubtful = ""
        self._is_excused = False

    def require_owner(self, name: str) -> None:
        """Makes this thread the owner if there is none, or none any more.

        Raises:
          ThreadError: Another thread is.
        """
        me = get_ident()
        if self._owner == me:
            return
        with _CLAIMS:
            if self._owner != _NOBODY and self._owner in sys._current_frames():
                raise ThreadError(
                    f"{name}: called from thread {me}, but thread {self._owner} made the first change and owns this: "
                    "call it from there, or hand_over() there first"
                )
            self._owner = me

    def look(self, name: str) -> None:
        """The closer look before a call: at its thread, and at what became of the calls before it.

        Raises:
          ThreadError: Another thread is the owner.
          BrokenInvariantError: A call was cut short, and what it left may be wrong.
        """
        self.require_owner(name)
        if self._cut_short:
            raise BrokenInvariantError(f"{name}: an earlier call was cut short, {self._cut_short}: {self._remedy}")
        if self._doubtful:
            self._cut_short, self._doubtful = self._doubtful, ""
            try:
                self._audit()
            except BrokenInvariantError as problem:
                said = f"{name}: an earlier call failed halfway, {self._cut_short}: {self._remedy}; {problem}"
                raise BrokenInvariantError(said) from problem
            self._cut_short = ""
        self.thread = get_ident()

    def hand_over(self) -> None:
        """The next thread that calls is the owner."""
        self._owner = self.thread = _NOBODY

    def failed(self, name: str, error: BaseException, is_audited: bool = True) -> None:
        """The outermost guarded call ends with an error.

        Args:
          name: Of the method.
          error: What it raises.
          is_audited: Whether the audit sees whatever the call may have left.
        """
        is_excused, self._is_excused = self._is_excused, False
        while error.__context__ is not None and error.__cause__ is None:  # raised while that one was undone
            error = error.__context__
        if is_excused or isinstance(error, CacheError):
            return
        self.thread = _NOBODY  # so that the next call looks
        said = f"{name} by {type(error).__name__}"
        if is_audited and isinstance(error, Exception) and not isinstance(error, (MemoryError, RecursionError)):
            self._doubtful = said
        else:
            self._cut_short = said

    def excuse(self) -> None:
        """The error that is about to end this call has changed nothing."""
        self._is_excused = True

    def between_calls(self, read: Callable[[], _Read]) -> _Read:
        """What `read` returns when no guarded call is under way, from any thread. Waits for one to end.

        The owner's own thread, such as an observer on it, does not wait.
        """
        if self._owner == get_ident():
            return read()
        while True:
            turn = self.turn
            if not turn & 1:
                value = read()
                if turn == self.turn:
                    return value
            time.sleep(0)  # the owner's turn

    @property
    def paused(self) -> _Paused:
        """A context in which nothing changes that `between_calls` reads, though a guarded call is under way."""
        return _Paused(self)


class _Paused:
    """See `Guard.paused`."""

    __slots__ = ("_guard",)

    def __init__(self, guard: Guard):
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.turn += 1

    def __exit__(self, *_: object) -> None:
        self._guard.turn += 1


_CLAIMS = threading.Lock()  # held for a few instructions, by the first call of a thread


class Guarded(Protocol):
    """What has a guard."""

    guard: Guard


def exclusive(method: _Method) -> _Method:
    """A method that changes what is guarded: of the owner's thread only, and noticed if it is cut short."""
    return _guarded(method, is_audited=True)


def exclusive_on_device(method: _Method) -> _Method:
    """The same for a method that changes what is on the device, which the audit does not see."""
    return _guarded(method, is_audited=False)


def _guarded(method: _Method, is_audited: bool) -> _Method:
    name = method.__name__

    @functools.wraps(method)
    def call(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        guard = self.guard
        if guard.thread != get_ident():
            guard.look(name)
        if guard.turn & 1:  # inside a guarded call, which may undo this one
            return method(self, *args, **kwargs)
        guard.turn += 1
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            guard.failed(name, error, is_audited)
            raise
        finally:
            guard.turn = (guard.turn | 1) + 1

    return call  # pyright: ignore[reportReturnType]


class Told:
    """A context around a call of an observer: what it raises is reported (`sys.unraisablehook`), and breaks nothing.

    Args:
      observer: Named in the report.
    """

    __slots__ = ("_observer",)

    def __init__(self, observer: object):
        self._observer = observer

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        report: Any = _Report(type(error), error, traceback, self._observer)
        sys.unraisablehook(report)
        return True


class _Report:
    """What `sys.unraisablehook` takes."""

    def __init__(self, kind: type, error: Exception, traceback: TracebackType | None, observer: object):
        self.exc_type, self.exc_value, self.exc_traceback = kind, error, traceback
        self.err_msg, self.object = "Exception ignored: an observer failed, the call that told it did not", observer
