"""How much host memory there is, exactly, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from jaxcache.errors import ArgumentError, OwnershipError, TransferError
from jaxcache.tiers import host_memory, machine
from jaxcache.tiers.cuda import CudaLink
from jaxcache.tiers.host_layout import HostLayout
from jaxcache.tiers.host_memory import HostConfig, HostMemory
from jaxcache.tiers.host_states import HostState
from jaxcache.tiers.transfer import Transfers
from tests.tiers.fake_driver import FakeDriver, FakeLibrary
from tests.tiers.pools import KINDS, Part, pool_of, values

GIB = 1 << 30
SMAPS = Path("/proc/self/smaps")


@pytest.fixture(autouse=True)
def a_machine(monkeypatch):
    """With 8 GiB available."""
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 8 * GIB)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_all_that_the_device_has_of_it(kind):
    pool, parts = pool_of(kind)
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2))
    assert list(memory) == [part.name for part in parts]
    for part in parts:
        there = values(pool, part)
        host = memory[part.name]
        assert host.device_ids == len(there) - 1 and host.size == 2 * (len(there) - 1)
        assert host.page_bytes == there.shape[1] == sum(array.shape.page_bytes for array in host.arrays)
    assert memory.size_bytes == sum(host.size * host.page_bytes for host in memory.values())


@pytest.mark.parametrize("layout", HostLayout)
def test_bytes_are_used_up_to_less_than_a_page(layout):
    pool, parts = pool_of("swa")
    for size in (1_000_000, 1_234_567, 20_000):
        memory = HostMemory.create(pool, parts, HostConfig(bytes=size, layout=layout))
        assert size - memory["full"].page_bytes < memory.size_bytes <= size
        assert sum(a.buffer.nbytes for p in memory.values() for a in p.arrays) == memory.size_bytes
        share = memory["window"].size / memory["window"].device_ids, memory["full"].size / memory["full"].device_ids
        assert share[0] <= share[1] + 1e-9


def test_a_host_smaller_than_the_device_is_fine():
    """S-32: SGLang demands more on the host than on the device."""
    pool, parts = pool_of("mha")
    assert HostMemory.create(pool, parts, HostConfig(ratio=0.5))["full"].size == 3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"ratio": 0.1}, "no room for one id of 'full'"),
        ({"bytes": 500}, "no room for one id of 'full'"),
        ({"bytes": 8 * GIB, "reserve_bytes": 4096}, "does not fit"),
        ({"bytes": 5 * GIB}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, words):
    """S-32: SGLang holds back 10 GiB, whatever the machine."""
    pool, parts = pool_of("mha")
    with pytest.raises(ArgumentError, match=words):
        HostMemory.create(pool, parts, HostConfig(**sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        *({}, {"bytes": 1, "ratio": 1}, {"bytes": 0}, {"bytes": 1.5}, {"bytes": True}, {"ratio": 0}, {"ratio": -1}),
        *({"ratio": float("nan")}, {"ratio": float("inf")}, {"ratio": "2"}, {"ratio": 2, "layout": "page_first"}),
        *({"ratio": 2, "staging_bytes": 0}, {"ratio": 2, "reserve_bytes": -1}),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(sizes):
    with pytest.raises(ArgumentError):
        HostConfig(**sizes)


@pytest.mark.parametrize("parts", [[], [Part("full", ("none",))], [Part("full", ())]])
def test_components_without_a_stack_in_the_pool_are_refused(parts):
    with pytest.raises(ArgumentError, match="components"):
        HostMemory.create(pool_of("mha")[0], parts, HostConfig(ratio=2))


def test_memory_is_locked_once_and_as_large_as_it_is(monkeypatch):
    library = with_library(monkeypatch)
    pool, parts = pool_of("hybrid")
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2))
    assert sorted(library.locked.values()) == sorted(host.size * host.page_bytes for host in memory.values())
    memory.close()
    assert not library.locked
    memory.close()


def test_memory_that_nobody_has_any_more_is_unlocked(monkeypatch):
    library = with_library(monkeypatch)
    pool, parts = pool_of("mha")
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2))
    assert library.locked
    del memory
    assert not library.locked


def test_a_system_that_refuses_to_lock_leaves_nothing_locked(monkeypatch):
    library = with_library(monkeypatch)
    lock, calls = FakeLibrary.cuMemHostRegister, []

    def second_fails(self, *given):
        calls.append(given)
        return 2 if len(calls) == 2 else lock(self, *given)

    monkeypatch.setattr(FakeLibrary, "cuMemHostRegister", second_fails)
    library.__init__()
    pool, parts = pool_of("hybrid")
    with pytest.raises(TransferError, match="cuMemHostRegister"):
        HostMemory.create(pool, parts, HostConfig(ratio=2))
    assert len(calls) == 2 and not library.locked


def with_library(monkeypatch) -> FakeLibrary:
    library = FakeLibrary()
    link = lambda pool: CudaLink(pool.buffers[0].devices(), FakeDriver(library))  # noqa: E731
    monkeypatch.setattr(host_memory, "link_to", link)
    return library


def test_a_child_process_cannot_make_locked_pages_move():
    """After a fork, a page that the parent writes to would be a copy of the one that the copy engine has."""
    pool, parts = pool_of("mha")
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2))
    address = memory["full"].arrays[0].buffer.ctypes.data
    flags, is_here = "", False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_here = int(found[1], 16) <= address < int(found[2], 16)
        elif is_here and line.startswith("VmFlags:"):
            flags = line
    assert "dc" in flags.split(), "not copied at a fork"


def test_memory_in_use_is_not_closed():
    pool, parts = pool_of("mha")
    memory = HostMemory.create(pool, parts, HostConfig(ratio=2))
    ids = memory["full"].alloc(1)
    assert ids is not None
    memory["full"].start_transfer(ids, HostState.RESERVED)
    with pytest.raises(OwnershipError, match="in flight"):
        memory.close()
    assert Transfers(memory).device_bytes == 2 * memory.config.staging_bytes


def test_a_container_may_have_less_than_its_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert machine.available_bytes(meminfo, tmp_path) == 64 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("10240\n")
    assert machine.available_bytes(meminfo, tmp_path) == 64 * 1024
    (tmp_path / "memory.max").write_text("20480\n")
    assert machine.available_bytes(meminfo, tmp_path) == 10240
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1024\n")
    assert machine.available_bytes(meminfo, tmp_path) == 11264
    (tmp_path / "memory.current").write_text("99999\n")
    assert machine.available_bytes(meminfo, tmp_path) == 0
    meminfo.write_text("nothing\n")
    with pytest.raises(OSError, match="MemAvailable"):
        machine.available_bytes(meminfo, tmp_path)


def test_this_machine_has_some():
    assert machine.available_bytes() > np.int64(1 << 20)
