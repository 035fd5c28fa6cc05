"""The package's sources enter; imports that go up the layers, and words that the house does not use, are found."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mpo_jax"
LAYERS = [
    {"errors", "lines", "progress", "types"},
    {"integrity", "store"},
    {"artifacts"},
    {"settings"},
    {"ops"},
    {"sharding", "allocator", "processes", "stopping", "peers"},
    {"optim", "metrics", "trackers", "profiling", "asking", "posting", "database", "locks"},
    {"models"},
    {"lm_head", "places"},
    {"scoring"},
    {"decoding"},
    {"sampling"},
    {"checkpoint", "sealed", "fingerprints", "disk"},
    {"data"},
    {"scorers"},
    {"run"},
    {"evaluation"},
    {"stages"},
    {"graph"},
    {"eta", "states"},
    {"heading", "provenance"},
    {"pipeline", "finished"},
    {"planning"},
    {"recipes", "command"},
    {"main", "plan", "export", "sample", "show", "annotate", "render", "runs", "mpo"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COMMANDS = LAYERS[-1]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """The layer's name of a file: its folder in the package, or the file itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    found = {name.split(".")[1] for name in names if name.startswith("mpo_jax.")}
    return {name for name in found if not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_layers_beneath(path):
    names, here = imports(path), room(path)
    for other in own(names):
        assert LEVEL[other] <= LEVEL[here], f"{here} imports {other}, which lies above it"
    outside = {name.split(".")[0] for name in names}
    assert "torch" not in outside
    if here != "models":
        assert "flax" not in outside, "only models/ knows Flax"
    if here not in ("data", "export") and path.name != "hf.py":
        assert not outside & {"transformers", "datasets"}
    if here not in COMMANDS | {"recipes", "command"}:
        assert "ml_collections" not in outside, "only recipes and the command lines read a ConfigDict"


def test_every_file_has_a_layer_and_every_layer_a_file():
    assert {room(path) for path in FILES} == set(LEVEL)


def test_no_file_imports_itself_by_way_of_others():
    """Inside functions too. TopologicalSorter raises a CycleError that names the cycle."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    found = {
        name: {other for other in names if other != name and imports(path) & ({other} | members(names[other], other))}
        for name, path in names.items()
    }
    assert found["mpo_jax.pipeline"] >= {"mpo_jax.graph", "mpo_jax.stages.kinds"}, "imports are found at all"
    assert len(list(graphlib.TopologicalSorter(found).static_order())) == len(FILES)


@functools.cache
def members(path: Path, module: str) -> set[str]:
    """Dotted names of all that a file defines at its top."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return {f"{module}.{name}" for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_deprecated_or_unsafe_call(path):
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    names = {part for name in called for part in name.split(".")}
    assert not names & {"pjit", "pmap", "eval", "exec", "loads_pickle"}
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cloudpickle", "dill", "marshal"}
    assert not any(
        name.startswith(("flax.training", "jax.experimental.pjit", "jax.experimental.maps")) for name in imports(path)
    )
    assert "optax.global_norm" not in called
    if room(path) not in COMMANDS | {"sharding", "planning", "finished"}:
        assert "make_mesh" not in names, "only the command lines, and what serves them alone, make a mesh"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


def test_every_file_says_what_enters_and_leaves():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
