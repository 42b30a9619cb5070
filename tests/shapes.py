"""Shapes and dtypes that signatures promise, checked while the tests run: jaxtyping's shapes by beartype.

`install()` has to come before jaxcache is imported. From then on, each function of jaxcache whose signature names a
jaxtyping shape is checked when it is called, also while it is traced: arguments and result have to have the dtypes and
shapes that it says, with one size for each name of a dimension. An argument that breaks the promise may be refused by
the function, with an error; it may not be accepted.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype.door import is_bearable
from jaxtyping import jaxtyped

PACKAGES = ("jaxcache", "torch_bridge")
NOT_PYTHON = ("_triton", "_mosaic")
"""Ends of modules whose functions a kernel compiler reads."""


ALWAYS, THEN_EACH = 200, 29
"""A function's first calls are all checked, and then some, so that long random lives take as long as before."""


class ShapeError(AssertionError):
    """A function accepted, or returned, what its signature rules out."""


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, asked at each call whether it keeps what its signature says of shapes."""
    signature = inspect.signature(function)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    names = _shaped(function.__annotations__)
    hints: dict[str, Any] = {}
    calls = itertools.count()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if number >= ALWAYS and number % THEN_EACH:
            return function(*args, **kwargs)
        if not hints:
            hints.update({name: _resolved(function.__annotations__[name], function.__globals__) for name in names})
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # raises
        with jaxtyped("context"):
            wrong = [name for name in given if name in hints and not _keeps(given[name], hints[name], kinds[name])]
            result = function(*args, **kwargs)
            if not wrong and "return" in hints and not is_bearable(result, hints["return"]):
                given, wrong = {"return": result}, ["return"]
        if wrong:
            found = "; ".join(f"{name}: {function.__annotations__[name]} is {_told(given[name])}" for name in wrong)
            raise ShapeError(f"{function.__module__}.{function.__qualname__}: {found}")
        return result

    return call


def _keeps(value: Any, hint: Any, kind: inspect._ParameterKind) -> bool:
    """Whether an argument is what its annotation says; `*args` and `**kwargs` are annotated one by one."""
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return all(is_bearable(part, hint) for part in value)
    if kind is inspect.Parameter.VAR_KEYWORD:
        return all(is_bearable(part, hint) for part in value.values())
    return is_bearable(value, hint)


def _told(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else f"{type(value).__name__} {value!r:.80}"


def _shaped(annotations: dict[str, str]) -> list[str]:
    """The parameters whose annotation has a shape in it."""
    return [name for name, text in annotations.items() if isinstance(text, str) and _has_shape(ast.parse(text))]


def _has_shape(tree: ast.AST) -> bool:
    """Whether something like `Int32[Array, "n"]` is in it."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Tuple)
        and any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in node.slice.elts)
        and ast.unparse(node.value) != "Literal"
        for node in ast.walk(tree)
    )


class _WithoutSums(ast.NodeTransformer):
    """Takes sums such as `rank+rope` for any size: arguments are not read from left to right."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if not isinstance(node.value, str):
            return node
        return ast.Constant(" ".join("_" if "+" in size or "-" in size else size for size in node.value.split()))


def _resolved(annotation: str, names: dict[str, Any]) -> Any:
    return eval(ast.unparse(_WithoutSums().visit(ast.parse(annotation, mode="eval"))), names)  # noqa: S307


class _Instrument(ast.NodeTransformer):
    """Puts `checked` on functions with shapes, and imports jaxtyping's names for good."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        said = [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)] + [node.returns]
        overload = any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)
        if not overload and any(hint is not None and _has_shape(hint) for hint in said):
            node.decorator_list.append(ast.Name("__checked__", ast.Load()))
        return node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        self.generic_visit(node)
        shapes = [part for part in node.body if isinstance(part, ast.ImportFrom) and part.module == "jaxtyping"]
        return [*shapes, node] if shapes else node


class _Loader(SourceFileLoader):
    """Compiles a module with its checks; what is compiled is not kept."""

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        _Instrument().visit(tree)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__checked__"] = checked
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES or fullname.endswith(NOT_PYTHON):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        return importlib.util.spec_from_file_location(
            fullname,
            spec.origin,
            loader=_Loader(fullname, spec.loader.path),
            submodule_search_locations=spec.submodule_search_locations,
        )


def install() -> None:
    """Checks the shapes of everything in jaxcache that is imported from now on."""
    loaded = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    if loaded:
        raise RuntimeError(f"too late: {loaded} are imported already")
    sys.meta_path.insert(0, _Finder())
