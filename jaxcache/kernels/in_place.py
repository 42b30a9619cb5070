"""The proof that a step updates its donated buffers in place.

XLA never says that it copies a pool: a forgotten donation, a read of the old pool after the write or a scan over layers
whose inputs and outputs are the pool cost one pool of memory and its whole bandwidth at every step, silently. This file
compiles a step, executes nothing, and reads three things from the result: which donated buffers share memory with an
output, which `copy` instructions are as large as a pool, and how much temporary memory the step takes.

    report = prove_in_place(step, pool, loc, k, v)     # a jitted step, or a plain one with donate_argnums=
    assert report.ok, report.why

Compiling for a GPU needs no GPU: pass what `jax.jit(...).lower(...).compile()` gave you to `inspect_compiled`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxcache.errors import NotInPlaceError

# Copies of tiny donated arrays, such as counters, are how XLA schedules loops and cost nothing.
_TINY_BYTES = 4096

_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # bf16[2,64,128], pred[8], f8e4m3fn[4]
_COPY = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (.*?) (copy|copy-start)\(", re.MULTILINE)
_ALIASED_PARAMETER = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}")


@runtime_checkable
class Lowerable(Protocol):
    """What `jax.jit` and `jaxcache.device.donation.donating` return."""

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered: ...


@dataclass(frozen=True)
class DonatedBuffer:
    """One donated array of a compiled step, as one device sees it.

    Attributes:
      name: Where it stands among the arguments, such as "args[0].k".
      shape: Its shape on one device: a shard's, if it is sharded.
      dtype: Its dtype.
      aliased: Whether an output of the step lives in the same memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    aliased: bool

    @property
    def size_bytes(self) -> int:
        """Bytes on one device."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class InPlaceReport:
    """What a compiled step does with its donated buffers.

    Attributes:
      buffers: Every donated array.
      copies: The copies, anywhere in the program, of at least half the largest donated buffer or of the very shape of a
        donated buffer: "name type" each.
      temp_bytes: Temporary memory of the step on one device.
      temp_limit_bytes: The temporary memory that is still taken for ordinary work.
    """

    buffers: tuple[DonatedBuffer, ...]
    copies: tuple[str, ...]
    temp_bytes: int
    temp_limit_bytes: int

    @property
    def ok(self) -> bool:
        """True if something was donated and all of it is updated in place."""
        return not self._complaints()

    @property
    def why(self) -> str:
        """The verdict in words, one line a finding."""
        complaints = self._complaints()
        if complaints:
            return "not in place:\n" + "\n".join(f"- {complaint}" for complaint in complaints)
        total = sum(buffer.size_bytes for buffer in self.buffers)
        return f"in place: {len(self.buffers)} donated buffers of {total:,} bytes; {self.temp_bytes:,} bytes temporary"

    def _complaints(self) -> list[str]:
        if not self.buffers:
            return ["nothing is donated: use donating(step), or jit with donate_argnums"]
        complaints = [
            f"{buffer.name} {buffer.dtype}{list(buffer.shape)} is donated, but no output takes its memory: "
            "return it from the step with the same shape and dtype"
            for buffer in self.buffers
            if not buffer.aliased
        ]
        complaints += [
            f"the step copies {copy}: it may read the old buffer after the write, or hand it to a scan as xs and ys"
            for copy in self.copies
        ]
        if self.temp_bytes >= self.temp_limit_bytes:
            complaints.append(
                f"the step takes {self.temp_bytes:,} bytes of temporary memory, and {self.temp_limit_bytes:,} or more "
                "may hold a converted or transposed pool: if they are your activations, raise temp_limit_bytes"
            )
        return complaints


def prove_in_place(
    step: Callable[..., Any] | Lowerable,
    *args: Any,
    donate_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Iterable[str] = (),
    temp_limit_bytes: int | None = None,
    **kwargs: Any,
) -> InPlaceReport:
    """Compiles `step` for these arguments and says whether its donated buffers are updated in place. Executes nothing.

    Args:
      step: A jitted function, a `donating` step, or a plain function together with `donate_argnums`.
      *args: The arguments of the step; arrays may be `jax.ShapeDtypeStruct`s. Nothing is consumed.
      donate_argnums: Jits `step` with these arguments donated.
      static_argnames: Goes with `donate_argnums`.
      temp_limit_bytes: From how much temporary memory on to suspect a hidden copy; by default half the largest donated
        buffer.
      **kwargs: Keyword arguments of the step.

    Returns:
      The report; `ok` and `why` sum it up.

    Cost: one compilation.
    """
    if donate_argnums is not None or not isinstance(step, Lowerable):
        step = jax.jit(step, donate_argnums=donate_argnums, static_argnames=static_argnames)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # The report says the same, and better.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        compiled = step.lower(*args, **kwargs).compile()
    return inspect_compiled(compiled, temp_limit_bytes=temp_limit_bytes)


def inspect_compiled(compiled: jax.stages.Compiled, *, temp_limit_bytes: int | None = None) -> InPlaceReport:
    """Like `prove_in_place`, for a step that is compiled already, be it for a device that this machine lacks.

    Raises:
      NotInPlaceError: if the compiler tells nothing about its program.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if not text or memory is None:
        raise NotInPlaceError("the compiled step has no program text or memory analysis: compile it for CPU or GPU")
    header = text.split("\n", 1)[0]
    buffers = tuple(_donated_buffers(compiled, header))
    largest = max((buffer.size_bytes for buffer in buffers), default=0)
    return InPlaceReport(
        buffers=buffers,
        copies=tuple(_large_copies(text, buffers, largest / 2)) if buffers else (),
        temp_bytes=memory.temp_size_in_bytes,
        temp_limit_bytes=largest // 2 if temp_limit_bytes is None else temp_limit_bytes,
    )


