"""Values on their way between the device and host memory: every kind of pool, every layout, both links.

What must hold: the bytes that were on the device when `backup` was called are what the host has in the end, in one
order for all layouts, and what `load` brings back, into these ids and no others; states follow the bytes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from itertools import product

import jax
import numpy as np
import pytest

from jaxcache.errors import ArgumentError, DoubleFreeError, OwnershipError, StalePoolError, TransferError
from jaxcache.tiers import host_memory
from jaxcache.tiers.cuda import CudaLink
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import HostConfig, HostMemory
from jaxcache.tiers.host_states import HostState
from jaxcache.tiers.transfer import Direction, Move, Transfers
from tests.tiers.fake_driver import FakeDriver, FakeLibrary
from tests.tiers.pools import KINDS, filled, pool_of, values

RESERVED, PROTECTED, SYNCED, BACKUP = HostState.RESERVED, HostState.PROTECTED, HostState.SYNCED, HostState.BACKUP


@pytest.fixture(params=["memory", "cuda"])
def library(request, monkeypatch) -> FakeLibrary | None:
    """Which link: plain memory, or the copy engines over a driver in this process, which runs late."""
    if request.param == "memory":
        return None
    return with_fake_driver(monkeypatch)


def with_fake_driver(monkeypatch, lag: int = 1) -> FakeLibrary:
    library = FakeLibrary(lag)
    monkeypatch.setattr(
        host_memory,
        "link_to",
        lambda pool: CudaLink([s.device for s in pool.buffers[0].addressable_shards], FakeDriver(library)),
    )
    return library


def host(pool, parts, layout=HostLayout.PAGE_FIRST_DIRECT, **sizes) -> tuple[HostMemory, Transfers]:
    memory = HostMemory.create(pool, parts, HostConfig(**{"ratio": 2.0, "layout": layout, "reserve_bytes": 0} | sizes))
    return memory, Transfers(memory)


def stored(memory, name, ids) -> np.ndarray:
    """uint8 `(ids, bytes)`: what storage would read of a component."""
    return np.stack([np.concatenate([np.asarray(piece) for piece in memory[name].payload(i)]) for i in ids])


def moves_of(memory, parts, rng, count=3) -> list[Move]:
    """Some ids of each component, out of order, to fresh host ids that are no neighbours."""
    moves = []
    for part in parts:
        pool = memory[part.name]
        taken = pool.alloc(2 * count)
        pool.free(taken[::2])
        moves.append(Move(part.name, rng.permutation(pool.device_ids)[:count] + 1, rng.permutation(taken[1::2])))
    return moves


ONE_LAYOUT = [HostLayout.PAGE_FIRST_DIRECT]
CASES = [
    (kind, layout)
    for kind in KINDS
    for layout in (ONE_LAYOUT if kind.endswith("_sharded") or kind in ("scaled", "hybrid") else HostLayout)
]


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[f"{kind}-{layout.value}" for kind, layout in CASES])
def test_values_come_back_bit_for_bit(kind, layout, library):
    pool, parts = pool_of(kind)
    memory, transfers = host(pool, parts, layout)
    moves = moves_of(memory, parts, np.random.default_rng(1))
    before = {part.name: values(pool, part) for part in parts}
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        ticket = transfers.backup(pool, moves)
        assert all((memory[m.component].states[m.host_ids] == PROTECTED).all() for m in moves)
        pool, ended = transfers.wait(pool)
    assert ended == [ticket] and ticket.is_done and ticket.error is None and ticket.direction is Direction.BACKUP
    for move in moves:
        assert (memory[move.component].states[move.host_ids] == SYNCED).all()
        wanted = before[move.component][move.device_ids]
        np.testing.assert_array_equal(stored(memory, move.component, move.host_ids), wanted)
        memory[move.component].evicted_on_device(move.host_ids)

    pool = filled(pool, seed=1)
    other = {part.name: values(pool, part) for part in parts}
    back = [Move(m.component, np.roll(m.device_ids, 1), m.host_ids) for m in moves]
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        ticket = transfers.load(back)
        pool, ended = transfers.wait(pool)
    assert ended == [ticket] and ticket.error is None and ticket.direction is Direction.LOAD
    for part, move in zip(parts, back, strict=True):
        wanted = other[part.name]
        wanted[move.device_ids] = before[part.name][moves[parts.index(part)].device_ids]
        np.testing.assert_array_equal(values(pool, part)[1:], wanted[1:])
        assert (memory[part.name].states[move.host_ids] == SYNCED).all()
    if library is not None:
        memory.close()
        assert not library.locked and not library.contexts


def test_a_page_may_be_overwritten_as_soon_as_its_backup_was_dispatched(library):
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts)
    ids, pages = memory["full"].alloc(3), np.array([5, 1, 3], np.int32)
    before = values(pool, parts[0])[pages]
    transfers.backup(pool, [Move("full", pages, ids)])
    slots = np.concatenate([np.arange(4) + 4 * page for page in pages]).astype(np.int32)
    pool = pool.move_kv_cache(slots, np.roll(slots, 4))  # consumes the pool
    pool, _ = transfers.wait(pool)
    np.testing.assert_array_equal(stored(memory, "full", ids), before)


def test_nothing_is_told_before_it_is_there(monkeypatch):
    """SGLang's complete_io runs when a copy was enqueued."""
    with_fake_driver(monkeypatch, lag=3)
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts)
    ids = memory["full"].alloc(2)
    ticket = transfers.backup(pool, [Move("full", np.array([1, 2], np.int32), ids)])
    for _ in range(3):
        pool, ended = transfers.poll(pool)
        assert not ended and not ticket.is_done and (memory["full"].states[ids] == PROTECTED).all()
        with pytest.raises(OwnershipError, match="PROTECTED"):
            memory["full"].free(ids)
        with pytest.raises(OwnershipError, match="PROTECTED"):
            memory["full"].payload(int(ids[0]))
        with pytest.raises(OwnershipError, match="in flight"):
            memory.clear()
    assert transfers.poll(pool)[1] == [ticket]
    assert transfers.poll(pool)[1] == [] and transfers.in_flight == 0


