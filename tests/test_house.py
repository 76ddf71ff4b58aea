"""Holds the house together: floors, docstrings, file lengths, and what an import may pull in."""

import ast
import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# From the ground up; parts in one row are neighbours. A part may import its neighbours and what
# lies below. `jaxdistill` is the package's own __init__.py, which gathers the public names.
FLOORS = (
    ("errors", "_quiet", "_notes", "_disk", "_memory", "_orbax", "_checksums", "_signals"),
    ("_progress",),
    ("paths",),
    ("mesh",),
    ("models", "quant", "losses"),
    ("kd", "dd"),
    ("train",),
    ("evals", "export", "report"),
    ("recipes",),
    ("jaxdistill",),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def part_of(file: Path) -> str:
    """Names the part of the house that a file of the package belongs to."""
    top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "jaxdistill" if top == "__init__" else top


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yields line and absolute dotted name of every import, at any depth of the code.

    `from a import b` yields `a.b`: b may be a module. `package` resolves relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imported_parts(file: Path) -> Iterator[tuple[int, str]]:
    """Yields line and part for every import of jaxdistill's own code in a file."""
    package = ".".join(file.relative_to(ROOT).parent.parts)
    for line, module in imported_modules(ast.parse(file.read_text("utf-8")), package):
        names = module.split(".")
        if names[0] == "jaxdistill":
            inside = len(names) > 1 and (names[1] in FLOOR or (PACKAGE / names[1]).exists())
            yield line, names[1] if inside else "jaxdistill"


def misplaced_imports(file: Path) -> list[str]:
    """Lists the imports of a file that reach up, or into a part that no floor names."""
    here = part_of(file)
    where = file.relative_to(ROOT)
    if here not in FLOOR:
        return [f"{where}: no floor is named for '{here}'; give it one in tests/test_house.py"]
    return [
        f"{where}:{line}: {here} imports {part}, a higher floor"
        for line, part in imported_parts(file)
        if FLOOR.get(part, len(FLOORS)) > FLOOR[here]
    ]


def each_file(function):
    """Parametrizes a test over the files of the package."""
    return pytest.mark.parametrize(
        "file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix()
    )(function)


@each_file
def test_no_file_imports_a_higher_floor(file: Path):
    assert misplaced_imports(file) == []


@pytest.mark.parametrize(
    ("name", "source", "imported"),
    [
        ("quant/x.py", "import jaxdistill.train.loop", "train"),
        ("quant/x.py", "from jaxdistill import kd", "kd"),
        ("kd/x.py", "from jaxdistill.train.state import State", "train"),
        ("losses/x.py", "def f():\n    from ..kd import freeze", "kd"),
        ("models/x.py", "from .. import recipes", "recipes"),
        ("train/x.py", "from jaxdistill import quantize_everything", "jaxdistill"),
        ("recipes/x.py", "from jaxdistill.cli import main", "cli"),
        ("cellar/x.py", "import jax", None),
    ],
)
def test_the_floor_check_sees_each_way_up(name, source, imported, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "jaxdistill")
    file = tmp_path / "jaxdistill" / name
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (problem,) = misplaced_imports(file)
    assert f"imports {imported}," in problem if imported else "no floor" in problem


def test_parts_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for file in FILES:
        here = part_of(file)
        graph.setdefault(here, set()).update(part for _, part in imported_parts(file))
        graph[here].discard(here)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@each_file
def test_every_module_says_what_it_is(file: Path):
    assert ast.get_docstring(ast.parse(file.read_text("utf-8")))


@each_file
def test_no_file_grows_past_one_subject(file: Path):
    assert len(file.read_text("utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", ["jaxdistill", "jaxdistill.cli"])
def test_importing_does_not_import_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_where_torch_is_missing():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
        if file.stem != "__main__"
    ]
    code = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"  # makes `import torch` raise
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_documented():
    jaxdistill = importlib.import_module("jaxdistill")
    assert jaxdistill.__all__
    undocumented = [
        name
        for name in jaxdistill.__all__
        if (callable(thing := getattr(jaxdistill, name)) or isinstance(thing, types.ModuleType))
        # Python gives a dataclass without a docstring its signature for one.
        and (not thing.__doc__ or inspect.cleandoc(thing.__doc__).startswith(f"{name}("))
    ]
    assert undocumented == []


def test_the_tests_run_on_eight_strict_host_devices():
    assert len(jax.devices("cpu")) == 8
    with pytest.raises(ValueError, match="rank_promotion=.raise"):
        jnp.ones(3) + jnp.ones((2, 3))
    with pytest.raises(ValueError, match="dtype_promotion=strict"):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)