def assert_in_place(step: Callable[..., Any] | Lowerable, *args: Any, **kwargs: Any) -> InPlaceReport:
    """`prove_in_place`, raising NotInPlaceError with the report's words unless all is in place."""
    report = prove_in_place(step, *args, **kwargs)
    if not report.ok:
        raise NotInPlaceError(report.why)
    return report


def _donated_buffers(compiled: jax.stages.Compiled, header: str) -> Iterator[DonatedBuffer]:
    aliased = {int(number) for number in _ALIASED_PARAMETER.findall(_section(header, "input_output_alias="))}
    paths, tree = jax.tree_util.tree_flatten_with_path(compiled.args_info)
    shardings = tree.flatten_up_to(compiled.input_shardings)
    parameter = 0
    for (path, argument), sharding in zip(paths, shardings, strict=True):
        kept = sharding is not None  # an argument that the step does not use is no parameter of the program
        if argument.donated:
            shape = sharding.shard_shape(argument.shape) if kept else argument.shape
            yield DonatedBuffer(_name(path), tuple(shape), np.dtype(argument.dtype), kept and parameter in aliased)
        parameter += kept


def _name(path: tuple[Any, ...]) -> str:
    group = "args" if path[0] == jax.tree_util.SequenceKey(0) else "kwargs"
    return group + jax.tree_util.keystr(path[1:])


def _section(header: str, key: str) -> str:
    """The text of `key={...}` in the header of a program, "" if it is not there."""
    start = header.find(key)
    if start < 0:
        return ""
    depth = 0
    for position in range(start + len(key), len(header)):
        depth += {"{": 1, "}": -1}.get(header[position], 0)
        if depth == 0:
            return header[start : position + 1]
    return header[start:]


def _large_copies(text: str, buffers: Sequence[DonatedBuffer], threshold_bytes: float) -> Iterator[str]:
    pool_shapes = {(b.shape, b.dtype.itemsize) for b in buffers if b.size_bytes > _TINY_BYTES}
    threshold_bytes = max(threshold_bytes, 1)
    for name, result, _ in _COPY.findall(text):
        for letters, bits, dims in _ARRAY.findall(result):
            shape = tuple(int(dim) for dim in dims.split(",") if dim)
            itemsize = 1 if letters == "pred" else int(bits or 0) / 8
            if math.prod(shape) * itemsize >= threshold_bytes or (shape, itemsize) in pool_shapes:
                yield f"{name} {result.split('{')[0].lstrip('(')}"
                break
