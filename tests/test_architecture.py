"""The rules of the house that a parser can hold: who imports whom, what no file may contain, what every file says.

Each rule is a function from source to findings; it is run over the package, which must have none, and over a planted
breach, which it must find.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("jaxcache/**/*.py"), *ROOT.glob("torch_bridge/**/*.py")])

_READERS = {"arguments", "errors", "slots", "state_dict"}
_GROUND = _READERS | {"device", "index", "kernels", "pools", "request"}
_MEMORY = _GROUND | {"caches", "components", "events", "guard", "pages", "steps", "tables", "tiers"}
# A room is a folder or a top-level module of jaxcache. Imports go down this table only.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "arguments": {"errors"},
    "guard": {"errors"},
    "slots": {"errors", "arguments"},
    "state_dict": {"errors"},
    "index": _READERS,
    "request": {"errors", "arguments", "index"},
    "kernels": {"errors"},
    "device": {"errors"},
    "pools": {"errors", "device", "kernels"},
    "tables": _READERS | {"pools", "device"},
    "pages": _READERS | {"device", "kernels", "tables"},
    "events": {"arguments", "errors", "index"},
    "components": _GROUND | {"pages", "tables"},
    "tiers": (_GROUND - {"request"}) | {"components", "pages", "tables"},
    "observe": {"errors", "index", "pages"},
    "attention": {"errors", "kernels", "pools", "steps"},
    "caches": _GROUND | {"components", "events", "guard", "pages", "tables", "tiers"},
    "steps": _GROUND | {"caches", "components", "pages", "tables", "tiers"},
    "manager": _MEMORY,
    "snapshot": _MEMORY | {"manager"},
    "oplog": _MEMORY | {"manager"},
    "replay": _MEMORY | {"attention", "manager"},
    "compat": _MEMORY | {"manager"},
    "serve": _MEMORY | {"manager"},
    "cli": _MEMORY | {"manager", "replay", "snapshot"},
    "__main__": {"cli"},
    "__init__": _MEMORY | {"compat", "manager", "snapshot"},
    "torch_bridge": _MEMORY | {"attention", "manager"},
}
EVERYWHERE = {"jax", "numpy"}  # jax is missing from the units named next
NO_JAX = _READERS | {"events", "index", "__main__"}
# Third parties that only some places may name: package -> (unit, end of the file's name).
ONLY_IN = {
    "torch": {("torch_bridge", ".py"), ("kernels", "_torch.py")},
    "triton": {("kernels", "_triton.py"), ("kernels", "_torch.py"), ("kernels", "triton_call.py")},
    "jax_triton": {("kernels", "triton_call.py")},
    "typer": {("cli", "commands.py")},
    "rich": {("cli", "commands.py"), ("observe", "draw.py"), ("replay", "terminal.py")},
    "plotly": {("observe", "draw.py")},
    "msgspec": {("events", "wire.py")},
    "zmq": {("events", "answers.py"), ("events", "publisher.py"), ("events", "subscriber.py")},
    "safetensors": {("snapshot", "parts.py")},
    "prometheus_client": {("observe", "metrics.py")},
    "transformers": {("torch_bridge", f"transformers{part}.py") for part in ("", "_forward", "_memory", "_options")},
    "flashinfer": {("torch_bridge", "attention.py")},
    "jaxtyping": {(unit, ".py") for unit in MAY_IMPORT},
}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "__import__"}
CATCH_ALL = {"Exception", "BaseException"}
# Flavours are the business of components, of the rooms below them, and of whoever puts the parts together.
LOOPS_OVER_COMPONENTS = {"caches", "steps", "manager", "snapshot", "oplog", "replay", "cli", "observe", "torch_bridge"}
CHOOSES_PARTS = {"jaxcache/manager/config.py", "jaxcache/replay/config.py", "jaxcache/replay/setup.py"}
CONSTRUCTORS = {"__init__", "__post_init__"}
FLAVOURS = {
    *("SWATokenToKVPoolAllocator", "StateAllocator", "SWAKVPool", "SWAConfig", "HybridKVPool", "HybridConfig"),
    *("MambaPool", "MambaConfig", "HybridReqToTokenPool", "SWARadixCache", "MambaRadixCache", "SWAChunkCache"),
    *("MemoryComponent", "TreeComponent", "FullPages", "PairedFullPages", "WindowPages", "RecurrentStates"),
}
COMPONENT_NAMES = {"windows", "states", "state_allocator", "window_allocator"}
MAX_FILE_LINES = 600  # about 400 is the habit; this is where a file has stopped being one idea
MAX_FUNCTION_LINES = 100


def unit_of(path: Path) -> str:
    """The folder or top-level module that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "torch_bridge" else parts[1]


def modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that is imported anywhere, also inside functions; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def wrong_directions(tree: ast.AST, path: Path) -> Iterator[str]:
    """Imports against the flow, relative imports, and third parties where they must not be."""
    unit = unit_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{node.lineno}: relative import"
    for line, module in modules(tree):
        top, _, rest = module.partition(".")
        if top == "jaxcache":
            target = rest.partition(".")[0]
            if target in MAY_IMPORT and target != unit and target not in MAY_IMPORT[unit]:
                yield f"{line}: {unit} must not import {target}"
        elif top == "jax" and unit in NO_JAX:
            yield f"{line}: {unit} must not import jax"
        elif top in ONLY_IN and not any(unit == u and path.name.endswith(end) for u, end in ONLY_IN[top]):
            yield f"{line}: {path.name} must not import {top}"
        elif top == "torch_bridge" and unit != "torch_bridge":
            yield f"{line}: jaxcache must not import torch_bridge"


def import_circles(sources: dict[str, ast.AST]) -> set[str]:
    """Modules that import each other, by way of others too, and those between them; by name, each with its source."""
    imports = {name: {to for _, to in modules(tree)} & sources.keys() - {name} for name, tree in sources.items()}
    for graph in (imports, {name: {by for by in imports if name in imports[by]} for name in imports}):
        while free := {name for name in imports if not graph[name] & imports.keys()}:
            for name in free:
                del imports[name]
    return set(imports)


