"""Random lives of transfers over a driver that is late by chance: whatever overlaps, each page has its own bits.

The oracle knows what each host page must hold from the moment its backup was called, and each page of the device from
the moment a load of it was told as ended. Freed host pages and the whole device are overwritten between.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxcache.slots import page_slots
from jaxcache.tiers import host_memory
from jaxcache.tiers.cuda import CudaLink
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import HostConfig, HostMemory
from jaxcache.tiers.host_states import HostState
from jaxcache.tiers.transfer import Direction, Move, Transfers
from tests.tiers.fake_driver import FakeDriver, FakeLibrary
from tests.tiers.pools import filled, pool_of, values

OPS = 80


class Life:
    """A pool, its host memory, and what must be where.

    Args:
      kind: Of the pool.
      layout: Of the host.
      library: Late by chance.
      seed: Of all choices.
    """

    def __init__(self, kind, layout, library, seed):
        self.random, self.library, self.seed = np.random.default_rng(seed), library, 0
        self.pool, self.parts = pool_of(kind)
        self.memory = HostMemory.create(
            self.pool,
            self.parts,
            HostConfig(ratio=1.5, layout=layout, reserve_bytes=0, staging_bytes=3000),
        )
        self.transfers = Transfers(self.memory)
        self.there = {part.name: values(self.pool, part) for part in self.parts}
        self.held = {part.name: {} for part in self.parts}  # host id: its bytes
        self.loading = {part.name: set() for part in self.parts}  # pages of the device
        self.ended = self.failed = 0

    def some(self, ids):
        ids = np.array(sorted(ids), np.int32)
        return self.random.permutation(ids)[: self.random.integers(0, len(ids) + 1)]

    def backup(self):
        moves = []
        for part in self.parts:
            host = self.memory[part.name]
            pages = self.some(set(range(1, host.device_ids + 1)) - self.loading[part.name])[: host.available()]
            ids = host.alloc(len(pages))
            self.held[part.name] |= zip(ids.tolist(), self.there[part.name][pages], strict=True)
            moves.append(Move(part.name, pages, ids))
        self.transfers.backup(self.pool, moves)

    def load(self):
        moves = []
        for part in self.parts:
            host = self.memory[part.name]
            host.evicted_on_device(self.some(np.flatnonzero(host.states == HostState.SYNCED)))
            ids = self.some(np.flatnonzero(host.states == HostState.BACKUP))
            free = sorted(set(range(1, host.device_ids + 1)) - self.loading[part.name])
            pages = self.random.permutation(np.array(free, np.int32))[: len(ids)]
            self.loading[part.name] |= set(pages.tolist())
            moves.append(Move(part.name, pages, ids[: len(pages)]))
        self.transfers.load(moves)

    def free(self):
        for part in self.parts:
            host = self.memory[part.name]
            ids = self.some(
                np.flatnonzero(np.isin(host.states, (HostState.RESERVED, HostState.SYNCED, HostState.BACKUP)))
            )
            host.free(ids)
            for i in ids.tolist():
                self.held[part.name].pop(i, None)
                for array in host.arrays:
                    array.pages[i - 1] = 0xAA

    def overwrite(self):
        """Steps of other requests: all of the device has other bits, but for what a load is about to bring."""
        self.seed += 1
        new, old = filled(self.pool, self.seed).stacks(), self.pool.stacks()
        for part in self.parts:
            (name,) = part.stack_names
            slots = page_slots(np.array(sorted(self.loading[part.name]), np.int32), 4)
            arrays = [np.array(array) for array in new[name].buffers]
            for array, before in zip(arrays, old[name].buffers, strict=True):
                array[:, slots] = np.asarray(before)[:, slots]
            new[name] = new[name].with_buffers(*map(jax.numpy.asarray, arrays))
        self.pool = self.pool.with_stacks(new)
        self.there = {part.name: values(self.pool, part) for part in self.parts}

    def poll(self):
        self.library.lag = int(self.random.integers(0, 4))
        self.pool, ended = self.transfers.poll(self.pool)
        self.take(ended)

    def take(self, ended):
        self.ended += len(ended)
        landed = {part.name: values(self.pool, part) for part in self.parts}
        for ticket in ended:
            self.failed += ticket.error is not None
            for move in ticket.moves:
                if ticket.direction is Direction.LOAD:
                    self.loading[move.component] -= set(move.device_ids.tolist())
                    if ticket.error is None:
                        for page, i in zip(move.device_ids.tolist(), move.host_ids.tolist(), strict=True):
                            assert np.array_equal(landed[move.component][page], self.held[move.component][i]), page
                elif ticket.error is not None:
                    for i in move.host_ids.tolist():
                        del self.held[move.component][i]
        self.there = landed

    def fail(self):
        """The driver refuses a call of some kind, once."""
        call = self.random.choice(["cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuEventQuery"])
        self.library.errors = {call: 999}
        self.poll()
        self.library.errors = {}

    def check(self):
        for part in self.parts:
            host = self.memory[part.name]
            host.check()
            for i in np.flatnonzero(np.isin(host.states, (HostState.SYNCED, HostState.BACKUP))).tolist():
                assert b"".join(host.payload(i)) == self.held[part.name][i].tobytes(), i


SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 100))]


@pytest.mark.parametrize("kind", ["mha", "swa"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_page_has_other_bits_than_its_own(kind, seed, monkeypatch):
    library = FakeLibrary()
    link = lambda pool: CudaLink(pool.buffers[0].devices(), FakeDriver(library))  # noqa: E731
    monkeypatch.setattr(host_memory, "link_to", link)
    life = Life(kind, list(HostLayout)[seed % 3], library, seed)
    ops = [life.backup, life.load, life.free, life.overwrite, life.fail, *[life.poll] * 3]
    for _ in range(OPS):
        life.random.choice(ops)()
        life.check()
    life.pool, ended = life.transfers.wait(life.pool)
    life.take(ended)
    life.check()
    assert life.transfers.in_flight == 0 and life.ended > OPS // 10
    for part in life.parts:
        assert not (life.memory[part.name].states == HostState.PROTECTED).any()