def test_a_load_touches_the_pool_only_when_its_block_is_there(monkeypatch):
    with_fake_driver(monkeypatch, lag=2)
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts)
    ids = memory["full"].alloc(2)
    pool, _ = transfers.wait(pool, [transfers.backup(pool, [Move("full", np.array([1, 2], np.int32), ids)])])
    memory["full"].evicted_on_device(ids)
    transfers.load([Move("full", np.array([3, 4], np.int32), ids)])
    for _ in range(1):
        same, ended = transfers.poll(pool)
        assert same is pool and not ended
    pool, ended = transfers.wait(pool)
    assert len(ended) == 1


def test_transfers_of_many_blocks_stay_within_the_staging_memory(library, monkeypatch):
    pool, parts = pool_of("mha")
    page_bytes = 3 * 4 * (2 * 8 + 2 * 4) * 2
    memory, transfers = host(pool, parts, staging_bytes=4 * page_bytes)
    assert memory["full"].page_bytes == page_bytes and transfers.device_bytes == 8 * page_bytes
    most = {"saving": 0, "fetching": 0}

    def watched(name, call):
        def watching(*args):
            result = call(*args)
            most["saving"] = max(most["saving"], sum(b.num_bytes for b in transfers._saving))
            most["fetching"] = max(most["fetching"], sum(b.num_bytes for b in transfers._fetching))
            return result

        return watching

    for name in ("_start_saving", "_start_fetching"):
        monkeypatch.setattr(transfers, name, watched(name, getattr(transfers, name)))
    before = values(pool, parts[0])
    ids, pages = memory["full"].alloc(6), np.arange(1, 7, dtype=np.int32)
    pool, _ = transfers.wait(pool, [transfers.backup(pool, [Move("full", pages, ids)])])
    memory["full"].evicted_on_device(ids)
    pool, _ = transfers.wait(filled(pool, 1), [transfers.load([Move("full", pages, ids)])])
    np.testing.assert_array_equal(values(pool, parts[0])[1:], before[1:])
    assert most == {"saving": 4 * page_bytes, "fetching": 4 * page_bytes}


