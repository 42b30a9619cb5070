"""What only a GPU can show: streams, kernels, memory of torch's that JAX updates. `benchmarks.bridge` runs the same."""

import jax
import pytest

from benchmarks import bridge_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU that JAX and torch see"),
]


def test_addresses():
    assert bridge_checks.check_addresses() == 21


def test_kernels_launched_from_torch():
    assert bridge_checks.check_writes() == 14


def test_order_with_a_spin_in_front_of_each_side():
    assert bridge_checks.check_order()


def test_without_an_order_the_spins_are_seen():
    assert bridge_checks.control() == ["jax_write_torch_read", "torch_write_jax_read"]


def test_dead_views():
    assert bridge_checks.check_dead_views() == 8


def test_pools_in_torchs_memory():
    assert bridge_checks.check_adopted_pools() == 200


def test_alternating_writes():
    assert bridge_checks.check_alternating(5000) == 5000
