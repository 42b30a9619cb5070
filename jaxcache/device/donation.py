"""The one door for donated steps outside the user's own jit.

A step that updates a pool must own its buffers, or XLA copies the whole pool, silently. `donating(step)` jits a step so
that every pool it is given is donated, and refuses, before anything is lost, what could not be donated safely: a pool
that an earlier step consumed already, a pool that another framework looks into, a buffer that stands in two pools, a
pool that hides among arrays which are not to be donated. `reading(step)` is its twin for steps that only look. Both
tell the views that another framework has of a pool's memory what is about to happen there, and what happened.

Source: jaxcache's own; SGLang mutates tensors in place and needs none of this.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, cast

import jax
from jax.core import Tracer

from jaxcache.device.placing import host_arrays_placed, on_device
from jaxcache.device.pool import DevicePool, _is_deleted, _views_of
from jaxcache.errors import ArgumentError, BorrowedError

P = ParamSpec("P")
R = TypeVar("R")


def donating(step: Callable[P, R], *, static_argnames: str | Iterable[str] = ()) -> DonatingStep[P, R]:
    """Jits `step` so that every pool among its positional arguments is donated and updated in place.

    A positional argument may also be a list, tuple or dict of pools, nested as you like; it is donated as a whole.

    Called with traced pools, inside another jit, the step is simply traced as a part of that jit, which then
    decides what is donated.

    Args:
      step: A pure function that returns every pool it was given, updated or not.
      static_argnames: Names of the arguments that are compiled in, as for `jax.jit`.

    Returns:
      A callable with the signature of `step`. The pools passed to it are consumed. Keep it: it holds the compiled
      steps.

    Raises:
      StalePoolError: (calling) if a pool was consumed before.
      BorrowedError: (calling) if a pool is borrowed, or its memory is held by another framework.
      ArgumentError: (calling) if there is no pool to donate, a pool is passed by keyword or in a container beside other
        things, two pools share a buffer, or a pool is a constant of a function being traced.

      In all these cases nothing is lost: every pool is as it was.

    Cost: some microseconds a call beyond `jax.jit`; compiles once per set of argument shapes and of positions that hold
      pools, and once more for pools that another framework shares.
    """
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    return DonatingStep(step, names)


def reading(step: Callable[P, R], *, static_argnames: str | Iterable[str] = ()) -> Callable[P, R]:
    """Jits `step`, which only reads the pools among its positional arguments, and leaves them where and as they are.

    A pool that no other framework sees may as well be read in a plain `jax.jit`. Of one that is shared, this reads what
    the other framework wrote before, and not what it writes afterwards.

    Args:
      step: A pure function.
      static_argnames: Names of the arguments that are compiled in, as for `jax.jit`.

    Returns:
      A callable with the signature of `step`.

    Raises:
      StalePoolError: (calling) if a pool was consumed.

    Cost: some microseconds a call beyond `jax.jit`.
    """
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)

    @functools.wraps(step)
    def with_done(*args: P.args, **kwargs: P.kwargs) -> tuple[R, jax.Array]:
        return step(*args, **kwargs), jax.numpy.zeros((), bool)  # what a program returns is ready when all of it is

    static = _static_places(step, names)
    jitted = jax.jit(with_done, static_argnames=names)
    waiting = jax.jit(_waiting(with_done), static_argnames=names, keep_unused=True)

    @functools.wraps(step)
    def read(*args: P.args, **kwargs: P.kwargs) -> R:
        parts = [part for arg in args for pool in _pools_of(arg) for part in pool.with_parts()]
        if any(isinstance(leaf, Tracer) for leaf in jax.tree_util.tree_leaves(parts)):
            return step(*args, **kwargs)
        for part in parts:
            part.require_live()
        args, kwargs = host_arrays_placed(args, kwargs, parts[0].buffers[0] if parts else None, static)
        views = _views_of(parts)
        if views:
            result, done = waiting(*args, **kwargs, _wait_for=[on_device(view.before_step()) for view in views])
        else:
            result, done = jitted(*args, **kwargs)
        for part in parts:
            object.__setattr__(part, "last_read", done)
        for view in views:
            view.after_read(done)
        return result

    return read


def is_update(returned: Any, pool: DevicePool) -> bool:
    """Whether a step that was given `pool` returned a pool of the same kind, sizes and dtypes."""
    same_tree = jax.tree_util.tree_structure(returned) == jax.tree_util.tree_structure(pool)
    leaves = zip(jax.tree_util.tree_leaves(returned), jax.tree_util.tree_leaves(pool), strict=False)
    return same_tree and all(mine.shape == theirs.shape and mine.dtype == theirs.dtype for mine, theirs in leaves)


class DonatingStep(Generic[P, R]):
    """A step made by `donating`. Like a jitted function it can be called, or lowered to be looked at."""

    def __init__(self, step: Callable[P, R], static_argnames: Sequence[str]):
        functools.update_wrapper(self, step)
        self._step = step
        self._name = vars(self).get("__qualname__", repr(step))
        self._static_argnames = tuple(static_argnames)
        self._static = _static_places(step, self._static_argnames)
        self._jitted: dict[tuple[tuple[int, ...], bool], Any] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        by_position = _pools_by_position(args, kwargs)
        pools = list(itertools.chain.from_iterable(by_position.values()))
        leaves = jax.tree_util.tree_leaves(pools)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return self._step(*args, **kwargs)
        parts = [part for pool in pools for part in pool.with_parts()]
        _refuse_unsafe(parts, leaves, args)
        views, positions = _views_of(parts), tuple(by_position)
        if not views:
            return self._dispatch(positions, args, kwargs)
        result = self._dispatch(
            positions, args, kwargs | {"_wait_for": [on_device(view.before_step()) for view in views]}
        )
        returned = _pools_in(result)
        for view in views:
            view.after_step(self._name, returned)
        return result

    def on_own_pools(self, count: int, *args: Any) -> R:
        """A call by the owner of the pools, who passes them as the first `count` arguments, and no others.

        It is cheaper: what a call makes sure of beforehand is looked for when JAX refuses, which it does before
        anything is lost. Pools that another framework shares are called as ever.
        """
        if any(pool.is_shared for pool in args[:count]):
            return cast(Any, self)(*args)
        try:
            return self._dispatch(tuple(range(count)), args, {})
        except (RuntimeError, ValueError):
            for pool in args[:count]:
                pool.require_live()
            raise

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """Lowers the step as a call would, consuming nothing; the arrays may be `jax.ShapeDtypeStruct`s."""
        return self._jit(tuple(_pools_by_position(args, kwargs))).lower(*args, **kwargs)

    def _dispatch(self, positions: tuple[int, ...], args: Any, kwargs: Any) -> R:
        first = jax.tree_util.tree_leaves(args[positions[0]])[0]
        args, kwargs = host_arrays_placed(args, kwargs, first, self._static)
        try:
            return self._jit(positions, "_wait_for" in kwargs)(*args, **kwargs)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # A GPU refuses to donate memory that a DLPack view holds; the arrays stay valid.
            if "external reference" not in str(error):
                raise
            raise BorrowedError(
                "a pool was to be donated while another framework holds a view of its memory: drop the view first"
            ) from error

    def _jit(self, positions: tuple[int, ...], waits: bool = False) -> Any:
        jitted = self._jitted.get((positions, waits))
        if jitted is None:

            @functools.wraps(self._step)
            def checked(*args: P.args, **kwargs: P.kwargs) -> R:
                # Traced once, where looking through every argument costs nothing.
                _refuse_hidden({i: arg for i, arg in enumerate(args) if i not in positions} | kwargs)
                return self._step(*args, **kwargs)

            jitted = jax.jit(
                _waiting(checked) if waits else checked,
                donate_argnums=positions,
                static_argnames=self._static_argnames,
                keep_unused=waits,
            )
            self._jitted[positions, waits] = jitted
        return jitted


def _static_places(step: Callable, names: Sequence[str]) -> frozenset[int | str]:
    """Names of static arguments, and where they stand when they are passed by position."""
    if not names:
        return frozenset()
    parameters = inspect.signature(step).parameters.values()
    return frozenset(names) | {
        i for i, one in enumerate(parameters) if one.name in names and one.kind is not one.KEYWORD_ONLY
    }


def _waiting(step: Callable[..., R]) -> Callable[..., R]:
    """`step` with one more argument, which it does not use: arrays that are to be ready before it runs."""

    @functools.wraps(step)
    def waiting(*args: Any, _wait_for: Any, **kwargs: Any) -> R:
        return step(*args, **kwargs)

    return waiting


def _pools_by_position(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, list[DevicePool]]:
    for name, value in kwargs.items():
        if isinstance(value, DevicePool):
            raise ArgumentError(
                f"{name} is a {type(value).__name__} passed by keyword, which cannot be donated: pass it by position"
            )
    pools = {i: found for i, arg in enumerate(args) if (found := _pools_of(arg))}
    if not pools:
        _refuse_hidden(dict(enumerate(args)) | kwargs)
        raise ArgumentError(
            "a donating step needs at least one pool (DevicePool), or a list, tuple or dict of pools, as a positional "
            "argument, got none"
        )
    return pools


def _pools_of(argument: Any) -> list[DevicePool]:
    """The pools that an argument consists of: none if it begins with another thing; large trees cost nothing."""
    if isinstance(argument, DevicePool):
        return [argument]
    if not isinstance(argument, (list, tuple, dict)):
        return []
    pools: list[DevicePool] = []
    for item in argument.values() if isinstance(argument, dict) else argument:
        found = _pools_of(item)
        if not found:
            return []
        pools += found
    return pools


def _pools_in(tree: Any) -> list[DevicePool]:
    """The pools in the lists, tuples and dicts of `tree`, and those that they consist of."""
    if isinstance(tree, DevicePool):
        return tree.with_parts()
    if not isinstance(tree, (list, tuple, dict)):
        return []
    return [pool for item in (tree.values() if isinstance(tree, dict) else tree) for pool in _pools_in(item)]


def _refuse_hidden(arguments: dict[Any, Any]) -> None:
    """Raises ArgumentError if a pool is a part of an argument that is not donated."""
    for name, argument in arguments.items():
        parts = jax.tree_util.tree_leaves_with_path(argument, is_leaf=lambda part: isinstance(part, DevicePool))
        for path, part in parts:
            if isinstance(part, DevicePool):
                where = f"args[{name}]" if isinstance(name, int) else name
                raise ArgumentError(
                    f"{where}{jax.tree_util.keystr(path)} is a {type(part).__name__} among things that are not "
                    "donated, and would be copied: pass it by position, alone or in a list, tuple or dict of pools"
                )


def _refuse_unsafe(parts: Sequence[DevicePool], leaves: Sequence[Any], args: tuple[Any, ...]) -> None:
    if any(map(_is_deleted, leaves)) or any(part.borrow_count for part in parts):
        for part in parts:
            part.require_donatable()
    if len(set(map(id, leaves))) < len(leaves):
        raise ArgumentError(
            "one buffer stands twice in the pools of this step and can be donated only once: "
            "give each pool its own arrays"
        )
    if any(isinstance(arg, Tracer) for arg in args):
        raise ArgumentError(
            "the pool is a constant of the function being traced, and would be copied at every call: "
            "make it an argument of that function and donate it"
        )