def test_tickets_end_in_the_order_in_which_they_were_started(library):
    pool, parts = pool_of("swa")
    memory, transfers = host(pool, parts)
    tickets = []
    for page in range(1, 4):
        moves = [Move(p.name, np.array([page], np.int32), memory[p.name].alloc(1)) for p in parts[: 1 + page % 2]]
        tickets.append(transfers.backup(pool, moves))
    nothing = transfers.backup(pool, [Move("full", np.zeros(0, np.int32), np.zeros(0, np.int32))])
    assert transfers.in_flight == 4 and nothing.is_done
    pool, ended = transfers.wait(pool)
    assert [t for t in ended if t is not nothing] == tickets and nothing in ended


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What JAX compiles meanwhile."""
    compiled: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    with jax.log_compiles():
        try:
            yield compiled
        finally:
            logger.removeHandler(handler)


REFUSED = {
    "unknown component": (lambda: [Move("draft", _ids(1), _ids(1))], ArgumentError, "component"),
    "two moves of one": (lambda: [Move("full", _ids(i), _ids(i)) for i in (1, 2)], ArgumentError, "one"),
    "other lengths": (lambda: [Move("full", _ids(1, 2), _ids(1))], ArgumentError, "as many"),
    "no such page": (lambda: [Move("full", _ids(7), _ids(1))], OwnershipError, r"\[1, 6\]"),
    "the sink": (lambda: [Move("full", _ids(0), _ids(1))], OwnershipError, r"\[1, 6\]"),
    "a page twice": (lambda: [Move("full", _ids(3, 3), _ids(1, 2))], OwnershipError, "once"),
    "a host page twice": (lambda: [Move("full", _ids(3, 4), _ids(1, 1))], DoubleFreeError, "twice"),
    "no such host page": (lambda: [Move("full", _ids(3), _ids(13))], OwnershipError, r"\[1, 12\]"),
    "a host page that is free": (lambda: [Move("full", _ids(3), _ids(9))], DoubleFreeError, "IDLE"),
    "the second move": (lambda: [Move(n, _ids(4), _ids(1)) for n in ("full", "window")], OwnershipError, r"\[1, 3\]"),
}


def _ids(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_moves_are_refused_before_anything_changed(name, direction):
    pool, parts = pool_of("swa")
    memory, transfers = host(pool, parts)
    for part in parts:
        ids = memory[part.name].alloc(3)
        if direction is Direction.LOAD:
            memory[part.name].landed(ids)
    states = {part.name: memory[part.name].states.copy() for part in parts}
    moves, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        transfers.load(moves()) if direction is Direction.LOAD else transfers.backup(pool, moves())
    assert transfers.in_flight == 0
    for part in parts:
        np.testing.assert_array_equal(memory[part.name].states, states[part.name])


def test_a_ticket_of_another_object_is_not_waited_for():
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts)
    ticket = transfers.backup(pool, [Move("full", _ids(1), memory["full"].alloc(1))])
    with pytest.raises(ArgumentError, match="started here"):
        Transfers(memory).wait(pool, [ticket])
    pool, ended = transfers.wait(pool, [ticket])
    assert ended == [ticket]
    assert Transfers(memory).wait(pool, [ticket])[1] == [], "it has ended"


def test_a_consumed_pool_is_refused():
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts)
    pool.move_kv_cache(_ids(4), _ids(5))
    ids = memory["full"].alloc(1)
    with pytest.raises(StalePoolError):
        transfers.backup(pool, [Move("full", _ids(1), ids)])
    assert memory["full"].states[ids[0]] == RESERVED


@pytest.mark.parametrize("staging_bytes", [1 << 20, 1], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("call", ["cuMemcpyDtoHAsync_v2", "cuEventQuery", "cuEventCreate"])
def test_a_backup_that_fails_leaves_nothing_that_looks_saved(monkeypatch, call, staging_bytes):
    library = with_fake_driver(monkeypatch)
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts, staging_bytes=staging_bytes)
    ids = memory["full"].alloc(4)
    library.errors[call] = 999
    ticket = transfers.backup(pool, [Move("full", _ids(1, 2, 3, 4), ids)])
    pool, ended = transfers.wait(pool)
    assert ended == [ticket] and isinstance(ticket.error, TransferError) and "CUDA_ERROR_PLANTED" in str(ticket.error)
    assert (memory["full"].states[ids] == RESERVED).all()
    assert not any(library.streams.values()), "what was started is done before its memory goes"
    library.errors.clear()
    pool, ended = transfers.wait(pool, [transfers.backup(pool, [Move("full", _ids(1, 2, 3, 4), ids)])])
    assert ended[0].error is None


@pytest.mark.parametrize("staging_bytes", [1 << 20, 1], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuEventQuery"])
def test_a_load_that_fails_leaves_the_host_as_it_was(monkeypatch, call, staging_bytes):
    library = with_fake_driver(monkeypatch)
    pool, parts = pool_of("mha")
    memory, transfers = host(pool, parts, staging_bytes=staging_bytes)
    ids = memory["full"].alloc(2)
    pool, _ = transfers.wait(pool, [transfers.backup(pool, [Move("full", _ids(1, 2), ids)])])
    memory["full"].evicted_on_device(ids)
    before, there = stored(memory, "full", ids), values(pool, parts[0])
    library.errors[call] = 999
    ticket = transfers.load([Move("full", _ids(3, 4), ids)])
    pool, ended = transfers.wait(pool)
    assert ended == [ticket] and isinstance(ticket.error, TransferError)
    assert (memory["full"].states[ids] == BACKUP).all()
    np.testing.assert_array_equal(stored(memory, "full", ids), before)
    np.testing.assert_array_equal(values(pool, parts[0]), there)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", HostLayout)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("_sharded")])
def test_values_come_back_bit_for_bit_from_a_gpu(kind, layout):
    test_values_come_back_bit_for_bit(kind, layout, None)


def test_blocks_of_every_size_are_compiled_beforehand(library):
    pool, parts = pool_of("hybrid")
    memory, transfers = host(pool, parts)
    there = [values(pool, part) for part in parts]
    pool = transfers.warmed_up(pool)
    for part, before in zip(parts, there, strict=True):
        np.testing.assert_array_equal(values(pool, part), before)
    with compilations() as compiled:
        for name, n in product(("full", "state"), (1, 2, 3, 5)):
            ids, pages = memory[name].alloc(n), np.arange(1, n + 1)
            pool, _ = transfers.wait(pool, [transfers.backup(pool, [Move(name, pages, ids)])])
            memory[name].evicted_on_device(ids)
            pool, _ = transfers.wait(pool, [transfers.load([Move(name, pages, ids)])])
    assert not compiled
