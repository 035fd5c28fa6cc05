"""Kinds of stages: each is declared in one place that nothing else knows of, goes with it, and can be a plugin's."""

import ast
import importlib
import json
import sys
from pathlib import Path

import jax
import pytest
from etils import epath

from mpo_jax import artifacts, command, graph, metrics, pipeline, recipes, settings, sharding, states
from mpo_jax.errors import InputError
from mpo_jax.evaluation import report
from mpo_jax.ops.preferences import OBJECTIVES
from mpo_jax.ops.returns import ESTIMATORS
from mpo_jax.planning import chips
from mpo_jax.planning import stages as planning
from mpo_jax.scorers.names import SCORERS
from mpo_jax.stages import kinds
from tests.tools.small_graph import write_rows

PACKAGE = Path(__file__).resolve().parent.parent / "mpo_jax"
BUILT_IN = tuple(kinds.KINDS)
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
EXCEPTED = {PACKAGE / "recipes.py"}
"""The runs of the paper are made of kinds by name: a recipe is a user of kinds, as a config is."""


# One declaration ------------------------------------------------------------------------------------------------------


def declared_in(path: Path) -> set[str]:
    """The kinds whose Stage a file holds."""
    return {
        keyword.value.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Stage"
        for keyword in node.keywords
        if keyword.arg == "kind" and isinstance(keyword.value, ast.Constant)
    }


def own(path: Path) -> set[str]:
    """The kinds that a file may name: its own, or that of the folder it helps to make up."""
    files = [path] if path.parent.name == "stages" else path.parent.glob("*.py")
    return set().union(*map(declared_in, files)) if PACKAGE / "stages" in path.parents else set()


