"""What host tiers of other systems get wrong: copies that race, parts that stay behind, failures that count as loads.

Numbers are those of the sharp edges of SGLang's host pools (S-31 to S-33: tests/tiers) and of published reports.
"""

from __future__ import annotations

import numpy as np
import pytest

from jaxcache.errors import CacheError, OwnershipError, TransferError
from jaxcache.tiers import host_memory
from jaxcache.tiers.cuda import CudaLink
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import HostConfig, HostMemory
from jaxcache.tiers.host_states import HostState
from jaxcache.tiers.transfer import Move, Transfers
from tests.pools.numpy_pool import DTYPES, mha_config
from tests.tiers.fake_driver import FakeDriver, FakeLibrary
from tests.tiers.pools import FULL, filled, pool_of, values

PAGES = np.array([3, 1, 2], np.int32)


@pytest.fixture
def library(monkeypatch) -> FakeLibrary:
    """A driver whose copies are made late: host memory of a test that asks for it goes through it."""
    library = FakeLibrary(lag=2)
    link = lambda pool: CudaLink(pool.buffers[0].devices(), FakeDriver(library))  # noqa: E731
    monkeypatch.setattr(host_memory, "link_to", link)
    return library


def saved(kind: str, **sizes):
    """A pool of the kind whose `PAGES` are in host memory alone: pool, transfers, memory, host ids, their values."""
    pool, parts = pool_of(kind)
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2, reserve_bytes=0, **sizes))
    transfers = Transfers(memory)
    moves = [Move(part.name, PAGES, memory[part.name].alloc(3)) for part in parts]
    there = {part.name: values(pool, part)[PAGES] for part in parts}
    pool, _ = transfers.wait(pool, [transfers.backup(pool, moves)])
    for move in moves:
        memory[move.component].evicted_on_device(move.host_ids)
    return pool, transfers, memory, moves, there


def test_a_host_page_is_not_freed_while_the_device_still_reads_it(library):
    """D1: sglang#27444 locked the device's side only."""
    pool, transfers, memory, (move,), there = saved("mha")
    host = memory["full"]
    ticket = transfers.load([Move("full", PAGES, move.host_ids)])
    while not ticket.is_done:
        for refused in (host.free, host.landed, host.evicted_on_device, host.adopted_on_device):
            with pytest.raises(OwnershipError, match="PROTECTED"):
                refused(move.host_ids)
        with pytest.raises(OwnershipError, match="PROTECTED"):
            host.payload_target(int(move.host_ids[0]))
        pool, _ = transfers.poll(pool)
    np.testing.assert_array_equal(values(pool, FULL[0])[PAGES], there["full"])
    host.free(move.host_ids)


def test_staging_memory_is_not_used_again_before_its_copy_was_made(library):
    """D5: TensorRT-LLM#15546 wrote the next step's inputs into a buffer that a copy had still to read."""
    pool, parts = pool_of("mha")
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2, reserve_bytes=0))
    transfers = Transfers(memory)
    tickets, wanted = [], []
    for seed in range(3):
        pool = filled(pool, seed)
        wanted.append(values(pool, parts[0])[PAGES])
        tickets.append(transfers.backup(pool, [Move("full", PAGES, memory["full"].alloc(3))]))
    assert library.streams, "nothing was copied yet"
    pool, _ = transfers.wait(pool)
    for ticket, content in zip(tickets, wanted, strict=True):
        got = [b"".join(memory["full"].payload(int(i))) for i in ticket.moves[0].host_ids]
        assert got == [row.tobytes() for row in content]


def test_a_failure_is_never_a_load(library):
    """D8: dynamo#15079 counted any failed transfer as loaded."""
    pool, transfers, memory, (move,), _ = saved("mha")
    for call in ("cuMemcpyHtoDAsync_v2", "cuEventCreate", "cuEventQuery", "cuCtxPushCurrent_v2"):
        library.errors = {call: 700}
        ticket = transfers.load([Move("full", PAGES, move.host_ids)])
        pool, ended = transfers.wait(pool)
        assert ended == [ticket] and isinstance(ticket.error, TransferError), call
        assert (memory["full"].states[move.host_ids] == HostState.BACKUP).all()
    library.errors = {}
    pool, ended = transfers.wait(pool, [transfers.load([Move("full", PAGES, move.host_ids)])])
    assert ended[0].error is None


