"""The benchmark of the kernels: its peers write the rows to the same slots, and its numbers mean what they say."""

import importlib.util
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_loops, peers, timing
from benchmarks.flashinfer_append import append_kv, append_mla_kv

torch = pytest.importorskip("torch")


class FakeFlashInfer(types.ModuleType):
    """Appends as FlashInfer documents it, token by token."""

    def append_paged_kv_cache(self, k, v, batch_indices, positions, cache, *pages):
        self._append((k, v), batch_indices, positions, cache, *pages)

    def append_paged_mla_kv_cache(self, ckv, kpe, batch_indices, positions, ckv_cache, kpe_cache, *pages):
        self._append((ckv, kpe), batch_indices, positions, (ckv_cache, kpe_cache), *pages)

    def _append(self, rows, batch_indices, positions, caches, kv_indices, kv_indptr, kv_last_page_len):
        for table in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
            assert table.dtype == torch.int32
        page_size = caches[0].shape[1]
        for i, (batch, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
            first, end = kv_indptr[batch : batch + 2].tolist()
            assert position < (end - first - 1) * page_size + int(kv_last_page_len[batch])
            page = int(kv_indices[first + position // page_size])
            for row, cache in zip(rows, caches, strict=True):
                cache[page, position % page_size] = row[i]


def test_flashinfer_writes_the_same_rows_to_the_same_slots():
    flashinfer, slots = FakeFlashInfer("flashinfer"), torch.tensor([7, 2, 19, 4])
    pools, rows = [torch.zeros(2, 20, 3, dim) for dim in (8, 5)], [torch.rand(4, 3, dim) for dim in (8, 5)]
    append_kv(flashinfer, *pools, slots, *rows)()
    parts, latents = [torch.zeros(2, 20, dim) for dim in (8, 5)], [torch.rand(4, dim) for dim in (8, 5)]
    append_mla_kv(flashinfer, *parts, slots, *latents)()
    for pool, row in zip([*pools, *parts], [*rows, *latents], strict=True):
        want = torch.zeros_like(pool)
        want[:, slots] = row
        assert torch.equal(pool, want)


@pytest.mark.parametrize("is_installed", [True, False])
def test_flashinfer_is_a_peer_where_it_is_installed(monkeypatch, capsys, is_installed):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util,
        "find_spec",
        lambda name: (is_installed or None) if name == "flashinfer" else find_spec(name),
    )
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashInfer("flashinfer"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers, "load_kernels", lambda folder: None)
    found = peers.find_peers(None)
    assert found.torch is torch and (found.flashinfer is not None) == is_installed
    assert ("no flashinfer" in capsys.readouterr().out) != is_installed


def test_a_row_says_how_far_the_samples_lie_apart(tmp_path):
    report = timing.Report(tmp_path / "device.jsonl", "a device", "abc")
    report.copy_us[1000] = 1.0
    report.add("write_kv", "n=1", "jaxcache-triton", timing.Time.of([5.0, 2.0, 4.0], first_call_s=0.25), moved=1000)
    (row,) = map(json.loads, report.path.read_text().splitlines())
    assert (row["median_us"], row["min_us"], row["max_us"], row["first_call_s"]) == (4.0, 2.0, 5.0, 0.25)
    assert (row["gb_per_s"], row["ratio_to_copy"], row["kernel_us"]) == (0.2, 0.25, None)  # 1,000 bytes in 4 us


def test_calls_of_a_step_that_donates_are_timed_and_state_goes_on():
    step = jax.jit(lambda state, more: state + more, donate_argnums=0)
    took, state = timing.time_jax_donated(step, jnp.zeros(3), jnp.ones(3))
    assert took.min_us <= took.median_us <= took.max_us and took.first_call_s is not None
    assert state[0] >= 1 + timing.FEWEST_CALLS * (timing.WARM_UPS + timing.SAMPLES)
    assert timing.with_kernel_time(took, step, state, jnp.ones(3)).kernel_us is None or jax.default_backend() == "gpu"


def test_decode_loops_are_checked_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(device_loops, "LOOPS", ((3, 2),))
    (line,) = device_loops.check_decode_loops(small=True)
    assert line.startswith("decode loop: 8 requests, 3 steps of 2 tokens")


def test_the_check_sees_a_slot_that_differs(monkeypatch):
    launch = device_loops.launch

    def wrong(*args):
        plan, ((slots, *rest), *books) = launch(*args)
        with jax.transfer_guard("allow"):
            return plan, ((slots.at[1, 2, 0].add(1), *rest), *books)

    monkeypatch.setattr(device_loops, "launch", wrong)
    with pytest.raises(AssertionError, match="not equal"):
        device_loops.check_decode_loop(8, 3, 1)
