"""What all tests share: tests marked `gpu` skip where JAX sees none; property tests take as long as compiling takes."""

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("jaxcache", deadline=None, print_blob=True)
hypothesis.settings.load_profile("jaxcache")

# Devices to shard over, for a machine with one CPU. Must come before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none; asks JAX for its devices only if a test needs one."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and jax.default_backend() != "gpu":
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
