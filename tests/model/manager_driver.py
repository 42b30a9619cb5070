"""Random lives of a whole `MemoryManager` with a real jitted step: `python -m tests.model.manager_driver --ops 2000`.

The step writes what each token is, where it stands and whose it is. After every operation `check_memory` balances the
books; every few operations the device table and every row of every running request are read back and compared with the
request's own tokens. Fewer operations than `driver`, but nothing is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np

from jaxcache.errors import RequestStateError
from jaxcache.index.policies.registry import Policy
from jaxcache.manager.config import MemoryConfig
from jaxcache.manager.manager import MemoryManager, init_memory_pool_and_cache
from jaxcache.pages.allocator import PageState
from jaxcache.pools.mha import MHAConfig
from jaxcache.request import Request, RequestState
from jaxcache.steps.buckets import Buckets
from jaxcache.steps.compiled import CompiledSteps
from jaxcache.steps.plan import StepPlan

READ_BACK_EVERY = 8
OPS_PER_LIFE = 500


def write_step(pool, batch):
    """Keys say (token, position), values (owner, token + position), in every layer.

    Returns the sum of the tokens, and how many slots the table inside the step disagrees with, or tokens of the batch's
    requests, read after everything was written, are another's or stand elsewhere.
    """
    owner = batch.tag[batch.request]
    k = jnp.stack([batch.tokens, batch.positions], axis=-1)[:, None, :].astype(jnp.float32)
    v = jnp.stack([owner, batch.tokens + batch.positions], axis=-1)[:, None, :].astype(jnp.float32)
    for layer in range(pool.config.layer_num):
        pool = pool.set_kv_buffer(layer, batch.slots, k, v)
    slots = batch.table.slots(batch.row[batch.request], batch.positions, pool.config.page_size)
    strangers = jnp.sum(batch.valid & (slots != batch.slots)) + _misread(pool, batch)
    return pool, (jnp.sum(jnp.where(batch.valid, batch.tokens, 0)), strangers)


def _misread(pool, batch):
    """Tokens of the batch's requests whose rows in the pool do not say their own position and owner."""
    place = jnp.arange(batch.table.pages.shape[1] * batch.page_size)
    slots = batch.table.slots(batch.row[:, None], place, batch.page_size)
    k, v = (array[0, slots, 0] for array in (pool.k, pool.v))
    is_own = (k[..., 1] == place) & (v[..., 0] == batch.tag[:, None])
    return jnp.sum((place < batch.seq_len[:, None]) & ~is_own)


def sampling_step(pool, batch):
    """`write_step`, which leaves a next token for each request on the device: one that depends on the last."""
    pool, out = write_step(pool, batch)
    sampled = (batch.tokens.at[batch.last].get(mode="clip") + batch.seq_len) % 2
    return pool, (out, sampled), sampled


_POOL_PAGES = {1: 64, 4: 40, 16: 12}
_compiled: dict[int, CompiledSteps] = {}