def foreign_packages(tree: ast.AST) -> Iterator[str]:
    """Third parties that nobody declared."""
    known = EVERYWHERE | set(ONLY_IN) | {"jaxcache", "torch_bridge", "jaxlib", "ml_dtypes"}
    for line, module in modules(tree):
        top = module.partition(".")[0]
        if top not in known and top not in sys.stdlib_module_names:
            yield f"{line}: {top} is no dependency"


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What can run foreign data, hide an error, or vanish under -O."""
    for line, module in modules(tree):
        if module.partition(".")[0] in UNSAFE_MODULES:
            yield f"{line}: imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"{node.lineno}: assert"
        elif isinstance(node, ast.ExceptHandler):
            caught = [ast.unparse(name) for name in _caught(node)]
            undoes = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None  # rolls back and raises on
            if not undoes and (not caught or CATCH_ALL & set(caught)):
                yield f"{node.lineno}: catches everything"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            pickles = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            if name in UNSAFE_CALLS or name in {"torch.load", "hasattr"} or pickles:
                yield f"{node.lineno}: calls {name}"
        elif isinstance(node, ast.Global):
            yield f"{node.lineno}: global"


def _caught(handler: ast.ExceptHandler) -> list[ast.expr]:
    if handler.type is None:
        return []
    return handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]


def undocumented(tree: ast.Module, inherited: frozenset[str] = frozenset()) -> Iterator[str]:
    """The module itself, public functions and classes, and the public methods of public classes without a docstring.

    Not asked of what has its contract elsewhere: methods in `inherited`, protocols, and jitted Triton kernels.
    """
    if tree.body and not ast.get_docstring(tree):
        yield "1: module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and not {"triton.jit", "overload"} & _decorators(node):
                yield f"{node.lineno}: {node.name}"
            for method in _public_methods(node):
                if not ast.get_docstring(method) and method.name not in inherited:
                    yield f"{method.lineno}: {node.name}.{method.name}"


def _public_methods(node: ast.stmt) -> list[ast.FunctionDef]:
    if not isinstance(node, ast.ClassDef) or any("Protocol" in ast.unparse(base) for base in node.bases):
        return []
    methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
    return [m for m in methods if not m.name.startswith("_") and not {"setter", "overload"} & _decorators(m)]


def _decorators(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    return names | {name.rpartition(".")[2] for name in names}


def _documented_methods() -> frozenset[str]:
    """Names of methods that some class of the package documents: an override says nothing that its base does not."""
    classes = [node for path in FILES for node in _parsed(path).body if isinstance(node, ast.ClassDef)]
    return frozenset(m.name for node in classes for m in _public_methods(node) if ast.get_docstring(m))


def too_long(tree: ast.AST) -> Iterator[str]:
    """Functions that nobody reads in one go, docstring not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) else 0)
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines"


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def flavour_questions(tree: ast.AST, path: Path) -> Iterator[str]:
    """Where somebody who should loop over components asks what kind one is, or whether it is there.

    That is `isinstance` or `type` of a flavour's class, `is None` of a component, probing by `getattr`, and comparing
    a name of a component. Not asked of constructors, which choose the parts.
    """
    if unit_of(path) not in LOOPS_OVER_COMPONENTS or str(path.relative_to(ROOT)) in CHOOSES_PARTS:
        return
    for node in _outside_constructors(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if named := _names(node.args[1]) & FLAVOURS:
                yield f"{node.lineno}: asks for {sorted(named)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            if len(node.args) > 2 or isinstance(node.args[1], ast.Constant):
                yield f"{node.lineno}: probes by getattr"
        elif isinstance(node, ast.MatchClass):
            if named := _names(node.cls) & FLAVOURS:
                yield f"{node.lineno}: matches {sorted(named)}"
        elif isinstance(node, ast.Compare):
            yield from (f"{node.lineno}: {finding}" for finding in _kinds_compared(node))


def _outside_constructors(tree: ast.AST) -> Iterator[ast.AST]:
    todo = [tree]
    while todo:
        node = todo.pop()
        if not isinstance(node, ast.FunctionDef) or node.name not in CONSTRUCTORS:
            yield node
            todo.extend(ast.iter_child_nodes(node))


def _kinds_compared(node: ast.Compare) -> Iterator[str]:
    sides = [node.left, *node.comparators]
    if any(isinstance(side, ast.Constant) and side.value is None for side in sides):
        asked = {name.lstrip("_") for side in sides if isinstance(side, ast.Attribute) for name in [side.attr]}
        if asked & COMPONENT_NAMES:
            yield f"asks whether there is {sorted(asked)}"
    if named := {name for side in sides for name in _names(side)} & FLAVOURS:
        yield f"compares with {sorted(named)}"
    texts = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)}
    if texts & (COMPONENT_NAMES | {"full", "window", "state"}):
        yield f"compares a kind, {sorted(map(str, texts))}"


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
    }


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_rolling_back_is_no_catching() -> None:
    assert not list(forbidden(ast.parse("try:\n    pass\nexcept BaseException:\n    undo()\n    raise")))


def _findings(rule: Callable[..., Iterator[str]], *, with_path: bool = False) -> list[str]:
    found = []
    for path in FILES:
        arguments = (_parsed(path), path) if with_path else (_parsed(path),)
        found += [f"{path.relative_to(ROOT)}:{finding}" for finding in rule(*arguments)]
    return found


def test_every_folder_and_module_has_its_place_in_the_table() -> None:
    assert {unit_of(path) for path in FILES} <= set(MAY_IMPORT)


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        free = {unit for unit in set(MAY_IMPORT) - done if MAY_IMPORT[unit] <= done}
        assert free, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= free


def test_no_two_files_import_each_other() -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
    assert import_circles({name: _parsed(path) for path, name in names.items()}) == set()


def test_a_planted_circle_is_found() -> None:
    sources = {"p": "from p.a import A", "p.a": "from p import b", "p.b": "import json", "q": "import p.a", "r": ""}
    assert import_circles({name: ast.parse(source) for name, source in sources.items()}) == {"p", "p.a"}


