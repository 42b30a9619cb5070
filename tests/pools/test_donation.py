"""The one door for donated steps: what it consumes, what it refuses, and that a refusal loses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.device.donation import donating, reading
from jaxcache.device.pool import DevicePool
from jaxcache.errors import ArgumentError, BorrowedError, StalePoolError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counters(DevicePool):
    """The smallest pool."""

    values: jax.Array


def counters(n: int = 4) -> Counters:
    return Counters(jnp.zeros(n))


@donating
def bump(pool: Counters, by: float) -> Counters:
    return Counters(pool.values + by)


def test_the_pool_is_consumed_and_the_new_one_has_its_memory():
    pool = counters(1024)
    pointer = pool.values.unsafe_buffer_pointer()
    new = bump(pool, 2.0)
    assert new.values.unsafe_buffer_pointer() == pointer
    assert pool.is_stale
    assert not new.is_stale
    assert new.values.sum() == 2048


def test_a_consumed_pool_is_refused_before_the_other_pool_is_lost():
    stale, live = counters(), counters()
    bump(stale, 1.0)
    swap = donating(lambda a, b: (b, a))
    with pytest.raises(StalePoolError, match=r"Counters was consumed.*use the pool which that step returned"):
        swap(live, stale)
    assert live.values.sum() == 0


def test_a_borrowed_pool_is_refused_until_every_borrow_ended():
    pool = counters()
    pool.mark_borrowed()
    pool.mark_borrowed()
    for _ in range(2):
        with pytest.raises(BorrowedError, match="end the borrow first"):
            bump(pool, 1.0)
        assert pool.values.sum() == 0
        pool.unmark_borrowed()
    assert bump(pool, 1.0).values.sum() == 4


def test_a_borrow_cannot_end_twice():
    with pytest.raises(BorrowedError, match="not borrowed"):
        counters().unmark_borrowed()


def test_the_borrow_mark_is_no_part_of_the_tree_and_stays_with_its_pool():
    traces = []

    @donating
    def step(pool):
        traces.append(1)
        return pool

    other, pool = counters(), counters()
    tree = jax.tree.structure(pool)
    pool.mark_borrowed()
    assert jax.tree.structure(pool) == tree
    assert other.borrow_count == 0
    step(other)
    pool.unmark_borrowed()
    assert step(pool).borrow_count == 0
    assert len(traces) == 1


def test_two_pools_that_share_a_buffer_are_refused():
    pool = counters()
    with pytest.raises(ArgumentError, match="donated only once"):
        donating(lambda a, b: (a, b))(pool, Counters(pool.values))
    assert not pool.is_stale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Holder:
    """A pytree of the user's own that holds a pool."""

    pool: Counters
    weights: float


first = donating(lambda x, *rest, **more: x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: bump(pool=p, by=1.0), "pool is a Counters passed by keyword"),
        (lambda p: first(1.0), "at least one pool"),
        (lambda p: first([]), "at least one pool"),
        (lambda p: first({"a": p, "weights": 1.0}), r"args\[0\]\['a'\] is a Counters among things"),
        (lambda p: first({"a": 1.0, "pool": p}), r"args\[0\]\['pool'\] is a Counters among things"),
        (lambda p: first(counters(), [p, 1.0]), r"args\[1\]\[0\] is a Counters among things"),
        (lambda p: first(counters(), Holder(p, 1.0)), r"args\[1\].pool is a Counters among things"),
        (lambda p: first(counters(), more=[p]), r"more\[0\] is a Counters among things"),
    ],
)
def test_a_pool_that_could_not_be_donated_is_refused(call, message):
    pool = counters()
    for _ in range(2):  # a refusal is not cached away
        with pytest.raises(ArgumentError, match=message):
            call(pool)
    assert not pool.is_stale


@pytest.mark.parametrize(
    "container",
    [lambda a, b: [a, b], lambda a, b: (a, b), lambda a, b: {"k": a, "v": b}, lambda a, b: {"k": [a], "v": ((b,),)}],
)
def test_containers_of_pools_are_donated_as_a_whole(container):
    pools = counters(1024), counters(1024)
    pointers = [pool.values.unsafe_buffer_pointer() for pool in pools]
    step = donating(lambda by, pools: jax.tree.map(lambda values: values + by, pools))
    new = jax.tree.leaves(step(2.0, container(*pools)))
    assert [values.unsafe_buffer_pointer() for values in new] == pointers
    assert [values.sum() for values in new] == [2048, 2048]
    assert all(pool.is_stale for pool in pools)


def test_pools_in_containers_are_checked_like_others():
    stale, borrowed, live = counters(), counters(), counters()
    bump(stale, 1.0)
    borrowed.mark_borrowed()
    with pytest.raises(StalePoolError):
        first([live, stale])
    with pytest.raises(BorrowedError):
        first({"a": live, "b": [borrowed]})
    with pytest.raises(ArgumentError, match="donated only once"):
        first([live], [live])
    assert live.values.sum() == 0


def test_a_pool_that_a_jitted_function_closes_over_is_refused():
    pool = counters()
    with pytest.raises(ArgumentError, match="constant of the function being traced"):
        jax.jit(lambda by: bump(pool, by))(1.0)
    assert not pool.is_stale


