"""These tests need torch. Where it is missing they are not collected, since a run that may skip nothing has none.

They run on a CPU and on a GPU: where the pools are, there torch makes its tensors.
"""

import importlib.util

import jax

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]

if not collect_ignore_glob and jax.default_backend() == "gpu":
    import torch

    torch.set_default_device("cuda")