def test_the_documented_table_is_this_one() -> None:
    page = (ROOT / "docs" / "internals" / "rooms.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:3] == "| `"]
    said = {row[0].strip("`"): row[2] for row in rows}
    rooms = {room: ", ".join(sorted(MAY_IMPORT[room])) or "nothing" for room in MAY_IMPORT if not room.startswith("__")}
    assert said == rooms


def test_imports_go_down_the_flow() -> None:
    assert _findings(wrong_directions, with_path=True) == []


def test_no_undeclared_dependency() -> None:
    assert _findings(foreign_packages) == []


def test_no_forbidden_code() -> None:
    assert _findings(forbidden) == []


def test_nobody_asks_a_flavour() -> None:
    assert _findings(flavour_questions, with_path=True) == []


def test_every_public_name_is_documented() -> None:
    inherited = _documented_methods()
    assert _findings(lambda tree: undocumented(tree, inherited)) == []


def test_files_and_functions_stay_readable() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    print("over 400 lines:", {name: length for name, length in lengths.items() if length > 400} or "none")
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}
    assert _findings(too_long) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("jaxcache/index/tree.py", "import jax"),
        ("jaxcache/index/tree.py", "from jaxcache.pages.allocator import X"),
        ("jaxcache/index/tree.py", "from jaxcache import kernels"),
        ("jaxcache/kernels/op.py", "def f():\n    import jaxcache.pools.mha"),
        ("jaxcache/kernels/op.py", "import torch"),
        ("jaxcache/kernels/op.py", "import triton.language as tl"),
        ("jaxcache/pages/allocator.py", "from jaxcache.caches.radix import RadixCache"),
        ("jaxcache/pools/mha.py", "from ..pages import base"),
        ("jaxcache/caches/radix.py", "from jaxcache.manager.manager import MemoryManager"),
        ("jaxcache/replay/run.py", "from jaxcache.cli.main import main"),
        ("jaxcache/replay/run.py", "import typer"),
        ("jaxcache/manager/manager.py", "import torch_bridge"),
    ],
)
def test_planted_imports_are_found(place: str, source: str) -> None:
    assert list(wrong_directions(ast.parse(source), ROOT / place))


def test_planted_dependency_is_found() -> None:
    assert list(foreign_packages(ast.parse("import requests")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "assert x",
        "try:\n    pass\nexcept:\n    pass",
        "try:\n    pass\nexcept (OSError, Exception):\n    pass",
        "try:\n    pass\nexcept BaseException as error:\n    raise ValueError from error",
        "hasattr(x, 'y')",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_planted_code_is_found(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(pool, HybridKVPool)",
        "isinstance(part, KVCache | swa.SWAKVPool)",
        "type(part) is WindowPages",
        "if self._windows is not None: pass",
        "x = 1 if memory.states is None else 2",
        "getattr(pool, 'states', None)",
        "getattr(pool, 'states')",
        "component.name == 'window'",
        "component.name in ('full', 'state')",
        "match part:\n    case RecurrentStates(): pass",
        "def f():\n    def g(): return isinstance(pool, SWAKVPool)",
    ],
)
def test_planted_flavour_questions_are_found(source: str) -> None:
    tree = ast.parse(source)
    assert list(flavour_questions(tree, ROOT / "jaxcache/manager/manager.py"))
    assert not list(flavour_questions(tree, ROOT / "jaxcache/components/window.py"))
    assert not list(
        flavour_questions(ast.parse(f"class C:\n def __init__(self):\n  {source!r}"), ROOT / "jaxcache/caches/x.py")
    )


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        '"""M."""\ndef f(): ...',
        '"""M."""\nclass C: ...',
        '"""M."""\nclass C:\n    """C."""\n    def f(self): ...',
    ],
)
def test_planted_silence_is_found(source: str) -> None:
    assert list(undocumented(ast.parse(source)))


def test_planted_length_is_found() -> None:
    assert list(too_long(ast.parse("def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES + 1))))
