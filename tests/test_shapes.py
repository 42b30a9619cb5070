"""The check of shapes finds what a signature rules out where it is accepted or returned; a refusal is no breach."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from tests import shapes

SOURCE = """
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy as np
if TYPE_CHECKING:
    from jaxtyping import Int32

def same(a: Int32[np.ndarray, " n"], b: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    return a

def longer(a: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    return np.append(a, a)

def refusing(a: Int32[np.ndarray, " n"]) -> None:
    raise ValueError("a must be int32")

def many(*parts: Int32[np.ndarray, " n"]) -> None:
    pass

class Thing:
    @property
    def one(self) -> Int32[np.ndarray, " n"]:
        return np.zeros((1, 1), np.int32)

    def plain(self, x: int) -> str:
        return x
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a package that is checked, whether this run checks jaxcache or not."""
    (tmp_path / "checked_here.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shapes, "PACKAGES", ("checked_here",))
    monkeypatch.setattr(sys, "meta_path", [shapes._Finder(), *sys.meta_path])
    yield importlib.import_module("checked_here")
    del sys.modules["checked_here"]


def ints(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def test_what_keeps_its_promise_passes(module):
    np.testing.assert_array_equal(module.same(ints(3), ints(3)), ints(3))
    module.many()
    module.many(ints(2), b := ints(2))
    assert module.Thing().plain(b) is b, "only shapes are checked"


@pytest.mark.parametrize(
    ("breach", "named"),
    [
        (lambda m: m.same(ints(3), ints(2)), "same: b: "),
        (lambda m: m.same(ints(3).astype(np.int64), ints(3)), r"int64\[3\]"),
        (lambda m: m.same(3, ints(3)), "int 3"),
        (lambda m: m.longer(ints(2)), r"longer: return: .*int32\[4\]"),
        (lambda m: m.many(ints(2), ints(3)), "many: parts"),
        (lambda m: m.Thing().one, "Thing.one: return"),
    ],
)
def test_a_breach_is_found(module, breach, named):
    with pytest.raises(shapes.ShapeError, match=named):
        breach(module)


def test_a_refusal_is_no_breach(module):
    with pytest.raises(ValueError, match="must be int32"):
        module.refusing(ints(3).astype(np.int64))
    with pytest.raises(TypeError, match="positional"):
        module.same()


def test_a_function_is_checked_now_and_then_after_its_first_calls(module):
    for _ in range(shapes.ALWAYS):
        module.same(ints(1), ints(1))
    with pytest.raises(shapes.ShapeError):
        for _ in range(shapes.THEN_EACH):
            module.same(ints(3), ints(2))


def test_it_has_to_come_first():
    import jaxcache  # noqa: F401

    with pytest.raises(RuntimeError, match="too late"):
        shapes.install()
