"""The settings that the docs name keep what `warm_up` compiled on disk: a second process compiles nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(
    re.findall(r"^export (JAX_\w+)=(\S+)", (ROOT / "docs/guides/warm-up.md").read_text(encoding="utf-8"), re.MULTILINE)
)

PROCESS = """
import collections, json
import jax, jax.numpy as jnp
from jaxcache import MemoryConfig, MHAConfig, Request, init_memory_pool_and_cache

seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
kv = MHAConfig(size=256, page_size=4, dtype=jnp.bfloat16, layer_num=1, head_num=1, head_dim=4)
memory = init_memory_pool_and_cache(MemoryConfig(kv, max_running=8, max_context_len=64, chunk=32))


def step(pool, batch):
    rows = jnp.ones((*batch.tokens.shape, 1, 4))
    return pool.set_kv_buffer(0, batch.slots, rows, rows), batch.seq_len


def loop_of_steps(pool, loop):
    def one_step(carry, _):
        pool, loop = carry
        loop, slots = loop.grow()
        rows = jnp.ones((*loop.tokens.shape, 1, 4))
        return (pool.set_kv_buffer(0, slots[:, 0], rows, rows), loop.accept()), None

    return *jax.lax.scan(one_step, (pool, loop), length=loop.shape.steps)[0], None


memory.warm_up(step)
memory.warm_up_loop(loop_of_steps, 3)
after_warm_up = dict(seen)
before = [buffer.unsafe_buffer_pointer() for buffer in memory.pool.buffers]
request = Request("a", list(range(30)))
memory.admit(request)
memory.run(step, memory.extend([(request, 30)]))
print(json.dumps({
    "misses": after_warm_up.get("cache_misses", 0),
    "hits": after_warm_up.get("cache_hits", 0),
    "later": sum(seen[name] - after_warm_up.get(name, 0) for name in ("cache_misses", "cache_hits")),
    "buckets": len(memory.buckets),
    "in_place": before == [buffer.unsafe_buffer_pointer() for buffer in memory.pool.buffers],
    "written": int((memory.pool.gather(list(range(260)), 0)[0] != 0).any((1, 2)).sum()),
}))
"""


def start(folder: Path, settings: dict[str, str]) -> dict[str, int]:
    """What a fresh process says that compiles, and then runs, a step and a loop."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PERSISTENT")}
    environment |= settings | {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert set(SETTINGS) == {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    first, second = start(tmp_path, SETTINGS), start(tmp_path, SETTINGS)
    assert first["hits"] == 0 and first["misses"] > first["buckets"]  # every bucket, the table patch, the loops
    assert (second["hits"], second["misses"]) == (first["misses"], 0)
    assert first["later"] == second["later"] == 0
    assert second["in_place"] and second["written"] == 30
