"""The link of NVIDIA GPUs: the copy engines move pages between blocks and page-locked host memory.

    XLA's stream     gather ──┐                                      ┌── scatter, dispatched when the host saw the event
    stream of saves           └─► pages to the host ── event         │
    stream of fetches    zeros ─► pages to the block ── event ───────┘

No kernel takes part and no step waits: these streams wait for XLA's on the device, XLA's waits for neither. A block is
kept alive until its event has happened.

The block of a fetch is a JAX array that the copy engine writes to, behind JAX's back. It is safe because nothing else
uses it before the event has happened, and its value on the host is never asked for.

Source: jaxcache's own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.errors import TransferError
from jaxcache.tiers.cuda_driver import MOST_PITCH, Driver, Rows
from jaxcache.tiers.host_layout import HostArray
from jaxcache.tiers.host_pool import HostPool
from jaxcache.tiers.link import Link, Pending, every_shard_of, shards_of

if TYPE_CHECKING:
    from jaxtyping import Int32, UInt8


class CudaLink(Link):
    """Copies by the copy engines.

    Args:
      devices: Those of the pool that belong to this process.
      driver: NVIDIA's.

    Raises:
      TransferError: The driver refuses.
    """

    def __init__(self, devices: Iterable[Any], driver: Driver | None = None):
        self._driver = driver = Driver() if driver is None else driver
        contexts = {device.id: driver.context(device.local_hardware_id or 0) for device in devices}
        self._saves = {id: _Stream(driver, context, driver.copy_to_host) for id, context in contexts.items()}
        self._fetches = {id: _Stream(driver, context, driver.copy_to_device) for id, context in contexts.items()}
        self._context = next(iter(contexts.values()))
        self._makers: dict[Any, Callable[[], list[jax.Array]]] = {}
        self._pinned: list[UInt8[np.ndarray, " bytes"]] = []
        self._unpin = weakref.finalize(self, _unpin, driver, self._context, self._pinned)
        self._unpin.atexit = False  # the driver may have ended by then, and its locks with it

    def pin(self, buffer: UInt8[np.ndarray, " bytes"]) -> None:
        """See `Link.pin`."""
        with self._driver.current(self._context):
            self._driver.lock(buffer.ctypes.data, buffer.nbytes)
        self._pinned.append(buffer)

    def save(self, blocks: Sequence[jax.Array], pool: HostPool, ids: Int32[np.ndarray, " n"]) -> Pending:
        """See `Link.save`."""
        return _Copying(blocks, shards_of(pool, blocks), ids, self._saves)

    def fetch(
        self, pool: HostPool, ids: Int32[np.ndarray, " n"], blocks: Sequence[jax.ShapeDtypeStruct], where: Sequence[Any]
    ) -> tuple[list[jax.Array], Pending]:
        """See `Link.fetch`."""
        arrays = self._fresh(blocks, where)
        return arrays, _Copying(arrays, every_shard_of(pool, arrays), ids, self._fetches)

    def _fresh(self, blocks: Sequence[jax.ShapeDtypeStruct], where: Sequence[Any]) -> list[jax.Array]:
        """Arrays to be written to; each device makes its own part."""
        key = tuple((block.shape, block.dtype) for block in blocks), tuple(where)
        make = self._makers.get(key)
        if make is None:
            make = jax.jit(lambda: [jnp.zeros(*one) for one in key[0]], out_shardings=list(where))
            self._makers[key] = make
        return make()

    def close(self) -> None:
        """See `Link.close`."""
        self._unpin()


class _Stream:
    """Copies of one device in one direction, one after the other.

    Args:
      driver: NVIDIA's.
      context: The device's.
      copy: What copies rows in this direction.
    """

    def __init__(self, driver: Driver, context: int, copy: Callable[[Rows, int], None]):
        self._driver, self._context, self._copy = driver, context, copy
        with driver.current(context):
            self._stream = driver.stream()

    def start(self, data: Any, copies: Iterable[Rows]) -> None:
        """Starts copies from or to an array, once JAX has computed it."""
        with self._driver.current(self._context):
            self._driver.after(data, self._stream)
            for rows in copies:
                self._copy(rows, self._stream)

    def event(self) -> _Event:
        """Has happened when all that was started is done."""
        with self._driver.current(self._context):
            return _Event(self._driver, self._context, self._driver.event(self._stream))

    def drain(self) -> None:
        """Waits for all that was started."""
        with self._driver.current(self._context):
            self._driver.drain(self._stream)


class _Event:
    """An event of the driver's, freed with this object."""

    def __init__(self, driver: Driver, context: int, event: int):
        self._driver, self._context, self._event = driver, context, event
        weakref.finalize(self, _end_event, driver, context, event).atexit = False

    def has_happened(self) -> bool:
        with self._driver.current(self._context):
            return self._driver.has_happened(self._event)

    def wait(self) -> None:
        with self._driver.current(self._context):
            self._driver.wait(self._event)


