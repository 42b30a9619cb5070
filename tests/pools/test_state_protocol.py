"""The whole protocol of states, with a model whose every output depends on all tokens before it.

Prompts in pieces, decoding, snapshots, requests that resume from another's snapshot, retraction to the host and back:
each output must be what the model gives for the whole sequence in one piece. A state that was read a step too early,
shared instead of copied, not emptied, or taken by padding shows in the next token.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.device.donation import donating
from jaxcache.pages.allocator import PageState
from jaxcache.pages.states import StateAllocator
from jaxcache.pools.mamba import MambaPool
from jaxcache.tables.hybrid_table import NO_COPY, HybridReqToTokenPool
from tests.pools.linear_attention import VOCABULARY, WIDTH, in_one_piece, make_weights, model_step, state_config

BATCH, TOKENS, PAGE = 4, 6, 2
MODEL = make_weights()


@donating
def engine_step(pool, before, states, tokens, is_token, after):
    """Resume, compute, save: `before` and `after` are lists of copies `(src, dst, count)`."""
    pool = pool.copy_states(*before)
    pool, out = model_step(pool, MODEL, states, tokens, is_token)
    return pool.copy_states(*after), out


class Engine:
    """The smallest engine for these layers: who has which state is on the host, all else in one jitted step."""

    def __init__(self, dtype=jnp.float32, num_states: int = 9):
        self.pool = MambaPool.create(state_config(num_states, dtype))
        self.states, self.table = StateAllocator(num_states), HybridReqToTokenPool(BATCH, 256, PAGE)
        self.sequences: dict[int, list[int]] = {}
        self.outputs: dict[int, list[np.ndarray]] = {}

    def admit(self, tokens=(), outputs=(), source: int = 0) -> int:
        """A request that has `tokens` behind it, whose state is `source`."""
        (row,) = self.table.alloc(1)
        self.table.set_state(row, self.states.alloc_track_slot(), source)
        self.sequences[row], self.outputs[row] = list(tokens), list(outputs)
        return row

    def step(self, work: dict[int, list[int]], save: tuple[int, ...] = ()) -> None:
        """Computes more tokens of some rows, and takes a snapshot of some of them."""
        rows = list(work)
        src, dst = self.table.state_copies(rows)
        snapshots = {row: self.states.alloc_track_slot() for row in save}
        tokens, is_token = np.zeros((BATCH, TOKENS), np.int32), np.zeros((BATCH, TOKENS), bool)
        states = np.zeros(BATCH, np.int32)
        for i, row in enumerate(rows):
            n = len(work[row])
            tokens[i, :n], is_token[i, :n], states[i] = work[row], True, self.table.state[row]
        saved = self.table.state[list(save)], np.array(list(snapshots.values()), np.int32)
        before, after = padded(src, dst), padded(*saved)
        self.pool, out = engine_step(self.pool, before, states, tokens, is_token, after)
        self.table.copied(rows)
        for i, row in enumerate(rows):
            self.sequences[row] += work[row]
            self.outputs[row] += list(np.asarray(out[i, : len(work[row])]))
        for row, state in snapshots.items():
            self.table.set_saved(row, state, len(self.sequences[row]))

    def leave(self, row: int) -> tuple[list[int], np.ndarray]:
        """The request ends. Returns its tokens and the outputs for them."""
        self.states.release(self.table.take_states(row), PageState.PRIVATE)
        self.table.free(row)
        return self.sequences.pop(row), np.array(self.outputs.pop(row))


def padded(src, dst):
    """A list of copies in a fixed shape; the padding is nonsense, as nothing beyond the count is looked at."""
    lists = [np.append(states, np.full(BATCH - len(states), 3)).astype(np.int32) for states in (src, dst)]
    return *map(jnp.asarray, lists), jnp.int32(len(src))


def check(engine, row, **tolerance):
    tokens, outputs = engine.leave(row)
    assert outputs.shape == (len(tokens), WIDTH)
    whole = np.zeros((BATCH, 64), np.int32)  # one shape: what comes after a token does not change its output
    whole[:, : len(tokens)] = tokens
    np.testing.assert_allclose(outputs, in_one_piece(MODEL, whole)[0, : len(tokens)], **tolerance)


# The same float32 operations in the same order: bit for bit where this was written, but XLA may fuse them otherwise.
EXACT = {"rtol": 0, "atol": 1e-6}


def random_tokens(rng, n):
    return rng.integers(0, VOCABULARY, n).tolist()


@pytest.mark.parametrize("pieces", [[6, 6], [1] * 12, [5, 1, 4, 2], [3, 6, 1, 1, 1]], ids=str)
def test_a_sequence_in_pieces_is_the_sequence_in_one_piece(pieces):
    engine, tokens = Engine(), random_tokens(np.random.default_rng(0), 12)
    row = engine.admit()
    for n in pieces:
        engine.step({row: tokens[len(engine.sequences[row]) :][:n]})
    check(engine, row, **EXACT)


def test_a_request_resumes_from_a_snapshot_while_its_owner_goes_on():
    rng, engine = np.random.default_rng(1), Engine()
    first = engine.admit()
    engine.step({first: random_tokens(rng, 6)}, save=(first,))
    shared, outputs = list(engine.sequences[first]), list(engine.outputs[first])
    state, length = engine.table.take_saved(first)
    assert length == 6
    engine.states.transfer([state], PageState.PRIVATE, PageState.TREE)  # what a prefix cache does
    engine.step({first: random_tokens(rng, 3)})
    second, third = (engine.admit(shared, outputs, source=state) for _ in range(2))
    engine.step({second: random_tokens(rng, 2), first: random_tokens(rng, 1)})
    engine.step({third: random_tokens(rng, 6), second: random_tokens(rng, 6), first: random_tokens(rng, 2)})
    for row in (first, second, third):
        check(engine, row, **EXACT)


def test_a_retracted_request_takes_its_state_to_the_host_and_back():
    rng, engine = np.random.default_rng(2), Engine()
    row = engine.admit()
    engine.step({row: random_tokens(rng, 5)})
    tokens, outputs = engine.sequences[row], engine.outputs[row]
    copy = engine.pool.get_cpu_copy(engine.table.state[[row]])
    engine.leave(row)
    for _ in range(3):  # others take its state
        other = engine.admit()
        engine.step({other: random_tokens(rng, 6)})
        check(engine, other, **EXACT)
    (row,), state = engine.table.alloc(1), engine.states.alloc_track_slot()
    engine.table.set_state(row, state, NO_COPY)
    engine.pool = engine.pool.load_cpu_copy(copy, [state])
    engine.sequences[row], engine.outputs[row] = tokens, outputs
    engine.step({row: random_tokens(rng, 4)})
    check(engine, row, **EXACT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, EXACT), (jnp.bfloat16, {"rtol": 0, "atol": 0.15})], ids=["float32", "bf16"]
)
@pytest.mark.parametrize("seed", range(3))
def test_any_traffic_gives_every_request_its_own_outputs(seed, dtype, tolerance):
    """States in bfloat16 are rounded to 8 bits after every piece: of outputs of about 1, some hundredths."""
    rng, engine = np.random.default_rng(seed), Engine(dtype)
    cached: dict[int, tuple[list[int], list[np.ndarray]]] = {}
    resumed = 0
    for _ in range(40):
        if len(engine.sequences) < BATCH and rng.random() < 0.6 and engine.states.available_size() > 1:
            source = int(rng.choice([0, *cached]))
            resumed += source > 0
            engine.admit(*cached.get(source, ((), ())), source=source)
        rows = [row for row in engine.sequences if rng.random() < 0.7]
        rng.shuffle(rows)
        work = {row: random_tokens(rng, rng.integers(1, TOKENS + 1)) for row in rows}
        can_save = [r for r in rows if (len(engine.sequences[r]) + len(work[r])) % PAGE == 0]
        engine.step(work, save=tuple(can_save[: engine.states.available_size()]))
        for row in rows:
            state, length = engine.table.take_saved(row)
            if state:
                engine.states.transfer([state], PageState.PRIVATE, PageState.TREE)
                cached[state] = engine.sequences[row][:length], engine.outputs[row][:length]
            if len(engine.sequences[row]) > 25 or rng.random() < 0.1:
                check(engine, row, **tolerance)
        free = [s for s in cached if s not in engine.table.state_from]
        while len(free) > 3:
            cached.pop(free[0])
            engine.states.release([free.pop(0)], PageState.TREE)
    assert resumed > 3
    for row in list(engine.sequences):
        check(engine, row, **tolerance)
    assert engine.states.available_size() == engine.states.size - len(cached)
    assert not any(np.any(part) for layer in range(2) for part in engine.pool.read([0], layer))


def test_the_outputs_depend_on_the_state():
    """Else everything above proves nothing."""
    rng, engine = np.random.default_rng(3), Engine()
    row = engine.admit()
    engine.step({row: random_tokens(rng, 6)})
    engine.pool = engine.pool.reset_states(engine.table.state[[row]])
    engine.step({row: random_tokens(rng, 6)})
    with pytest.raises(AssertionError):
        check(engine, row, rtol=0, atol=0.15)