def test_inside_a_jit_the_step_is_a_part_of_that_jit():
    pool = counters()
    new = jax.jit(lambda pool: bump(bump(pool, 1.0), 2.0))(pool)
    assert new.values.sum() == 12
    assert not pool.is_stale  # that jit donated nothing
    assert donating(lambda pool: bump(pool, 3.0))(pool).values.sum() == 12
    assert pool.is_stale


def test_every_pool_is_donated_wherever_it_stands():
    @donating
    def step(by, first, scale, second):
        return Counters(first.values + by), Counters(second.values + by * scale)

    pools = counters(), counters()
    first, second = step(1.0, pools[0], 3.0, pools[1])
    assert (first.values.sum(), second.values.sum()) == (4, 12)
    assert all(pool.is_stale for pool in pools)


def test_static_arguments_and_keywords_pass_through():
    @donating
    def plain(pool, *, by):
        return Counters(pool.values + by)

    def repeat(pool, times, by=1.0):
        assert type(times) is int
        for _ in range(times):
            pool = Counters(pool.values + by)
        return pool

    assert plain(counters(), by=np.float32(2.0)).values.sum() == 8
    assert donating(repeat, static_argnames="times")(counters(), 3, by=2.0).values.sum() == 24
    assert donating(repeat, static_argnames=["times"])(counters(), times=2).values.sum() == 8


def test_a_step_compiles_once_for_equal_shapes():
    traces = []

    @donating
    def step(pool, x):
        traces.append(1)
        return Counters(pool.values + x)

    pool = counters()
    for x in (1.0, 2.0, 3.0):
        pool = step(pool, x)
    assert len(traces) == 1


def test_lowering_consumes_nothing_and_needs_no_memory():
    pool = counters()
    assert bump.lower(pool, 1.0).compile() is not None
    assert not pool.is_stale
    assert bump.lower(Counters(jax.ShapeDtypeStruct((2**40,), jnp.float32)), 1.0) is not None


def test_an_error_while_tracing_consumes_nothing():
    def fail(pool):
        raise ZeroDivisionError

    pool = counters()
    with pytest.raises(ZeroDivisionError):
        donating(fail)(pool)
    assert not pool.is_stale


def test_the_wrapper_keeps_the_name_and_the_docstring():
    def step(pool):
        """What it does."""
        return pool

    assert donating(step).__name__ == "step"
    assert donating(step).__doc__ == "What it does."


class View:
    """Another framework, that writes down what it is told."""

    def __init__(self):
        self.told = []

    def before_step(self):
        self.told.append("before")
        return np.zeros(3)

    def after_step(self, step, returned):
        self.told.append((step, returned))

    def after_read(self, done):
        self.told.append(done.dtype)


def test_views_are_told_of_every_step_and_what_it_returned():
    pool, view = counters(), View()
    pool.add_view(view)
    new = bump(pool, 2.0)
    assert view.told[0] == "before" and view.told[1][0] == "bump" and view.told[1][1][0] is new
    assert new.values.sum() == 8
    assert bump(new, 1.0).values.sum() == 12  # a view follows the pool by itself, or not
    assert len(view.told) == 2


def test_views_are_told_of_pools_in_containers_and_of_no_step_that_is_refused():
    first, second, view = counters(), counters(), View()
    second.add_view(view)
    step = donating(lambda pools: {"out": 1.0, "pools": list(pools)})
    returned = step([first, second])["pools"]
    assert view.told[1][1][0] is returned[0] and view.told[1][1][1] is returned[1]
    with pytest.raises(StalePoolError):
        step([second, first])
    assert len(view.told) == 2


def test_views_are_held_weakly():
    pool, view = counters(), View()
    pool.add_view(view)
    del view
    assert bump(pool, 1.0).values.sum() == 4
    other = counters()
    other.add_view(View())
    other.add_view(view := View())
    assert len(other.views) == 1 and other.views[0]() is view


def test_a_step_on_shared_pools_compiles_once_too():
    traces = []

    @donating
    def step(pool, *, by):
        traces.append(by)
        return Counters(pool.values + by)

    pool, view = counters(), View()
    for _ in range(3):
        pool.add_view(view)
        pool = step(pool, by=1.0)
    assert len(traces) == 1 and pool.values.sum() == 12


def test_reading_tells_views_refuses_consumed_pools_and_leaves_the_pool_alone():
    pool, view = counters(), View()
    total = reading(lambda pool, by: pool.values.sum() + by, static_argnames="by")
    assert total(pool, by=2.0) == 2 and pool.last_read is not None
    pool.add_view(view)
    assert total(pool, by=3.0) == 3
    assert view.told == ["before", bool]
    assert jax.jit(lambda pool: total(pool, by=4.0))(pool) == 4  # inside a jit it is a part of that jit
    assert view.told == ["before", bool]
    assert bump(pool, 1.0).values.sum() == 4
    with pytest.raises(StalePoolError):
        total(pool, by=1.0)


def test_views_stay_when_a_part_is_replaced():
    pool, view = counters(), View()
    pool.add_view(view)
    assert pool.replaced(values=jnp.ones(4)).views == pool.views


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="only a GPU refuses to donate memory that somebody holds")
def test_memory_held_through_dlpack_is_a_borrow():
    pool = counters()
    capsule = pool.values.__dlpack__()
    with pytest.raises(BorrowedError, match="drop the view"):
        bump(pool, 1.0)
    del capsule
    assert bump(pool, 1.0).values.sum() == 4