class _Copying(Pending):
    """Copies in flight.

    Args:
      blocks: What they read or write; kept alive for as long.
      parts: The parts of the blocks on each device, with the host's array of each.
      ids: Pages, in the order of the block.
      streams: By id of the device.

    Raises:
      TransferError: The driver refuses; what was started is done then.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        parts: Iterable[tuple[HostArray, Any]],
        ids: Int32[np.ndarray, " n"],
        streams: Mapping[int, _Stream],
    ):
        self._blocks = blocks
        self._streams: dict[_Stream, None] = {}
        with self._or_drained():
            for array, data in parts:
                (device,) = data.devices()
                self._streams[streams[device.id]] = None
                streams[device.id].start(data, rows_of(array, ids, data.unsafe_buffer_pointer()))
            self._events = [stream.event() for stream in self._streams]

    def is_done(self) -> bool:
        with self._or_drained():
            if not all(event.has_happened() for event in self._events):
                return False
        jax.block_until_ready(self._blocks)  # it is; if it failed, this says so
        return True

    def wait(self) -> None:
        with self._or_drained():
            for event in self._events:
                event.wait()

    @contextlib.contextmanager
    def _or_drained(self) -> Iterator[None]:
        """Raises what the driver refuses when nothing of this is left in flight: its memory goes then."""
        try:
            yield
        except TransferError:
            for stream in self._streams:
                with contextlib.suppress(TransferError):
                    stream.drain()
            raise


def rows_of(array: HostArray, ids: Int32[np.ndarray, " n"], block: int) -> Iterator[Rows]:
    """What is to be copied of an array, in as few pieces as its layout allows.

    Args:
      array: The host's.
      ids: Pages, in the order of the block; neighbours travel together.
      block: Address of the block on the device.
    """
    if not len(ids):
        return
    page_bytes, host = array.shape.page_bytes, array.buffer.ctypes.data
    stride = array.pages.strides[0]
    if stride == page_bytes:
        ends = np.flatnonzero(np.diff(ids) != 1) + 1
        for start, stop in zip([0, *ends.tolist()], [*ends.tolist(), len(ids)], strict=True):
            first = int(ids[start]) - 1
            yield Rows(host + first * page_bytes, block + start * page_bytes, (stop - start) * page_bytes)
        return
    layers, pitch = array.pages.shape[1], array.pages.strides[1]
    for i, page in enumerate((ids - 1).tolist()):
        at, target = host + page * stride, block + i * page_bytes
        if pitch < MOST_PITCH:
            yield Rows(at, target, stride, layers, pitch)
        else:
            yield from (Rows(at + layer * pitch, target + layer * stride, stride) for layer in range(layers))


def _unpin(driver: Driver, context: int, pinned: list[Any]) -> None:
    with driver.current(context):
        while pinned:
            driver.unlock(pinned[-1].ctypes.data)
            pinned.pop()


def _end_event(driver: Driver, context: int, event: int) -> None:
    with driver.current(context):
        driver.end_event(event)
