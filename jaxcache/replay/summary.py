"""A replay in words: the verdict and the figures as people read them. The terminal and the HTML report print these."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jaxcache.replay.result import ReplayResult


class Mood(enum.Enum):
    """How a replay ended."""

    CLEAN = "clean"  # everything was read back and right
    UNPROVEN = "unproven"  # nothing went wrong, but nothing was read back either
    WRONG = "wrong"


@dataclass(frozen=True)
class Verdict:
    """The first thing to read.

    Attributes:
      mood: Good, bad or unknown.
      headline: One short sentence.
      detail: What it rests on.
    """

    mood: Mood
    headline: str
    detail: str


def verdict(result: ReplayResult) -> Verdict:
    """What the figures mean."""
    counts = (
        f"{result.mismatched_slots:,} wrong, {result.leaked_slots:,} leaked, "
        f"{result.recompiles_after_warmup:,} compilations after warm-up."
    )
    if result.error is not None:
        return Verdict(Mood.WRONG, "Stopped by an error", f"{result.error}\nUp to there: {counts}{_planted(result)}")
    if result.mismatched_slots:
        headline = f"{result.mismatched_slots:,} of {result.verified_slots:,} slots held the wrong KV"
        return Verdict(Mood.WRONG, headline, f"{counts}{_planted(result)}")
    if result.mismatched_queries:
        headline = f"{result.mismatched_queries:,} of {result.verified_queries:,} queries attended to something else"
        return Verdict(Mood.WRONG, headline, f"{counts}{_planted(result)}")
    if result.leaked_slots:
        headline = f"{result.leaked_slots:,} slots leaked"
        return Verdict(
            Mood.WRONG, headline, f"Of {result.verified_slots:,} slots read back: {counts}{_planted(result)}"
        )
    if not result.verified_slots:
        return Verdict(Mood.UNPROVEN, "Not proven: nothing was read back", f"Run it without --no-verify. {counts}")
    return Verdict(Mood.CLEAN, f"All {result.verified_slots:,} slots proven", f"{counts}{_planted(result)}")


def _planted(result: ReplayResult) -> str:
    return f" The fault {result.plant} was planted on purpose." if result.plant else ""


def figures(result: ReplayResult) -> dict[str, dict[str, str]]:
    """Every figure by section and name. Host times are in `host_rows`."""
    seconds = result.wall_s or float("nan")
    processed = result.prompt_tokens + result.decode_tokens
    return {
        "Proof": {
            "slots verified": number(result.verified_slots),
            "states verified": number(result.verified_states),
            "queries verified": number(result.verified_queries),
            "queries wrong": number(result.mismatched_queries),
            "slots wrong": number(result.mismatched_slots),
            "slots leaked": number(result.leaked_slots),
            "late compilations": number(result.recompiles_after_warmup),
        },
        "Prefix cache": {
            "prompt tokens": number(result.prompt_tokens),
            "hit tokens": number(result.hit_tokens),
            "hit rate": f"{result.hit_rate:.2%}",
            "evicted tokens": number(result.evicted_tokens),
        },
        "Load": {
            "requests": number(result.requests),
            "running at most": number(result.max_running),
            "prompt chunks": number(result.chunks),
            "decode steps": number(result.decode_steps),
            "decoded tokens": number(result.decode_tokens),
            "retractions": number(result.retractions),
            "tokens resumed": number(result.resumed_tokens),
            "tokens loaded": number(result.loaded_tokens),
        },
        "Time": {
            "warm-up": duration(result.warmup_s),
            "replay": duration(result.wall_s),
            "requests a second": _rate(result.requests / seconds),
            "tokens a second": _rate(processed / seconds),
        },
        "Setup": setup(result),
    }


def setup(result: ReplayResult) -> dict[str, str]:
    """What was run, on what."""
    rows = " + ".join("×".join(map(str, shape)) for shape in result.row_shapes)
    return {
        "trace": result.trace,
        "pool": f"{result.pool}, {result.layers} layer{'s' * (result.layers != 1)} of {rows} {result.dtype}, "
        + result.layout.replace("_", "-"),
        "room": f"{result.device_tokens:,} tokens, {size(result.pool_bytes)}",
        "page size": f"{result.page_size} tokens",
        "cache": result.cache,
        "policy": result.policy,
        "concurrency": f"{result.concurrency} requests, {result.chunk:,} tokens a chunk",
        "seed": str(result.seed),
        "planted fault": result.plant or "none",
        "device": result.device,
        "versions": f"jax {result.jax_version}, Python {result.python_version}",
    }


def host_rows(result: ReplayResult) -> list[tuple[str, str, str, str, str]]:
    """Operation, calls, p50 and p99 in microseconds, total: one row for each timed host operation."""
    return [
        (
            name,
            number(int(timing.get("calls", 0))),
            microseconds(timing["p50"]),
            microseconds(timing["p99"]),
            duration(timing["total_s"]),
        )
        for name, timing in result.host_us.items()
    ]


def number(value: int) -> str:
    """With separators."""
    return f"{value:,}"


def microseconds(value: float) -> str:
    """Three digits or more, with the unit."""
    return f"{value:,.0f} µs" if value >= 100 else f"{value:.1f} µs"


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds."""
    return f"{1e3 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def size(num_bytes: int) -> str:
    """Bytes in the largest unit that keeps a whole number before the point."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{num_bytes} B"


def _rate(value: float) -> str:
    if value != value:  # a replay that took no time
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
