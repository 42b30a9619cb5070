"""Every launch of attention, compiled for the GPUs that it is chosen for: it fits into their shared memory."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.triton_launches import SHARED_BYTES, Model, compile_launch, kernels

pytestmark = pytest.mark.h200

MODELS = {
    "bf16": Model(),
    "e4m3": Model(jnp.float8_e4m3fn),
    "int8": Model(np.int8, row_scales=True),
    "float32": Model(np.float32),
    "float32 d 256": Model(np.float32, dim=256),
    "d 64": Model(dim=64),
    "d 256": Model(dim=256),
    "d 512": Model(dim=512),
    "1 KV head": Model(heads=1, q_heads=8),
    "d 256, 1 KV head": Model(heads=1, q_heads=8, dim=256),
    "64 query heads": Model(heads=1, q_heads=64),
    "few requests": Model(requests=4),
    "latent 16": Model(heads=0, q_heads=16, dim=576),
    "latent 16, few": Model(heads=0, q_heads=16, dim=576, requests=4),
    "latent 128": Model(heads=0, q_heads=128, dim=576),
    "latent e4m3": Model(jnp.float8_e4m3fn, heads=0, q_heads=16, dim=576),
    "latent e4m3 128": Model(jnp.float8_e4m3fn, heads=0, q_heads=128, dim=576),
    "latent float32": Model(np.float32, heads=0, q_heads=16, dim=576),
}


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in SHARED_BYTES]
)
@pytest.mark.parametrize("name", MODELS)
def test_shared_memory(name, capability):
    model = MODELS[name]
    if model.dtype == jnp.float8_e4m3fn and capability < 89:
        return  # refused: `decode.unfit_dtype`
    needed = {}
    for kernel, launch in kernels(model, capability).items():
        needed[kernel] = compile_launch(*launch, capability).metadata.shared
    assert all(bytes_ <= SHARED_BYTES[capability] for bytes_ in needed.values()), needed