def named(source: str) -> list[tuple[int, set[str]]]:
    """Line and kinds of each place where a text decides by a kind's name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: set[str] = set()
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any("kind" in ast.unparse(side).lower() for side in sides):
                names = constants(sides)
        elif isinstance(node, ast.Match) and "kind" in ast.unparse(node.subject).lower():
            names = constants([case.pattern for case in node.cases])
        elif isinstance(node, ast.Dict) and len(keys := constants(filter(None, node.keys))) > 1:
            names = keys
        elif isinstance(node, ast.Subscript | ast.Call):
            names = looked_up(node)
        if names:
            found.append((node.lineno, names))
    return found


def constants(nodes) -> set[str]:
    """The kinds that stand as texts within some nodes."""
    inside = (each for node in nodes for each in ast.walk(node))
    return {each.value for each in inside if isinstance(each, ast.Constant) and each.value in BUILT_IN}


def looked_up(node: ast.Subscript | ast.Call) -> set[str]:
    """`KINDS["dpo"]`, `KINDS.get("dpo")`, `kind.startswith("dpo")`."""
    if isinstance(node, ast.Subscript):
        return constants([node.slice]) if "kind" in ast.unparse(node.value).lower() else set()
    if isinstance(node.func, ast.Attribute) and "kind" in ast.unparse(node.func.value).lower():
        return constants(node.args)
    return set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_decides_by_the_name_of_a_kind_that_is_not_its_own(path):
    if path in EXCEPTED:
        assert named(path.read_text()), "no exception is needed any more"
        return
    for line, names in named(path.read_text()):
        assert names <= own(path), f"{path.relative_to(PACKAGE)}:{line} names {', '.join(sorted(names))}"


@pytest.mark.parametrize(
    "source",
    [
        'if stage.kind == "dpo": pass', 'x = kind in ("sft", "other")', 'x = "ppo" != of_kind(stage)',
        'TABLE = {"sft": 1, "reward": 2}', 'match stage.kind:\n  case "split": pass', 'KINDS["judge"].run(job)',
        'kinds.KINDS.get("pairs")', 'x = kind.startswith("ppo")',
    ],
)  # fmt: skip
def test_such_a_decision_is_seen(source):
    assert named(source)


def test_each_kind_is_declared_once_in_a_file_of_its_own():
    places = {path: found for path in FILES if (found := declared_in(path))}
    assert all(len(found) == 1 for found in places.values())
    assert sorted(kind for found in places.values() for kind in found) == sorted(BUILT_IN)
    for path, (kind,) in places.items():
        assert kind in (path.stem, path.parent.name) and path.is_relative_to(PACKAGE / "stages")


# Taking one away ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean():
    """Puts every table back, in its order, after a test has taken something away or a plugin has registered its own."""
    tables = (kinds.KINDS, OBJECTIVES, ESTIMATORS, SCORERS)
    before, modules = [dict(table) for table in tables], set(sys.modules)
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)
    for name in set(sys.modules) - modules:
        if "plugin" in name:
            del sys.modules[name]


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_kind_that_is_taken_away_is_gone_everywhere(kind, stories, tmp_path):
    """From the help, the reference, the schemas, the errors, the plan and the report."""
    config = recipes.config()
    config.model.path, config.data.path = str(stories), "DATA"
    config.data.max_length = 320
    for other in BUILT_IN:
        config.stages[other] = recipes.stage(other)
    config.stages.evaluate.policies, config.stages.judge.judge = ("sft", "dpo", "ppo"), "reward"
    assert kind in planned(config) and kind in kinds.shown() and heading(kind) in command.run_sections()
    assert f"## `{heading(kind)}`" in command.settings_page() and heading(kind) in json.loads(command.schemas())
    stage = tmp_path / "one-0"
    manifest = {"name": "one", "kind": kind, "inputs": {}, "key": "0", "shared": "0", "packages": {}, "summary": {}}
    artifacts.write_json(tmp_path / artifacts.STAGES_FILE, {"one": stage.name})
    artifacts.write_manifest(stage, manifest)
    artifacts.write_json(stage / artifacts.CONFIG, {"stages": {"one": {}}})
    names = [key for key, _ in kinds.KINDS[kind].shown.curves]
    artifacts.write_lines(stage / artifacts.METRICS, [{"step": 1} | dict.fromkeys(names, 1.0)])
    assert bool(report.page(epath.Path(tmp_path), kinds.shown())["training"]) == bool(names)

    del kinds.KINDS[kind]
    assert kind not in kinds.shown() and heading(kind) not in command.run_sections()
    assert heading(kind) not in command.settings_page() and heading(kind) not in json.loads(command.schemas())
    left = ", ".join(other for other in BUILT_IN if other != kind)
    with pytest.raises(InputError, match=rf"^stages\.{kind}\.kind: unknown kind '{kind}'; ") as caught:
        kinds.read(config.to_dict())
    assert str(caught.value).endswith(f"expected one of {left}") or "did you mean" in str(caught.value)
    assert f"'{kind}'?" not in str(caught.value)
    with pytest.raises(InputError, match=f"unknown kind of stage '{kind}'"):
        recipes.stage(kind)
    page = report.page(epath.Path(tmp_path), kinds.shown())
    assert not page["training"] and not any(page[part] for part in report.PARTS) and page["left_out"] == []
    assert [row["name"] for row in page["provenance"]["rows"]] == ["one"], "a run of it can still be looked at"
    for name in needing(config, kind):
        del config.stages[name]
    if config.stages:
        assert set(planned(config)) == set(config.stages)


def heading(kind: str) -> str:
    return f"--config.stages.NAME. of kind {kind}"


def planned(config):
    return planning.jobs(kinds.read(config.to_dict()), chips.topology("cpu"))


def needing(config, kind: str) -> set[str]:
    """The stages that rest on one, itself included."""
    found, grown = {kind}, True
    while grown:
        above = {
            name
            for name, stage in config.stages.items()
            if name != kind
            for role in kinds.KINDS[stage.kind].roles
            for source in ([stage[role]] if isinstance(stage[role], str) else stage[role])
            if source.partition("/")[0] in found
        }
        grown = not above <= found
        found |= above
    return found


# Plugins --------------------------------------------------------------------------------------------------------------


SAMPLED = {"batch_size": 16, "max_new_tokens": 8, "samples": 2}
FEW = {"batch_size": 8, "steps": 2, "eval_batches": 1, "eval_every": 2, "save_every": 2}


def small(stories, folder, plugin: str):
    """A config with stages that use a plugin's kind, objective and scorer, and one that uses none."""
    write_rows(folder / "rows.jsonl")
    importlib.import_module(plugin)
    config = recipes.config()
    config.plugins = (plugin,)
    config.model.path, config.data.path = str(stories), str(folder / "rows.jsonl")
    config.data.limit = 80
    config.data.max_length, config.data.max_response, config.data.max_prompt = 96, 16, 64
    config.data.max_buckets = 1
    config.stages.update(
        {
            "pairs": recipes.stage("pairs", policy="base", labeller="shortest", **SAMPLED),
            "reward": recipes.stage("reward", init="base", **FEW),
            "split": recipes.stage("split", policy="", quantile=0.5, batch_size=8),
            "dpo": recipes.stage(
                "dpo", init="base", reference="base", pairs="split/all", objective="squared_hinge", **FEW
            ),
            "echo": recipes.stage("echo", policy="dpo", times=2),
        }
    )
    return config


