"""Values of every kind enter every setting; a section leaves, or one line for each error that begins with its key."""

import json
from pathlib import Path

import pytest

from mpo_jax import command, recipes, settings
from mpo_jax.errors import InputError
from mpo_jax.run import (
    Columns,
    Constants,
    Data,
    Lora,
    Mesh,
    Model,
    Run,
    Shares,
    StageMesh,
    StageSettings,
    as_json,
    parse,
)  # fmt: skip
from mpo_jax.scorers.limits import Limits
from mpo_jax.settings import Section
from mpo_jax.stages import kinds

SECTIONS = {
    "Run": Run, "model": Model, "model.lora": Lora, "mesh": Mesh, "data": Data, "data.shares": Shares,
    "data.columns": Columns, "data.constants": Constants, "scorers": Limits, "stages.sft.mesh": StageMesh,
} | {f"stages.{name}": kind.settings for name, kind in kinds.KINDS.items()}  # fmt: skip
ODD = {
    "an object": object(), "a dict": {"a": 1}, "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"),
    "-1": -1, "-1.0": -1.0, "0": 0, "0.0": 0.0, "half": 0.5, "empty": "", "10**12": 10**12, "2**63": 2**63,
    "10**400": 10**400, "1e30": 1e30, "unknown": "no_such_name", "number as text": "1", "list": [],
    "list of lists": [[1]], "names": ["a"],
    "tuple": ("a", 1), "none": None, "true": True, "false": False, "bytes": b"a", "long": "x" * 1000,
    "lines": "a\nb", "surrogate": "\ud800",
}  # fmt: skip
EVERY = [(where, name) for where, section in SECTIONS.items() for name in section.model_fields]


def key_of(where: str, name: str) -> str:
    return name if where == "Run" else f"{where}.{name}"


