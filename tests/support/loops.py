"""What the tests of decode loops share: a model whose KV says what it is, and an oracle that goes step by step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pages.allocator import BaseTokenToKVPoolAllocator, FreeOrder, PageState
from jaxcache.pages.paged import PagedTokenToKVPoolAllocator
from jaxcache.pages.token import TokenToKVPoolAllocator
from jaxcache.pools.mha import MHAConfig
from jaxcache.replay.content import count_mismatches, row_content, token_seed, write_step
from jaxcache.request import Request

CONTEXT = {1: 48, 4: 64, 16: 128}
NUM_PAGES = {1: 200, 4: 90, 16: 40}


def make_manager(page_size: int, num_pages: int | None = None, **options) -> MemoryManager:
    size = page_size * (num_pages or NUM_PAGES[page_size])
    kv = MHAConfig(size=size, page_size=page_size, dtype=jnp.float32, layer_num=2, head_num=1, head_dim=4)
    options = {"max_running": 6, "max_context_len": CONTEXT[page_size], "chunk": 128} | options
    return init_memory_pool_and_cache(MemoryConfig(kv=kv, **options))


def clear(manager: MemoryManager) -> None:
    """As new, but for what is compiled and for the content of pool and table."""
    manager.running.clear()
    manager._loops._flights.clear()
    manager._loops._held[:] = False
    manager.reset()
    manager.req_to_token_pool._pages[:] = np.asarray(manager.table.pages)


def prefilled(manager: MemoryManager, prompts, *, tag=None) -> list[Request]:
    """Running requests with their whole prompts computed and one token sampled."""
    requests = [
        Request(str(i), tokens, extra_key=str(i if tag is None else tag), tag=i if tag is None else tag)
        for i, tokens in enumerate(prompts)
    ]
    for request in requests:
        assert manager.admit(request) is not None
        manager.run(write_step, manager.extend([(request, request.num_tokens - request.kv_len)]))
        request.output_ids.append(500 + int(request.rid))
    return requests


def draft(tag, position, step):
    """A token that depends on the step, so that a rejected draft differs from what takes its place."""
    return (tag * 7919 + position * 31 + step * 1009) % 4093


def speculate(pool, loop, accepted, stopped):
    """A model with drafts: every step computes the known token and `width - 1` drafts, in all layers."""

    def one_step(carry, inputs):
        pool, loop, known = carry
        step, accept, stop = inputs
        loop, slots = loop.grow()
        positions = loop.positions
        drafts = draft(loop.tag[:, None], positions, step)
        tokens = jnp.concatenate([known[:, None], drafts[:, 1:]], axis=1)
        pool = write_tokens(pool, loop.tag, tokens, positions, slots)
        before = loop.rows.seq_len
        loop = loop.accept(accept)
        known = jnp.where(loop.rows.seq_len > before, draft(loop.tag, loop.rows.seq_len, step), known)
        loop = loop.stop(stop)
        return (pool, loop, known), (slots, tokens, known, loop.rows.ok)

    steps = jnp.arange(len(accepted), dtype=jnp.int32)
    (pool, loop, _), out = jax.lax.scan(one_step, (pool, loop, loop.tokens), (steps, accepted, stopped))
    return pool, loop, (out, loop.rows, loop.allocator)


def write_tokens(pool, tag, tokens, positions, slots):
    seed = token_seed(jnp.repeat(tag, tokens.shape[1]), tokens.ravel(), positions.ravel())
    shapes = pool.config.row_shapes

    def one_layer(i, carried):
        planes = [row_content(seed, i, plane, shape, pool.config.dtype) for plane, shape in enumerate(shapes)]
        return carried.set_kv_buffer(pool.config.start_layer + i, slots.ravel(), *planes)

    return jax.lax.fori_loop(0, pool.config.layer_num, one_layer, pool)


def padded(columns, width: int, dtype) -> jax.Array:
    """`(steps, requests)` on the device, with columns of padding, which must not matter: they are full."""
    columns = np.asarray(columns)
    fill = np.ones((len(columns), width - columns.shape[1]), columns.dtype)
    return jax.device_put(np.concatenate([columns, fill], axis=1).astype(dtype))


def launch(manager: MemoryManager, plan, accepted, stopped):
    """Runs `speculate`; returns what it returned, as NumPy."""
    width = plan.shape.requests
    out = manager.run_loop(speculate, plan, padded(accepted, width, np.int32), padded(stopped, width, bool))
    return jax.tree.map(np.asarray, out)


def append_tokens(replay, out) -> None:
    """What an engine does with the sampled tokens that count."""
    (_, tokens, known, _), *_ = out
    for i, request in enumerate(replay.plan.requests):
        for step in np.flatnonzero(replay.accepted[:, i]):
            kept = tokens[step, i, 1 : replay.accepted[step, i]].tolist()
            request.output_ids += [*kept, int(known[step, i])]


_count_mismatches = jax.jit(count_mismatches)


def assert_contents(manager: MemoryManager, requests) -> None:
    """Every token with KV, read back through the device table, and the books."""
    manager.check_memory(read_device=True)
    wrong = jnp.int32(0)
    for request in requests:
        tokens = np.zeros(manager.config.max_context_len, np.int32)
        tokens[: request.kv_len] = request.key.token_ids[: request.kv_len]
        packed = np.array([request.req_pool_idx, request.tag, 0, request.kv_len, 0, *tokens], np.int32)
        wrong = _count_mismatches(manager.pool, manager.table, packed, wrong)
    assert int(wrong) == 0
    for buffer in manager.pool.buffers:
        assert not np.asarray(buffer)[:, : manager.page_size].any()  # nothing was ever written to the sink


def twin_of(allocator: BaseTokenToKVPoolAllocator) -> BaseTokenToKVPoolAllocator:
    """Another allocator with the same free list; pages in use are PRIVATE or the tree's in both."""
    size, is_token = allocator.page_size, allocator.page_size == 1
    twin = TokenToKVPoolAllocator(allocator.size) if is_token else PagedTokenToKVPoolAllocator(allocator.size, size)
    twin.alloc_pages(twin.num_pages)
    in_order = allocator.free_pages
    for page in in_order if twin.free_order is FreeOrder.FIFO else in_order[::-1]:
        twin.release([page], PageState.PRIVATE)
    twin.transfer(np.flatnonzero(allocator.states == PageState.TREE), PageState.PRIVATE, PageState.TREE)
    assert twin.free_pages.tolist() == in_order.tolist()
    return twin


