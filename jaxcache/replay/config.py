"""Everything a replay can be told, checked before anything is built. Imports no JAX."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from pathlib import Path

from jaxcache.errors import ArgumentError
from jaxcache.index.policies.registry import Policy
from jaxcache.pools.layout import Layout
from jaxcache.replay.chat import generate_chat
from jaxcache.replay.trace import TraceRequest, read_trace

_GENERATED_REQUESTS = 200
_MAX_SEED = (1 << 63) - 1


class PoolKind(enum.Enum):
    """Which device pool holds the KV."""

    MHA = "mha"
    MLA = "mla"


class CacheKind(enum.Enum):
    """Which prefix cache serves the requests."""

    RADIX = "radix"
    SWA = "swa"
    MAMBA = "mamba"
    SWA_MAMBA = "swa+mamba"
    LORA = "lora"
    CHUNK = "chunk"

    @property
    def has_window(self) -> bool:
        """Whether some layers attend to a sliding window only."""
        return self in (CacheKind.SWA, CacheKind.SWA_MAMBA)

    @property
    def has_states(self) -> bool:
        """Whether some layers have a recurrent state."""
        return self in (CacheKind.MAMBA, CacheKind.SWA_MAMBA)


class DType(enum.Enum):
    """What a row of the pool is made of."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"


class Fault(enum.Enum):
    """A bug planted on purpose, to see that the replay notices it."""

    FREE_EARLY = "free_early"
    WRONG_PAGE = "wrong_page"
    WRONG_NAMESPACE = "wrong_namespace"
    OFF_BY_ONE_POSITION = "off_by_one_position"
    SKIP_WRITE = "skip_write"
    DOUBLE_OWN = "double_own"
    LEAK = "leak"
    STALE_STATE = "stale_state"
    WRONG_WINDOW = "wrong_window"
    STALE_LENGTH = "stale_length"


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The options of `jaxcache replay`. None means: chosen when the device is known (`for_platform`).

    Attributes:
      trace: File in Mooncake's format; None generates a chat trace from `requests` and `seed`.
      requests: Replay only the first so many; None: the whole file, or 200 generated ones.
      concurrency: Most requests that run at once.
      chunk: Most prompt tokens of one step, over all requests in it.
      page_size: Slots in a page.
      device_tokens: Room of the pool in tokens, rounded down to whole pages.
      pool: MHA or MLA.
      layout: Order of its rows, layer after layer or page after page.
      layers: Layers of KV; None: as many as the memory of the device allows.
      heads: KV heads (MHA).
      head_dim: Width of a head (MHA).
      rank: Width of the compressed part of a row (MLA).
      rope_dim: Width of the positional part of a row (MLA).
      dtype: Of the pool.
      policy: Order of eviction.
      cache: Which prefix cache.
      window: Tokens that window layers attend to (caches with a window).
      window_tokens: Room of their pool in tokens; None: a quarter of `device_tokens`, or what two chunks need.
      states: Recurrent states that there is room for (caches with states); None: four for each running request.
      adapters: Adapters that requests are spread over (`lora`), each of them with the same prefixes.
      seed: Of a generated trace, of the output tokens, and of the choice of adapters.
      verify: Read every hit and every finished row back and compare.
      attend: Attend in every decode step, and compare with a softmax over the request's own tokens.
      plant: A fault to plant.

    Raises:
      ArgumentError: on any value out of range.
    """

    trace: Path | None = None
    requests: int | None = None
    concurrency: int = 32
    chunk: int = 8192
    page_size: int = 16
    device_tokens: int = 1_000_000
    pool: PoolKind = PoolKind.MHA
    layout: Layout = Layout.LAYER_MAJOR
    layers: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    rank: int | None = None
    rope_dim: int | None = None
    dtype: DType | None = None
    policy: Policy = Policy.ADAPTIVE
    cache: CacheKind = CacheKind.RADIX
    window: int = 1024
    window_tokens: int | None = None
    states: int | None = None
    adapters: int = 4
    seed: int = 0
    verify: bool = True
    attend: bool = False
    plant: Fault | None = None

    def __post_init__(self) -> None:
        """Checks every bound, so that nothing is built from a value that cannot work."""
        bounds = {
            "requests": (1, 10_000_000),
            "concurrency": (1, 65_536),
            "chunk": (1, 1 << 20),
            "page_size": (1, 1 << 16),
            "device_tokens": (1, (1 << 31) - (1 << 17)),  # slots are int32, and the sink page needs room
            "layers": (1, 1024),
            "heads": (1, 4096),
            "head_dim": (1, 65_536),
            "rank": (1, 65_536),
            "rope_dim": (1, 65_536),
            "window": (1, 1 << 24),
            "window_tokens": (1, (1 << 31) - (1 << 17)),
            "states": (1, 1 << 20),
            "adapters": (1, 1 << 16),
            "seed": (0, _MAX_SEED),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(f"{_option(name)} must be in [{low}, {high}], got {value}")
        if self.device_tokens < self.page_size:
            raise ArgumentError(
                f"--device-tokens must hold at least one page of {self.page_size} tokens, got {self.device_tokens}"
            )
        has_part = {Fault.STALE_STATE: self.cache.has_states, Fault.WRONG_WINDOW: self.cache.has_window}
        if self.plant is not None and not has_part.get(self.plant, True):
            raise ArgumentError(
                f"--plant {self.plant.value} needs a cache with such a part, not --cache {self.cache.value}"
            )
        if self.plant is Fault.STALE_LENGTH and not self.attend:
            raise ArgumentError(f"--plant {self.plant.value} needs --attend: nothing else looks at lengths")
        if not self.verify and self.plant is not None:
            raise ArgumentError(f"--plant {self.plant.value} needs verification to be seen; leave --no-verify out")

    @property
    def pool_tokens(self) -> int:
        """Usable tokens of the pool: whole pages only."""
        return self.device_tokens // self.page_size * self.page_size

    @property
    def window_pool_tokens(self) -> int:
        """Usable tokens of the pool of window layers: whole pages only."""
        enough = 2 * self.chunk + self.window + 2 * self.page_size
        tokens = self.window_tokens or max(self.device_tokens // 4, min(enough, self.device_tokens))
        return max(tokens // self.page_size, 1) * self.page_size

    @property
    def num_states(self) -> int:
        """Recurrent states that there is room for."""
        return self.states or 4 * self.concurrency

    def for_platform(self, platform: str) -> ReplayConfig:
        """This config with dtype and widths chosen: real ones on a "gpu", small ones on a "cpu". `layers` stays."""
        real = platform == "gpu"
        chosen = {
            "dtype": DType.BFLOAT16 if real else DType.FLOAT32,
            "heads": 8 if real else 1,
            "head_dim": 128 if real else 8,
            "rank": 512 if real else 12,
            "rope_dim": 64 if real else 4,
        }
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def load_requests(self) -> list[TraceRequest]:
        """The requests to replay, in order of arrival.

        Raises:
          TraceError: if the trace cannot be read or is malformed.
        """
        if self.trace is None:
            return generate_chat(self.requests or _GENERATED_REQUESTS, self.seed)
        return read_trace(self.trace, self.requests)


def _option(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")