def inside(section: type[Section]) -> dict[str, type[Section]]:
    """The sections within one."""
    return {
        name: field.annotation
        for name, field in section.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def test_the_table_has_every_section():
    assert set(inside(Run).values()) | set(inside(Model).values()) | set(inside(Data).values()) <= set(
        SECTIONS.values()
    )
    for kind in kinds.KINDS.values():
        assert inside(kind.settings) == {"mesh": StageMesh}, "a stage's settings are its own: extend the table"


@pytest.mark.parametrize(("where", "name"), EVERY, ids=[key_of(*each) for each in EVERY])
def test_a_section_takes_a_value_or_tells_its_key(where, name):
    section, place = SECTIONS[where], "" if where == "Run" else where
    known = {f"{place}.{each}" if place else each for each in section.model_fields}
    refused = []
    for label, value in ODD.items():
        try:
            found = settings.parse(section, {name: value}, place)
        except InputError as error:
            refused.append((label, str(error)))
        else:
            json.dumps(settings.plain(found), allow_nan=False)
    assert len(refused) >= 3, "a setting that takes anything"
    for label, told in refused:
        for line in told.split("\n"):
            key, colon, rest = line.partition(": ")
            assert colon and rest, (label, line)
            assert key in known or any(key.startswith(f"{each}.") for each in known), (label, line)
        assert len(told) < 2000, label


@pytest.mark.parametrize(("where", "name"), EVERY, ids=[key_of(*each) for each in EVERY])
def test_a_whole_run_takes_a_value_or_tells_its_key(where, name):
    """As a command line gives it: every line begins with the whole key of a setting that there is."""
    for label, value in ODD.items():
        plain = whole()
        part = plain
        if where != "Run":
            for step in where.split("."):
                part = part[step]
        part[name] = value
        try:
            run = kinds.read(plain)
        except InputError as error:
            for line in str(error).split("\n"):
                beginning = line.partition(": ")[0]
                stage = ".".join(beginning.split(".")[:2]) if beginning.startswith("stages.") else ""
                owner = SECTIONS.get(stage)
                assert (
                    beginning.split(".")[0] in Run.model_fields if owner is None
                    else beginning.removeprefix(f"{stage}.").split(".")[0] in owner.model_fields
                ), (label, line)  # fmt: skip
        else:
            json.dumps(as_json(run), allow_nan=False)


def whole() -> dict:
    """Plain values of a run with a stage of every kind, named as its kind."""
    config = recipes.config()
    config.model.path, config.data.path = "MODEL", "DATA"
    for kind in kinds.KINDS:
        config.stages[kind] = recipes.stage(kind)
    if "pairs" in kinds.KINDS:
        config.stages.reward.pairs = "pairs"
    return config.to_dict()


@pytest.mark.parametrize("value", [None, 3, "x", [], {"": {}}, {"dpo": None}, {"dpo": []}, {"dpo": {"kind": []}},
                                   {3: {"kind": "dpo"}}, {"../up": {"kind": "dpo"}}, {"dpo": {"kind": None}},
                                   {"dpo": {"kind": "dpo", 3: 4}}])  # fmt: skip
def test_stages_that_are_none(value):
    with pytest.raises(InputError) as caught:
        kinds.read(whole() | {"stages": value})
    assert all(line.startswith("stages") for line in str(caught.value).split("\n"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stages.dpo.beta": -1.0}, "stages.dpo.beta: -1.0; expected above 0.0"),
        ({"stages.dpo.beta": "big"}, "stages.dpo.beta: 'big'; expected a number"),
        ({"stages.dpo.beta": float("nan")}, "stages.dpo.beta: nan; expected a finite number"),
        ({"stages.sft.batch_size": 0}, "stages.sft.batch_size: 0; expected 1 or more"),
        ({"stages.sft.batch_size": 8.5}, "stages.sft.batch_size: 8.5; expected a whole number"),
        ({"stages.sft.batch_size": True}, "stages.sft.batch_size: True; expected a whole number"),
        ({"stages.sft.wandb": 1}, "stages.sft.wandb: 1; expected true or false"),
        ({"stages.sft.microbatch": 3}, "stages.sft.microbatch: 3 rows do not divide batch_size 16"),
        ({"stages.sft.bta": 3}, "stages.sft.bta: no such setting; did you mean 'beta2'?"),
        ({"stages.dpo.objective": "dpoo"},
         "stages.dpo.objective: 'dpoo'; expected one of dpo, ipo, robust, hinge, dpo_norm, dpop, simpo, orpo; did you "
         "mean 'dpo'?"),
        ({"model.lora.targets": ["z"]},
         "model.lora.targets.0: 'z'; expected one of 'q', 'k', 'v', 'o', 'gate', 'up' or 'down'"),
        ({"model.lora.targets": []}, "model.lora.targets: (); expected a list that is not empty"),
        ({"data.path": ""}, "data.path: empty; expected the data: a file or folder, here or at gs://, tfds:name or a "
                            "hub name"),
        ({"data.shares.eval": 0.5}, "data.shares.eval: shares {'eval': 0.5, 'policy': 0.45, 'sft_reward': 0.45}; "
                                    "expected parts that add up to 1, found 1.4"),
        ({"model.remat": "ful"}, "model.remat: 'ful'; expected one of none, full, dots; did you mean 'full'?"),
        ({"seed": -1, "stages.dpo.beta": 0.0, "stages.dpo.keep": 0},
         "seed: -1; expected 0 or more\nstages.dpo.keep: 0; expected 1 or more\n"
         "stages.dpo.beta: 0.0; expected above 0.0"),
    ],
)  # fmt: skip
def test_what_is_told(change, told):
    plain = whole()
    for name, value in change.items():
        *parents, leaf = name.split(".")
        part = plain
        for parent in parents:
            part = part[parent]
        part[leaf] = value
    with pytest.raises(InputError) as caught:
        kinds.read(plain)
    assert str(caught.value) == told


def test_replaced_checks_again_and_changes_nothing_else():
    run = kinds.read(whole())
    found = settings.replaced(run, {"stages.dpo.beta": 0.2, "model.lora.rank": 4, "seed": 3})
    assert (found.stages["dpo"].beta, found.model.lora.rank, found.seed) == (0.2, 4, 3)
    assert (run.stages["dpo"].beta, run.model.lora.rank, run.seed) == (0.1, 0, 0)
    back = settings.replaced(found, {"stages.dpo.beta": 0.1, "model.lora.rank": 0, "seed": 0})
    assert back == run and type(found.stages["dpo"]) is type(run.stages["dpo"])
    for change, message in [
        ({"stages.dpo.beta": -1.0}, r"^stages\.dpo\.beta: -1\.0; expected above 0\.0$"),
        ({"stages.dpo.bta": 0.2}, r"^stages\.dpo\.bta: no such setting; did you mean 'beta'\?$"),
        ({"data.max_response": 512}, r"^data\.max_response: 512; expected below max_length 512"),
        ({"stages.dpoo.beta": 0.2}, r"^stages\.dpoo: no such"),
        ({"modell.path": "x"}, r"^modell: no such setting; did you mean 'model'\?$"),
        ({"seed.more": 1}, r"^seed"),
    ]:
        with pytest.raises(InputError, match=message):
            settings.replaced(run, change)
    with pytest.raises(InputError, match=r"^beta: -1\.0; expected above 0\.0$"):
        settings.replaced(run.stages["dpo"], {"beta": -1.0})


def test_settings_are_frozen():
    run = kinds.read(whole())
    for section in (run, run.model, run.stages["dpo"]):
        with pytest.raises(ValueError, match="frozen"):
            section.seed = 1


def test_a_run_is_the_same_after_json():
    plain = whole()
    plain["stages"]["dpo"]["beta"], plain["model"]["lora"]["targets"] = 0.25, ("q", "up")
    run = kinds.read(plain)
    text = json.dumps(as_json(run), allow_nan=False)
    again = kinds.read(json.loads(text), from_json=True)
    assert again == run and again.stages == run.stages
    assert {name: type(stage) for name, stage in again.stages.items()} == {
        n: kinds.KINDS[n].settings for n in run.stages
    }
    assert as_json(again) == json.loads(text)
    assert kinds.read(as_json(run)) == run, "lists are tuples too"
    assert parse(plain, {name: kind.settings for name, kind in kinds.KINDS.items()}) == run


def test_what_is_operational_and_what_names_an_input_stays_out_of_a_hash():
    for where, section in SECTIONS.items():
        if where == "Run":
            continue
        held, operational = settings.content(section()), set()
        for name, field in section.model_fields.items():
            extra = field.json_schema_extra or {}
            if extra.get("operational"):
                operational.add(name)
            out = extra.get("operational") or "role" in extra or extra.get("later")  # of the last, the default alone
            assert (name in held) == (not out), f"{where}.{name}"
        assert not set(held) & (operational | set(settings.roles(section)))
    assert {"microbatch", "remat", "log_every", "keep", "save_every", "wandb"}.isdisjoint(settings.content(dpo()))
    assert {"init", "reference", "pairs"}.isdisjoint(settings.content(dpo()))
    assert settings.content(dpo())["beta"] == 0.1 and settings.content(Model())["lora"]["targets"] == [
        "q",
        "k",
        "v",
        "o",
    ]
    assert {"path", "remat", "attention"}.isdisjoint(settings.content(Model()))


def dpo() -> StageSettings:
    return kinds.KINDS["dpo"].settings(kind="dpo")


def test_every_setting_has_a_line_of_help():
    for where, section in SECTIONS.items():
        within = inside(section)
        for name, field in section.model_fields.items():
            if name not in (*within, "kind", "stages"):
                assert field.description and "\n" not in field.description, f"{where}.{name}"
        assert section.__doc__ and section.__doc__ != Section.__doc__, where
        lines = settings.lines(section)
        assert all(line.help and line.allowed and line.default for line in lines)
        told = {line.name.split(".")[0] for line in lines}
        assert told == set(section.model_fields) - {"kind", "stages"}, where


def test_the_reference_page_is_that_of_the_sections():
    page = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
    assert page.read_text() == command.settings_page() + "\n", "mpo show --settings > docs/settings.md"


def test_what_differs_from_the_defaults_is_told_by_its_key():
    run = kinds.read(whole() | {"seed": 3})
    before = settings.differing(run)
    assert before["seed"] == 3 and "mesh.tensor" not in before
    changed = settings.replaced(run, {"model.lora.rank": 8, "model.dtype": "float32"})
    after = settings.differing(changed)
    assert after == before | {"model.dtype": "float32", "model.lora.rank": 8}
    assert settings.differing(settings.replaced(run.stages["dpo"], {"beta": 0.2}))["beta"] == 0.2