@dataclasses.dataclass
class Row:
    """One request of the oracle: a list of pages, and how many tokens are in them."""

    pages: list[int]
    length: int
    limit: int
    active: bool = True


class Oracle:
    """The same steps on a copy of the host's allocator, one allocation a step, token by token."""

    def __init__(self, manager: MemoryManager, requests, limits):
        self.page_size = manager.page_size
        self.allocator = twin_of(manager.allocator)
        self.lent = 0
        self.rows = []
        for request, limit in zip(requests, limits, strict=True):
            pages = manager.req_to_token_pool.row_pages(request.req_pool_idx, 0, request.num_pages).tolist()
            self.rows.append(Row(pages, request.kv_len, limit))
        self.taken: list[int] = []
        self.ok = True

    def step(self, width, accepted, stopped) -> list[list[int]]:
        """Slots of every row, `width` of them."""
        wanted = []
        for row in self.rows:
            wanted.append(min(width, row.limit - row.length) if row.active and self.ok else 0)
        missing = [self._missing(row, n) for row, n in zip(self.rows, wanted, strict=True)]
        if len(self.taken) + sum(missing) > self.lent:
            self.ok = False
            return [[0] * width for _ in self.rows]
        slots = []
        fresh = self.allocator.alloc_pages(sum(missing)).tolist()
        self.taken += fresh
        for i, row in enumerate(self.rows):
            row.pages += [fresh.pop(0) for _ in range(missing[i])]
            positions = range(row.length, row.length + wanted[i])
            mine = [row.pages[p // self.page_size] * self.page_size + p % self.page_size for p in positions]
            slots.append(mine + [0] * (width - len(mine)))
            row.length += min(accepted[i], wanted[i])
            row.active = row.active and not (stopped[i] and self.ok)
        return slots

    def _missing(self, row: Row, n: int) -> int:
        pages = {p // self.page_size for p in range(row.length, row.length + n)}
        return len(pages - set(range(len(row.pages))))

    def settle(self) -> list[int]:
        """The free list once every page without an accepted token was given back."""
        spare = []
        for row in self.rows:
            keep = len({p // self.page_size for p in range(row.length)})
            spare += row.pages[keep:]
        self.allocator.release(spare, PageState.PRIVATE)
        return self.allocator.free_pages.tolist()
