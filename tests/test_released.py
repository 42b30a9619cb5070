"""Device memory that is released and comes back: what needs it meanwhile is refused, and the books are right after."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxcache.device.pool import DevicePool
from jaxcache.errors import BorrowedError, ReleasedError, RequestStateError, StalePoolError
from jaxcache.events.events import AllBlocksCleared
from jaxcache.manager.audit import check_device_maps
from jaxcache.oplog.fingerprint import fingerprint
from jaxcache.oplog.log import record, replay
from jaxcache.pages.pair import SWATokenToKVPoolAllocator
from jaxcache.pools.mha import MHATokenToKVPool
from jaxcache.request import Request
from jaxcache.snapshot.save import save_snapshot
from tests.snapshot.caches import MODEL, contents, fill
from tests.support.placed_caches import MHA, cached, place
from tests.support.recorded_lives import FLAVOURS, Life, make_config, nothing


class View:
    """What another framework keeps of a pool."""

    def before_step(self):
        return np.zeros(())

    def after_step(self, step, returned):
        """Nothing to tell."""

    def after_read(self, done):
        """Nothing to tell."""


def busy(flavour: str, seed: int) -> Life:
    """A life with running requests, and rows that tell pages apart."""
    life = Life(seed, flavour).run(60)
    while not life.running:
        life.act()
    fill(life.memory, seed)
    return life


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_kept_is_there_again_and_requests_run_on(flavour, seed):
    life = busy(flavour, seed)
    memory = life.memory
    arrays, before, rows = memory.pool.buffers, fingerprint(memory), contents(memory)
    memory.release_memory(keep=True)
    assert all(array.is_deleted() for array in arrays)
    assert fingerprint(memory) == before
    memory.resume_memory()
    assert (fingerprint(memory), contents(memory)) == (before, rows)
    for _ in range(2):
        memory.runner.send_changes()
        if isinstance(memory.allocator, SWATokenToKVPoolAllocator):
            check_device_maps(memory.pool, memory.cache.components)
        life.run(60)


def test_what_is_dropped_is_forgotten():
    life = busy("both", 1)
    memory, pool = life.memory, life.memory.pool
    before = fingerprint(memory)
    with pytest.raises(RequestStateError, match="requests are running: finish, retract or abort them first"):
        memory.release_memory()
    assert fingerprint(memory) == before and not pool.is_stale
    for request in life.running:
        memory.finish(request)
    life.running.clear()
    memory.release_memory()
    assert pool.is_stale
    with pytest.raises(StalePoolError):
        pool.require_live()
    assert memory.cache.total_size() == 0
    assert memory.allocator.full_available_size() == memory.allocator.size
    size, available, _ = memory.cache.usage("state")
    assert available == size
    memory.resume_memory()
    assert not any(np.asarray(buffer).any() for buffer in memory.pool.buffers)
    for request in life.waiting:
        request.cpu_copy = None
    life.run(60)


def test_consumers_of_events_hear_that_all_is_gone():
    life = busy("full", 2)
    other = record(make_config(enable_kv_cache_events=True))
    other.release_memory()
    assert [type(event) for event in other.cache.take_events()] == [AllBlocksCleared]
    life.memory.release_memory(keep=True)
    assert life.memory.cache.take_events() == []


def test_what_needs_the_pool_is_refused_meanwhile_and_goes_on_afterwards(tmp_path):
    memory = record(make_config("both"))
    running, waiting = Request("running", list(range(9))), Request("waiting", list(range(5)))
    memory.admit(running)
    plan = memory.extend([(running, 8)])
    assert plan is not None
    memory.release_memory(keep=True)
    before = fingerprint(memory)
    for use in (
        lambda: memory.pool,
        lambda: memory.admit(waiting),
        lambda: memory.run(nothing, plan),
        lambda: memory.warm_up(nothing),
        memory.warm_up_offload,
        lambda: memory.check_memory(read_device=True),
        lambda: memory.release_memory(keep=True),
        lambda: memory.release_memory(keep=False) if not memory.running else memory.release_memory(keep=True),
        lambda: setattr(memory, "pool", memory.config.new_pool()),
    ):
        with pytest.raises(ReleasedError, match="call resume_memory first"):
            use()
        assert fingerprint(memory) == before
    memory.resume_memory()
    memory.run(nothing, plan)
    memory.release_memory(keep=True)
    with pytest.raises(ReleasedError):
        memory.retract(running, offload=True)
    memory.retract(running)  # on the books alone
    with pytest.raises(ReleasedError, match="call resume_memory first"):
        save_snapshot(tmp_path / "s", memory, model=MODEL)
    assert not list(tmp_path.iterdir())
    memory.resume_memory()
    with pytest.raises(ReleasedError, match="is there: call release_memory first"):
        memory.resume_memory()
    assert memory.admit(running) == 8
    memory.check_memory(read_device=True)


def test_a_pool_that_others_look_into_is_not_released():
    memory = busy("both", 3).memory
    for part in (memory.pool, memory.pool.states):
        assert isinstance(part, DevicePool)
        part.mark_borrowed()
        with pytest.raises(BorrowedError, match="is borrowed"):
            memory.release_memory(keep=True)
        part.unmark_borrowed()
        view = View()
        part.add_view(view)
        with pytest.raises(BorrowedError, match="close the share first"):
            memory.release_memory(keep=True)
        part.remove_view(view)
    assert not memory.pool.is_stale
    view = View()
    memory.pool.add_view(view)
    del view  # whoever looked in is gone
    memory.release_memory(keep=True)
    memory.resume_memory()


def test_a_device_without_room_leaves_what_was_kept(monkeypatch):
    memory = busy("full", 4).memory
    before, rows = fingerprint(memory), contents(memory)
    memory.release_memory(keep=True)

    def no_room(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch, pytest.raises(jax.errors.JaxRuntimeError):
        patch.setattr(MHATokenToKVPool, "create", no_room)
        memory.resume_memory()
    with pytest.raises(ReleasedError):
        _ = memory.pool
    memory.resume_memory()
    assert (fingerprint(memory), contents(memory)) == (before, rows)


def test_nothing_is_compiled_twice():
    memory = record(make_config("both"))
    memory.warm_up(nothing)
    for _ in range(2):
        request = Request("r", list(range(9)))
        memory.admit(request)
        memory.run(nothing, memory.extend([(request, 9)]))
        memory.release_memory(keep=True)
        memory.resume_memory()
        memory.finish(request)
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        request = Request("s", list(range(9, 18)))
        memory.admit(request)
        memory.run(nothing, memory.extend([(request, 9)]))
        memory.release_memory(keep=True)
        memory.resume_memory()
        request.output_ids.append(1)
        memory.run(nothing, memory.decode([request]))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("shards", [2, 8])
def test_a_pool_on_a_mesh(shards):
    memory = cached(*place(MHA, shards))
    mesh, rows = memory.pool.mesh, contents(memory)
    memory.release_memory(keep=True)
    memory.resume_memory()
    assert memory.pool.mesh == mesh
    assert contents(memory) == rows
    memory.check_memory(read_device=True)


def test_it_is_in_the_log():
    life = busy("window", 5)
    memory = life.memory
    memory.release_memory(keep=True)
    with pytest.raises(ReleasedError):
        memory.admit(Request("r", [1]))
    memory.resume_memory()
    life.run(20)
    for request in life.running:
        memory.abort(request)
    memory.release_memory()
    memory.resume_memory()
    assert fingerprint(replay(memory.log)) == fingerprint(memory)
