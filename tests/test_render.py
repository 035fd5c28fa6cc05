"""`mpo report` over several runs: a page, a table in Markdown, and a line for what can't be meant."""

import types
from pathlib import Path

import pytest
from etils import epath

from configs import quickstart
from mpo_jax import artifacts, render
from mpo_jax.errors import InputError
from mpo_jax.evaluation import over_runs
from mpo_jax.run import as_json
from mpo_jax.stages import kinds
from tests.evaluation.test_over_runs import report


def run_folder(folder: Path, number: int, **changes) -> Path:
    """A run of the quickstart's settings whose evaluation is done. changes: of its dpo stage."""
    config = quickstart.get_config()
    config.seed = number
    config.stages.dpo.update(changes)
    stage = epath.Path(folder) / "evaluate-0123"
    artifacts.write_json(stage / artifacts.CONFIG, as_json(kinds.read(config.to_dict())))
    artifacts.write_json(stage / artifacts.REPORT, report(number))
    artifacts.write_lines(stage / artifacts.REPLIES_FILE, [])
    made = {"name": "evaluate", "kind": "evaluate", "key": "0123", "shared": "abcd", "packages": {}, "summary": {}}
    artifacts.write_manifest(stage, made | {"inputs": {}, "devices": "1 x cpu"})
    artifacts.write_json(folder / artifacts.STAGES_FILE, {"evaluate": stage.name})
    return folder


def test_seeds_and_ways_of_computing_do_not_tell_runs_apart(tmp_path):
    one = render.read(str(run_folder(tmp_path / "one", 0)))
    two = render.read(str(run_folder(tmp_path / "two", 1, save_every=7, log_every=3)))
    three = render.read(str(run_folder(tmp_path / "three", 0, beta=0.3, seed=2)))
    assert one.meant == two.meant and (one.seeds, two.seeds, three.seeds) == ("0", "1", "0, dpo +2")
    parts = over_runs.groups([one, two, three])
    assert [len(part) for part in parts] == [2, 1]
    assert over_runs.differing(parts) == [{"key": "stages.dpo.beta", "values": [0.1, 0.3]}]
    other = render.meant(kinds.read(artifacts.read_json(tmp_path / "one/evaluate-0123/config.json"), from_json=True))
    assert other["stages.mpo.init"] == "dpo" and other["model.path"] == "tiny_stories"


@pytest.fixture
def places(tmp_path) -> list[str]:
    return [str(run_folder(tmp_path / f"seed{number}", number)) for number in range(2)]


def call(monkeypatch, run: list[str], output: str | None = None, markdown: bool = False) -> None:
    given = types.SimpleNamespace(run=run, output=output, markdown=markdown)
    monkeypatch.setattr(render.flags, "FLAGS", given)
    render.work()


def test_a_page_and_a_terminal_s_text(places, tmp_path, monkeypatch, capsys):
    page = tmp_path / "all.html"
    call(monkeypatch, places, str(page))
    output = capsys.readouterr().out
    assert output.startswith("2 runs, seeds 0, 1\nevaluate: means over runs ± 95 % t intervals\n")
    assert "Over 2 runs, mpo is" in output and output.endswith(f"report: {page}\n")
    assert "Over 2 runs, mpo is" in page.read_text() and 'href="seed1/report.html"' in page.read_text()


def test_markdown_writes_nothing(places, tmp_path, monkeypatch, capsys):
    call(monkeypatch, places, markdown=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| policy | gold | KL to sft | tokens | wins by gold |" and " ± " in lines[4]
    assert list(tmp_path.rglob("*.html")) == []


def test_one_run_is_drawn_again(places, monkeypatch, capsys):
    call(monkeypatch, places[:1])
    assert capsys.readouterr().out == f"report: {places[0]}/report.html\n"


def test_what_can_t_be_meant_is_a_line(places, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    artifacts.write_json(tmp_path / "empty" / artifacts.STAGES_FILE, {})
    one = places[0]
    older = run_folder(tmp_path / "older", 2)
    config = older / "evaluate-0123" / artifacts.CONFIG
    config.write_text(config.read_text().replace('"beta"', '"bta"'))
    for run, output, words in [
        ([one, str(older)], None, r"^--run: \S+older: its settings can't be read: stages.dpo.bta: no such setting"),
        ([one, f"{one}/../seed0"], None, "^--run: the same folder is given twice; expected each run once$"),
        ([one], "x.html", "^--output: is only for several runs"),
        ([one, str(tmp_path)], None, r"^--run: \S+ holds no stages.json; expected the --workdir of a run$"),
        ([one, str(tmp_path / "empty")], None, "has no finished stage; expected a run whose evaluate stage is done$"),
        ([], None, "^--run: expected the --workdir of a run, or of several$"),
    ]:
        with pytest.raises(InputError, match=words):
            call(monkeypatch, run, output)