def few_buckets(max_running: int, chunk: int) -> Buckets:
    """Two sizes of each kind: enough to choose from, and little to compile."""
    sizes = {2, max_running}
    return Buckets(tuple(sorted(sizes)), tuple(sorted({-(-chunk // 8), chunk})), (max_running,))


def small_manager(page_size: int = 4, num_pages: int = 16, max_running: int = 4, **options) -> MemoryManager:
    """A manager with two layers of two numbers a row, and `num_pages` pages to use.

    The pool is of one size whatever `num_pages` is (the rest is withheld), and compiled steps are shared by all
    managers: a test should not pay for XLA.
    """
    size = page_size * _POOL_PAGES[page_size]
    kv = MHAConfig(size=size, page_size=page_size, dtype=jnp.float32, layer_num=2, head_num=1, head_dim=2)
    options = {"max_context_len": 64, "chunk": 32} | options
    options = {"buckets": few_buckets(max_running, options["chunk"])} | options
    manager = init_memory_pool_and_cache(MemoryConfig(kv=kv, max_running=max_running, **options))
    manager.runner.compiled = _compiled.setdefault(page_size, CompiledSteps())
    withheld = np.arange(num_pages + 1, _POOL_PAGES[page_size] + 1, dtype=np.int32)
    pages = manager.allocator.alloc_pages(_POOL_PAGES[page_size])
    assert pages is not None
    manager.allocator.transfer(withheld, PageState.PRIVATE, PageState.QUARANTINED)
    manager.allocator.release(np.arange(1, num_pages + 1, dtype=np.int32), PageState.PRIVATE)
    return manager


def assert_contents(manager: MemoryManager, requests: list[Request]) -> None:
    """Every computed token of these running requests, read through the device table."""
    manager.check_memory(read_device=True)
    table, k, v = (np.asarray(array) for array in (manager.table.pages, manager.pool.k, manager.pool.v))
    size = manager.page_size
    for request in requests:
        n = min(request.kv_len, request.num_tokens)  # what is pending is looked at once it is known
        tokens = np.array([*request.origin_input_ids, *request.output_ids][:n])
        at = np.arange(n)
        slots = table[request.req_pool_idx][at // size] * size + at % size
        expected = np.stack([tokens, at, np.full(n, request.tag), tokens + at], axis=-1)
        for layer in range(k.shape[0]):
            got = np.concatenate([k[layer, slots, 0], v[layer, slots, 0]], axis=-1)
            np.testing.assert_array_equal(got, expected, err_msg=f"request {request.rid}, layer {layer}")


class ManagerDriver:
    """Chooses what happens next to one manager. The namespace of a request is its owner."""

    def __init__(self, seed: int, page_size: int, policy: Policy = Policy.LRU):
        self.rng = random.Random(seed)
        self.num_pages = {1: 32, 4: 12, 16: 8}[page_size]
        self.manager = small_manager(page_size, self.num_pages, policy=policy)
        # Little room for table changes in a step, and in a patch: what does not fit has to travel ahead, in pieces.
        self.manager.planner.buckets = tuple(dataclasses.replace(bucket, changes=6) for bucket in self.manager.buckets)
        self.manager.warm_up(write_step)
        self.unread: list[tuple[list[tuple[int, Request]], jnp.ndarray]] = []
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.recent: list[list[int]] = [[]]
        self.count = self.shared = 0

    def run(self, ops: int) -> None:
        choices = [
            *(self.admit, self.extend, self.decode, self.finish, self.retract, self.abort, self.evict),
            *(self.admit_twins, self.fork, self.read),
        ]
        for i in range(ops):
            (operation,) = self.rng.choices(choices, [5, 9, 10, 2, 2, 1, 2, 2, 2, 8])
            operation()
            if i % READ_BACK_EVERY:
                self.manager.check_memory()
            else:
                assert_contents(self.manager, self.running)
        self.wind_down()

    def wind_down(self) -> None:
        while self.unread and self.rng.random() < 0.9:
            self.read()
        assert_contents(self.manager, self.running)
        while self.running:
            self.manager.finish(self.running.pop())
        self.waiting.clear()
        self.unread.clear()
        manager = self.manager
        manager.check_memory(read_device=True)
        assert manager.cache.protected_size() == 0
        manager.cache.evict(manager.allocator.size)
        assert manager.allocator.available_size() == self.num_pages * manager.page_size
        assert manager.req_to_token_pool.available_size() == manager.config.max_running

    def admit_twins(self) -> None:
        """Two or three requests that share most of a prompt, at once."""
        rng, size = self.rng, self.manager.page_size
        first = [rng.randrange(2) for _ in range(rng.randint(size, 3 * size + 2))]
        tag = rng.randrange(2)
        for _ in range(rng.randint(2, 3)):
            self.count += 1
            tokens = first[: rng.randint(size, len(first))] + [rng.randrange(2) for _ in range(rng.randint(1, size))]
            tokens = tokens[: self.manager.config.max_context_len // 2]
            self.recent.append(tokens)
            request = Request(str(self.count), tokens, str(tag), tag=tag)
            if self.manager.admit(request) is None:
                self.waiting.append(request)
            else:
                self.running.append(request)
        self.extend(whole=True)

    def admit(self) -> None:
        rng = self.rng
        if self.waiting and rng.random() < 0.7:
            request = self.waiting.pop(rng.randrange(len(self.waiting)))
            while request.pending:
                self.read()
        else:
            old = rng.choice(self.recent[-8:])
            new = [rng.randrange(2) for _ in range(rng.randint(1, 2 * self.manager.page_size + 2))]
            tokens = (old[: rng.randint(0, len(old))] + new)[: self.manager.config.max_context_len // 2]
            self.recent.append(tokens)
            self.count += 1
            tag = rng.randrange(2)
            cap = rng.randint(0, len(tokens)) if rng.random() < 0.1 else None
            request = Request(str(self.count), tokens, str(tag), rng.randrange(3), tag=tag, logprob_start_len=cap)
        found = self.manager.admit(request)
        if found is None:
            self.waiting.append(request)
        else:
            assert found == request.kv_len < request.num_tokens
            self.running.append(request)

    def extend(self, whole: bool = False) -> None:
        budget = self.manager.config.chunk
        work = []
        for request in self.running[-4:] if whole else self.some():
            missing = min(request.num_tokens + request.pending - request.kv_len, budget)
            missing = min(missing, self.manager.config.max_context_len - request.kv_len)
            if missing > 0:
                work.append((request, missing if whole else self.rng.randint(1, missing)))
                budget -= work[-1][1]
        before = {request: request.kv_len for request, _ in work}
        plan = self.manager.extend(work, share_in_step=self.rng.random() < 0.8) if work else None
        if plan is None:
            assert before == {request: request.kv_len for request, _ in work}
            return
        asked = dict(work)
        for request, start, computed in zip(plan.requests, plan.prefix_len, plan.num_computed, strict=True):
            assert start >= before[request]
            assert 1 <= computed <= asked[request]
            self.shared += request in plan.takers
        choice = self.rng.random()
        if choice < 0.1:
            self.manager.cancel(plan)
        elif choice < 0.15:
            self.end_before_it_runs(plan)
        else:
            self.dispatch(plan)

    def end_before_it_runs(self, plan: StepPlan) -> None:
        """A request of a plan ends: the plan cannot run any more, and the others have their own pages only."""
        ended = self.rng.choice(plan.requests)
        self.manager.abort(ended)
        self.running.remove(ended)
        self.manager.check_memory()
        try:
            self.manager.run(write_step, plan)
        except RequestStateError:
            pass
        else:
            raise AssertionError("a plan ran of which a request has ended")
        if len(plan.requests) > 1:
            self.manager.cancel(plan)

    def dispatch(self, plan: StepPlan) -> None:
        """Runs a plan; every other one leaves its tokens on the device, to be read later."""
        if self.rng.random() < 0.5:
            total, strangers = self.manager.run(write_step, plan)
            work = zip(plan.requests, plan.prefix_len, plan.seq_len, strict=True)
            if all(stop <= request.num_tokens for request, _, stop in work):
                work = zip(plan.requests, plan.prefix_len, plan.seq_len, strict=True)
                assert int(total) == sum(int(request.key.token_ids[start:stop].sum()) for request, start, stop in work)
        else:
            work = enumerate(zip(plan.requests, plan.seq_len.tolist(), strict=True))
            news = [(i, request) for i, (request, stop) in work if stop == request.num_tokens + request.pending]
            pending = {request: request.pending for _, request in news}
            (_, strangers), sampled = self.manager.run(sampling_step, plan)
            assert all(request.pending == before + 1 for request, before in pending.items())
            self.unread.append((news, sampled))
        assert int(strangers) == 0, "the table in the step is not the host's"

    def read(self) -> None:
        """The tokens of the step that ran longest ago arrive, also at those that have ended since."""
        if self.unread:
            news, sampled = self.unread.pop(0)
            for i, request in news:
                if request.state is not RequestState.DONE:
                    pending = request.pending
                    request.output_ids.append(int(sampled[i]))
                    assert request.pending == pending - 1

    def decode(self) -> None:
        batch = []
        for request in self.some():
            if not request.pending and request.kv_len == request.num_tokens < self.manager.config.max_context_len:
                request.output_ids.append(self.rng.randrange(2))
            if request.num_tokens + request.pending - request.kv_len == 1:
                batch.append(request)
        batch = [request for request in batch if request.kv_len < self.manager.config.max_context_len]
        plan = self.manager.decode(batch) if batch else None
        if plan is not None:
            self.dispatch(plan)

    def some(self) -> list[Request]:
        return self.rng.sample(self.running, self.rng.randint(0, len(self.running)))

    def fork(self) -> None:
        settled = [request for request in self.running if not request.pending]
        if settled:
            request, n = self.rng.choice(settled), self.rng.randint(1, 2)
            forks = self.manager.fork(request, n)
            if forks is not None:
                assert [fork.kv_len for fork in forks] == [request.kv_len] * n
                self.running += forks

    def finish(self) -> None:
        if self.running:
            self.manager.finish(self.running.pop(self.rng.randrange(len(self.running))))

    def abort(self) -> None:
        pool = self.rng.choice([self.running, self.waiting])
        if pool:
            self.manager.abort(pool.pop(self.rng.randrange(len(pool))))

    def retract(self) -> None:
        if self.running:
            request = self.running.pop(self.rng.randrange(len(self.running)))
            offload = self.rng.random() < 0.5 and request.kv_len <= request.num_tokens
            self.manager.retract(request, offload=offload)
            assert (request.kv_len, request.num_pages, request.lock) == (0, 0, None)
            self.waiting.append(request)

    def evict(self) -> None:
        self.manager.cache.evict(self.rng.randint(1, 2 * self.manager.page_size))


def drive(seed: int, ops: int, page_size: int, policy: Policy = Policy.LRU) -> None:
    """`ops` operations on one manager, winding down now and then."""
    with mock.patch("jaxcache.steps.runner.TABLE_PATCH_ENTRIES", 4):
        driver = ManagerDriver(seed, page_size, policy)
        for start in range(0, ops, OPS_PER_LIFE):
            driver.run(min(OPS_PER_LIFE, ops - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    for i, page_size in enumerate((1, 4, 16)):
        drive(arguments.seed + i, arguments.ops // 3, page_size, (Policy.LRU, Policy.PRIORITY)[i % 2])
    elapsed = time.perf_counter() - started
    print(f"{arguments.ops} operations, 0 violations, {arguments.ops / elapsed:,.0f} operations/s")


if __name__ == "__main__":
    main()
