"""What a replay measured."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from jaxcache.replay.files import write_text


@dataclass
class Sample:
    """The state of a replay at one moment, for progress bars and plots.

    Attributes:
      done_requests: Requests that have ended.
      prompt_tokens, hit_tokens: Of first admissions, so far.
      running: Requests that run.
      used_tokens: Room that running requests have: their own pages and the cached ones they lock.
      cached_tokens: Room that the prefix cache has, locked or not.
      evictable_tokens: Room that the prefix cache would give up.
      wall_s: Seconds since the first request.
    """

    done_requests: int
    prompt_tokens: int
    hit_tokens: int
    running: int
    used_tokens: int
    cached_tokens: int
    evictable_tokens: int
    wall_s: float


@dataclass
class ReplayResult:
    """Totals of a replay. `as_json` gives the documented keys.

    Attributes:
      prompt_tokens, hit_tokens, hit_rate: Of first admissions; the rate is a fraction.
      resumed_tokens, loaded_tokens: Of later admissions, after a retraction: found in the cache, and in a host copy.
      evicted_tokens: Tokens evicted from the prefix cache.
      verified_slots: Slots read back and compared.
      verified_states: Recurrent states read back and compared.
      mismatched_slots: Slots and states among them that held something else.
      verified_queries: Queries of decode steps whose attention was compared.
      mismatched_queries: Those among them that saw something else.
      leaked_slots: Slots and states without an owner, or with one too many, when all requests had ended.
      max_running: Most requests that ran at once.
      chunks, decode_steps: Extend and decode steps.
      retractions: Requests that had to make room.
      recompiles_after_warmup: XLA compilations of the process after the warm-up.
      host_us: Host time of lookups, admissions, plans, inserts into the tree and evictions: p50, p99 and total_s.
      error: Message of the error that ended the replay, or None.
    """

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    hit_rate: float = 0.0
    resumed_tokens: int = 0
    loaded_tokens: int = 0
    evicted_tokens: int = 0
    verified_slots: int = 0
    verified_states: int = 0
    mismatched_slots: int = 0
    verified_queries: int = 0
    mismatched_queries: int = 0
    leaked_slots: int = 0
    max_running: int = 0
    chunks: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    retractions: int = 0
    recompiles_after_warmup: int = 0
    warmup_s: float = 0.0
    wall_s: float = 0.0
    host_us: dict[str, dict[str, float]] = field(default_factory=dict)
    page_size: int = 0
    device_tokens: int = 0
    concurrency: int = 0
    chunk: int = 0
    trace: str = ""
    seed: int = 0
    plant: str | None = None
    policy: str = ""
    cache: str = ""
    pool: str = ""
    layout: str = ""
    pool_bytes: int = 0
    layers: int = 0
    row_shapes: list[list[int]] = field(default_factory=list)
    dtype: str = ""
    device: str = ""
    jax_version: str = ""
    python_version: str = ""
    error: str | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Every slot held what it should, attention saw it, and the books balanced."""
        return self.error is None and not (self.mismatched_slots or self.mismatched_queries or self.leaked_slots)

    def as_json(self) -> dict:
        """The totals, without the samples."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "samples"}

    def write_json(self, path: Path) -> None:
        """Writes the totals.

        Raises:
          TraceError: The file cannot be written.
        """
        write_text(path, json.dumps(self.as_json(), indent=2) + "\n")