@pytest.mark.usefixtures("clean")
def test_a_plugin_s_kind_objective_and_scorer_run(stories, tmp_path):
    config = kinds.read(small(stories, tmp_path, "tests.plugins.echo").to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    nodes = pipeline.run(config, epath.Path(tmp_path / "run"), mesh)
    assert {status.state for status in states.statuses(config, nodes).values()} == {states.DONE}
    assert artifacts.read_json(nodes["echo"].folder / "echo.json") == ["dpo", "dpo"]
    manifest = artifacts.read_manifest(nodes["echo"].folder)
    assert (manifest["kind"], manifest["produces"], manifest["summary"]) == (
        "echo",
        "report",
        {"names": ["dpo", "dpo"]},
    )
    assert metrics.read(nodes["dpo"].folder)[0]["loss"] == pytest.approx(
        1.0
    )  # the plugin at a log-ratio of 0; dpo: 0.693
    assert {name: set(kinds.plugged(stage)) for name, stage in config.stages.items()} == {
        "pairs": {"labeller"}, "reward": set(), "split": set(), "dpo": {"objective"}, "echo": {"kind"}
    }  # fmt: skip
    assert heading("echo") in command.run_sections() and "| `times` | `1` |" in command.settings_page()
    again = kinds.read(artifacts.read_json(nodes["echo"].folder / artifacts.CONFIG), from_json=True)
    assert again == config


@pytest.mark.usefixtures("clean")
def test_a_changed_plugin_changes_the_key_of_the_stages_that_use_it_alone(stories, tmp_path, monkeypatch):
    """Two plugins, so that one stands for "another plugin"; keys of what rests on a stage follow its own."""
    source = (Path(__file__).parent / "plugins" / "echo.py").read_text()
    plugin = tmp_path / "a_plugin_of_mine.py"
    plugin.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config = small(stories, tmp_path, plugin.stem)
    config.stages.dpo_plain = recipes.stage("dpo", init="base", reference="base", pairs="split/all", **FEW)
    config.stages.echo_base = recipes.stage("echo", policy="base")
    run = kinds.read(config.to_dict())

    def keys() -> dict[str, str]:
        return {name: node.key for name, node in graph.resolve(run, epath.Path("run")).items()}

    before = keys()
    assert keys() == before
    plugin.write_text(f"{source}\n# changed\n")
    after = keys()
    assert {name for name in after if after[name] != before[name]} == {"pairs", "dpo", "echo", "echo_base"}
    plugin.write_text(source)
    assert keys() == before
    without = settings.replaced(run, {"plugins": ()})
    assert {name: node.key for name, node in graph.resolve(without, epath.Path("run")).items()} == before


@pytest.mark.usefixtures("clean")
def test_plugins_that_cannot_be_used_are_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plugin_broken.py").write_text("1 / 0\n")
    (tmp_path / "plugin_again.py").write_text(
        "import dataclasses\nfrom mpo_jax.stages import kinds, sft\nkinds.register(dataclasses.replace(sft.STAGE))\n"
    )
    for name, message in [
        ("no_such_plugin", r"^plugins: 'no_such_plugin' can't be imported \(ModuleNotFoundError: "),
        ("plugin_broken", r"^plugins: 'plugin_broken' can't be imported \(ZeroDivisionError: "),
        ("plugin_again", r"the kind 'sft' is there already"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            kinds.read({"plugins": (name,), "stages": {"sft": {"kind": "sft"}}})
        assert "\n" not in str(caught.value) and str(caught.value).startswith("plugins: ")