@pytest.mark.parametrize("kind", ["scaled", "double_sparse", "hybrid", "swa"])
@pytest.mark.parametrize("layout", HostLayout)
def test_nothing_of_a_page_stays_behind(kind, layout):
    """D9, D10: index rows, scales or states were not saved; what came back used the last owner's.

    A pool of zeros and a pool of other bits must both end with the bits that were saved.
    """
    pool, transfers, memory, moves, there = saved(kind, layout=layout)
    for poison in (lambda pool: type(pool).create(pool.config), lambda pool: filled(pool, 7)):
        pool = poison(pool)
        pool, _ = transfers.wait(pool, [transfers.load(moves)])
        for part in pool_of(kind)[1]:
            np.testing.assert_array_equal(values(pool, part)[PAGES], there[part.name])
        for move in moves:
            memory[move.component].evicted_on_device(move.host_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_a_pool_has_a_host_pool(dtype):
    """D11: sglang#35888, a server died at the first retraction, for one dtype."""
    config = mha_config(dtype)
    pool = filled(config.pool_type.create(config))
    memory = HostMemory.create(pool, FULL, HostConfig(ratio=2, reserve_bytes=0))
    transfers, ids, there = Transfers(memory), memory["full"].alloc(3), values(pool, FULL[0])[PAGES]
    pool, _ = transfers.wait(pool, [transfers.backup(pool, [Move("full", PAGES, ids)])])
    memory["full"].evicted_on_device(ids)
    pool, _ = transfers.wait(filled(pool, 1), [transfers.load([Move("full", PAGES, ids)])])
    np.testing.assert_array_equal(values(pool, FULL[0])[PAGES], there)


def test_the_device_keeps_what_was_loaded_when_the_host_page_changes():
    """D16: jax#37830, an array made of a NumPy buffer may be that buffer."""
    pool, transfers, memory, (move,), there = saved("mha")
    ticket = transfers.load([Move("full", PAGES, move.host_ids)])
    transfers._start_fetching(pool)
    memory["full"].arrays[0].buffer[:] = 0xAA
    pool, _ = transfers.wait(pool, [ticket])
    np.testing.assert_array_equal(values(pool, FULL[0])[PAGES], there["full"])


def test_host_memory_that_is_full_is_a_none_at_once():
    """F4: LMCache#2942 waited for ever where nothing could become free."""
    pool, parts = pool_of("mha")
    host = HostMemory.create(pool, parts, HostConfig(ratio=1, reserve_bytes=0))["full"]
    ids = host.alloc(host.size)
    assert host.alloc(1) is None and host.alloc(0).tolist() == []
    host.free(ids[:1])
    assert host.alloc(1).tolist() == ids[:1].tolist()


def test_transfers_end_without_new_ones(library):
    """D19: sglang#20560 noticed the end of a copy only when the next one was started."""
    pool, parts = pool_of("mha")
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2, reserve_bytes=0))
    transfers = Transfers(memory)
    transfers.backup(pool, [Move("full", PAGES, memory["full"].alloc(3))])
    polls = 0
    while transfers.in_flight:
        pool, _ = transfers.poll(pool)
        polls += 1
    assert polls <= library.lag + 1


def test_a_pool_that_cannot_be_donated_loses_no_load(library):
    """A load arrives while another framework looks into the pool: the poll is refused, and the next one ends it."""
    pool, transfers, memory, (move,), there = saved("mha")
    ticket = transfers.load([Move("full", PAGES, move.host_ids)])
    pool.mark_borrowed()
    with pytest.raises(CacheError, match="borrowed"):
        transfers.wait(pool)
    assert not ticket.is_done and (memory["full"].states[move.host_ids] == HostState.PROTECTED).all()
    pool.unmark_borrowed()
    pool, ended = transfers.wait(pool)
    assert ended == [ticket] and ticket.error is None
    np.testing.assert_array_equal(values(pool, FULL[0])[PAGES], there["full"])
