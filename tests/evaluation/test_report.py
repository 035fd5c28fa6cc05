"""The report of a made run in a real Chromium: every plot is shown, nothing is asked for, markup in a reply is text."""

import csv
import itertools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from etils import epath
from markdown_it import MarkdownIt

from mpo_jax import artifacts
from mpo_jax.evaluation import beside, figures, report, split_report, statistics
from mpo_jax.stages import kinds
from tests.browser import PHONE, WIDE, browser, complaints, overflow, resize
from tests.evaluation import made

HOSTILE = "<script>document.title = 'broken'</script><b>bold</b>"
__all__ = ["browser"]  # a fixture


def stage(workdir, name, kind, inputs=None, done=True):
    folder = workdir / f"{name}-0123"
    folder.mkdir()
    artifacts.write_json(
        folder / "config.json", {"stages": {name: {"kind": kind, "pair_source": "sampled", "labeller": ""}}}
    )
    entries = {role: [{"name": source, "part": part}] for role, (source, part) in (inputs or {}).items()}
    manifest = {
        "name": name,
        "kind": kind,
        "key": "0123",
        "inputs": entries,
        "shared": "abcd",
        "packages": {"jax": "1"},
    }
    if done:
        artifacts.write_manifest(folder, manifest | {"summary": {}})
    return folder


def curve(folder, **values):
    rows = [{"step": step} | {key: value / step for key, value in values.items()} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def workdir(tmp_path):
    folder = epath.Path(tmp_path / "run")
    folder.mkdir()
    curve(stage(folder, "sft", "sft", {"init": ("base", "")}), **{"loss": 2.0, "eval/loss": 2.2})
    curve(stage(folder, "reward", "reward", {"init": ("sft", "")}), loss=0.7, accuracy=0.6)
    split = stage(folder, "split", "split", {"reward": ("reward", "")})
    gap = np.random.default_rng(0).normal(0.5, 1, 200).astype(np.float32)
    artifacts.write_gaps(split, made.gap_table(gap))
    lengths = {"easy": split_report.lengths(np.array([[9, 5, 4], [8, 6, 7]]))}
    texts = {"prompt": "<b>one</b>", "chosen": HOSTILE, "rejected": "two"}
    artifacts.write_json(split / "samples.json", {"easy": [{"id": 1, "gap": 2.0} | texts], "hard": []})
    artifacts.write_json(
        split / "report.json",
        {"threshold": 1.0, "pairs": 200, "counts": {"easy": 60, "hard": 130}, "agreement": 0.7, "lengths": lengths},
    )
    curve(stage(folder, "mpo", "ppo", {"init": ("sft", ""), "prompts": ("split", "hard")}), score=1.0, kl=0.5)
    stage(folder, "dpo", "dpo", done=False)
    evaluate = stage(folder, "evaluate", "evaluate", {"policies": ("mpo", "")})
    won = statistics.compare("mpo", "sft", "the reward model", np.array([1.0, 0.5, 1.0]))
    means = {"tokens": 5.0, "finished": 1.0, "reward": 0.25, "kl": 0.0, "kl_error": 0.0}
    artifacts.write_json(
        evaluate / "report.json",
        {
            "prompts": 3,
            "baseline": "sft",
            "truncation": "",
            "policies": {"sft": means, "mpo": means | {"kl": 1.5}},
            "comparisons": [vars(won) | {"sentence": statistics.sentence(won)}],
            "errors": {name: {"tokens": 0.25, "reward": 0.0125} for name in ("sft", "mpo")},
            "verdict": {
                "name": "mpo",
                "by": "the reward model",
                "prompts": 3,
                "baseline": "sft",
                "kl": 1.5,
                "sentences": ["mpo is better than sft."],
                "against": [
                    {
                        "name": "sft",
                        "kl": 0.0,
                        "difference": {"mean": 0.3, "low": 0.1, "high": 0.5, "p_value": 0.01, "adjusted_p": 0.02},
                        "wins": {"rate": 0.8, "low": 0.5, "high": 1.0, "adjusted_p": 0.06},
                    }
                ],
            },
            "frontier": {"mpo": [{"step": 1, "kl": 0.0, "score": 0.1}, {"step": 2, "kl": 1.5, "score": 0.4}]},
        },
    )
    reply = {"text": HOSTILE, "tokens": 5, "finished": False, "reward": 0.25, "gold": None}
    line = {"prompt_id": 1, "prompt": "A <i>prompt</i>", "replies": {"sft": reply, "mpo": reply}}
    (evaluate / "replies.jsonl").write_text(json.dumps(line) + "\n")
    names = ("sft", "reward", "split", "dpo", "mpo", "evaluate")
    artifacts.write_json(folder / "stages.json", {name: f"{name}-0123" for name in names})
    return folder


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_plot_is_shown_and_markup_is_text(workdir, browser, size):
    page = report.write(workdir, kinds.shown())
    complaints(browser)
    resize(browser, size)
    browser.get(f"file://{page}")
    assert complaints(browser) == []
    assert browser.title == "run: report"
    plots = browser.find_elements("css selector", "svg.plot")
    assert len(plots) == 1 + 1 + 1 + 2 + 2  # frontier, gaps, sft, reward, ppo
    drawn = [*plots, browser.find_element("css selector", "svg.graph")]
    assert all(plot.size["width"] > 50 and plot.size["height"] > 25 for plot in drawn)  # a chain of stages is one row
    told = browser.find_element("css selector", ".verdict").text
    assert "mpo is better than sft." in told and "+0.30 [0.10, 0.50]" in told and "80 % [50, 100]" in told
    lines = browser.find_elements("css selector", ".verdict .interval")
    assert len(lines) == 2 and all(line.size["width"] > 90 for line in lines)
    results = browser.find_element("css selector", "#results-1 table")
    assert "0.250 ± 0.013" in results.text and "finished" not in results.text
    results.find_element("css selector", "tbody summary").click()
    assert "finished" in results.text
    texts = browser.find_elements("css selector", "#samples .reply p")
    assert [text.text for text in texts] == [HOSTILE] * 2
    assert browser.find_element("css selector", "#samples .prompt").text == "+0.00 A <i>prompt</i>"
    browser.find_element("css selector", "#split summary").click()
    assert [text.text for text in browser.find_elements("css selector", "#split .reply p")] == [HOSTILE, "two"]
    assert overflow(browser) <= 0
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in asked if not name.startswith("data:")] == []
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


def test_samples_can_be_searched_and_lie_from_gain_to_loss(workdir, browser):
    reply = {"text": "a reply", "tokens": 5, "finished": True, "gold": None}
    lines = [
        {"prompt_id": n, "prompt": f"prompt {n} of many",
         "replies": {"sft": reply | {"reward": 0.0}, "mpo": reply | {"reward": float(n)}}} for n in range(100)
    ]  # fmt: skip
    (workdir / "evaluate-0123" / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = artifacts.read_json(workdir / "evaluate-0123" / "manifest.json")
    artifacts.write_manifest(
        workdir / "evaluate-0123", {k: manifest[k] for k in manifest if k not in ("files", "checksum")}
    )
    resize(browser, WIDE)
    browser.get(f"file://{report.write(workdir, kinds.shown())}")
    shown = [each.text for each in browser.find_elements("css selector", "#samples summary")]
    assert len(shown) == 60 and shown[0] == "+99.00 prompt 99 of many" and shown[-1] == "+0.00 prompt 0 of many"
    assert len(browser.find_elements("css selector", "#samples details[open]")) == 3
    browser.find_element("css selector", "#samples input").send_keys("PROMPT 99")
    assert [each.text for each in browser.find_elements("css selector", "#samples summary") if each.text] == shown[:1]
    assert browser.find_element("css selector", "#samples [role=status]").text == "1 of 60"


def test_provenance_tells_command_settings_and_device_hours(workdir):
    manifest = {"name": "dpo", "kind": "dpo", "key": "0123", "inputs": {}, "shared": "abcd", "packages": {"jax": "1"},
                "seconds": 1800.0, "devices": "8 x TPU v5 lite", "command": "mpo run --config=<mine>", "commit": "f00d",
                "changed": {"run": {"seed": 7}, "stage": {"beta": 0.5}}, "summary": {}}  # fmt: skip
    artifacts.write_manifest(workdir / "dpo-0123", manifest)
    page = report.write(workdir, kinds.shown()).read_text()
    told = page[page.index('id="provenance"') :]
    assert "mpo run --config=&lt;mine&gt;" in told and "f00d" in told and "8 x TPU v5 lite" in told
    assert "seed=7" in told and "beta=0.5" in told and "<dd>4.00, without 5 stages whose time" in told


def test_known_failures_stand_above_the_results(workdir):
    folder = workdir / "reward-0123"
    baselines = {"tfidf_bradley_terry": None, "shorter_wins": 0.5}
    weak = {"report": {"accuracy": 0.49, "accuracy_se": 0.05, "pairs": 104, "baselines": baselines}}
    manifest = {"name": "reward", "kind": "reward", "key": "0123", "inputs": {}, "shared": "abcd", "packages": {}}
    artifacts.write_manifest(folder, manifest | {"summary": weak})
    page = report.write(workdir, kinds.shown()).read_text()
    assert page.index('id="verdict-1"') < page.index('id="signs"') < page.index('id="results-1"')
    assert "right on 0.490 ± 0.050 of 104 held-out pairs" in page and "Left out" not in page


def test_a_policy_more_than_there_are_colours_has_other_dashes():
    drawn = figures.lines({str(n): [(0, n), (1, n)] for n in range(8)}, "step", "score")
    assert len(re.findall("stroke-dasharray", drawn)) >= 2
    labels = re.findall(r">([\d.]+)</text>", figures.lines({"a": [(1, 0.0), (3, 1.0)]}, "step", "score"))
    assert {"1", "2", "3"} <= set(labels) and "1.5" not in labels and "1.25" not in labels


def test_a_damaged_stage_costs_its_section_alone(workdir, capsys):
    (workdir / "split-0123" / "gaps.npz").write_bytes(b"not an archive")
    (workdir / "mpo-0123" / "config.json").write_text("{")  # its checksum stands in the manifest
    page = report.write(workdir, kinds.shown()).read_text()
    assert "Left out: splits: InputError: " in page and "split-0123/gaps.npz: damaged" in page
    assert "Left out: mpo: " in page and "mpo-0123/config.json: damaged" in page
    assert 'id="training"' in page and 'id="results' in page and 'id="split"' not in page
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in told] == ["left out mpo", "left out splits"]


def test_dpo_stages_stand_beside_each_other(workdir):
    judged = {"accuracy": 0.75, "reward_margin": 0.25, "kl_chosen": 1.0, "kl_rejected": -2.0,
              "easy_accuracy": 0.9, "easy_share": 0.48}  # fmt: skip
    manifest = {"name": "dpo", "kind": "dpo", "key": "0123", "inputs": {"pairs": [{"name": "split", "part": "easy"}]},
                "summary": {"pairs": 1200, "judged": judged, "heldout_pairs": 75}}  # fmt: skip
    artifacts.write_manifest(workdir / "dpo-0123", manifest | {"shared": "abcd", "packages": {}})
    page = report.write(workdir, kinds.shown()).read_text()
    row = page[page.index('<th scope="row">dpo</th>') :].split("</tr>")[0]
    cells = re.findall(r'<td data-label="([^"]+)">([^<]*)</td>', row)
    assert cells[:4] == [
        ("trained on", "1,200 of split/easy"), ("reward accuracy", "0.750 ± 0.050"),
        ("on easy pairs", "0.900 ± 0.050"), ("on hard pairs", "–"),
    ]  # fmt: skip
    assert cells[4:] == [("margin", "0.250"), ("log-ratio of chosen", "1.00"), ("log-ratio of rejected", "-2.00")]
    assert "Left out" not in page


def test_a_whole_run_leaves_nothing_out(workdir):
    assert report.page(workdir, kinds.shown())["left_out"] == []


def test_unfinished_and_absent_stages_are_left_out(workdir):
    (workdir / "evaluate-0123" / "manifest.json").unlink()
    page = report.write(workdir, kinds.shown()).read_text()
    assert 'id="training"' in page and 'id="split"' in page
    assert 'id="results' not in page and 'id="samples"' not in page and 'id="judge"' not in page
    assert [each.name for each in report.finished(workdir)[0]] == ["sft", "reward", "split", "mpo"]


def test_a_run_without_any_finished_stage(tmp_path):
    assert "<section" not in report.write(epath.Path(tmp_path), kinds.shown()).read_text()


def test_boxes_of_the_graph_hold_the_longest_name():
    sources = {"base": [], "blend_of_ppo_sft_and_mpo": ["base"], "judge": ["blend_of_ppo_sft_and_mpo"]}
    drawn = figures.graph(sources, dict.fromkeys(sources, "kind"))
    widths = {float(width) for width in re.findall(r'<rect [^>]*width="(\S+)"', drawn)}
    assert len(widths) == 1 and widths.pop() >= 8 * len("blend_of_ppo_sft_and_mpo")
    lefts = sorted(float(x) for x in re.findall(r'<rect x="(\S+)"', drawn))
    assert all(b - a > 8 * 24 for a, b in itertools.pairwise(lefts))


def test_no_edge_of_the_graph_passes_behind_a_box():
    sources = {"base": [], "sft": ["base"], "reward": ["sft"], "split": ["reward", "sft"], "dpo": ["sft", "split"],
               "dpo_all": ["sft", "split"], "mpo": ["dpo", "reward", "split", "sft"],
               "evaluate": ["sft", "dpo", "mpo", "dpo_all", "reward"]}  # fmt: skip
    drawn = figures.graph(sources, dict.fromkeys(sources, "kind"))
    boxes = [tuple(map(float, box)) for box in re.findall(r'<rect x="(\S+)" y="(\S+)"', drawn)]
    passing = re.findall(r"([\d.]+) ([\d.]+)H([\d.]+)", drawn)
    assert len(boxes) == len(sources) and len(passing) > 8
    for left, y, right in (tuple(map(float, each)) for each in passing):
        for x, top in boxes:
            assert right <= x or left >= x + figures._BOX[0] or not top < y < top + figures._BOX[1]


def test_figures_and_tables_lie_beside_the_page(workdir):
    old = workdir / "figures" / "training-gone-loss.svg"
    artifacts.write_text(old, "<svg/>")
    report.write(workdir, kinds.shown())
    names = {path.name for path in (workdir / "figures").iterdir()}
    curves = ("training-sft-loss-nats-per-token", "training-reward-loss", "training-reward-accuracy")
    ppo = ("training-mpo-score", "training-mpo-kl-to-the-reference-nats")
    one = ("splits-split-gaps", "evaluations-evaluate-reward-model-s-score")
    assert names == {f"{name}.{end}" for name in (*curves, *ppo, *one) for end in ("svg", "csv")}
    for name in names:
        if name.endswith("svg"):
            root = ElementTree.fromstring((workdir / "figures" / name).read_text())
            assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("color")
    with (workdir / "figures" / "training-sft-loss-nats-per-token.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["curve", "step", "loss, nats per token"] and ["held out", "2", "1.1"] in rows and len(rows) == 7
    with (workdir / "figures" / "splits-split-gaps.csv").open() as file:
        assert sum(float(row["pairs"]) for row in csv.DictReader(file)) == 200


def test_tables_as_markdown_are_tables(workdir):
    verdict = artifacts.read_json(workdir / "evaluate-0123" / "report.json")["verdict"]
    report.write(workdir, kinds.shown())
    text = (workdir / "report.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert verdict["sentences"][0] in text and "](figures/training-mpo-score.svg)" in text
    assert sum(token.type == "table_open" for token in tokens) == len(re.findall(r"^\| --- \|", text, re.M)) == 4
    heads = [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "th_open"]
    assert heads[:3] == ["mpo against", "difference of score, 95 %", "p"] and "reward model" in heads


def test_cells_of_markdown_hold_no_bars_lines_or_folders():
    assert beside.cell("a|b\nc") == "a\\|b c" and beside.cell(None) == beside.cell("") == "–" and beside.cell(0) == "0"
    assert beside.cell("/home/me/models/qwen") == "qwen" and beside.cell("sft/easy") == "sft/easy"


def test_seven_policies_differ_in_more_than_colour():
    drawn = figures.lines({f"policy {n}": [(n, n)] for n in range(7)}, "KL", "score", "o")
    marks = re.findall(r'<use [^>]*style="([^"]*)"', drawn)
    shapes = set(re.findall(r'<path id="f[0-9]+-m[0-9a-f]+" d="([^"]+)"', drawn))
    assert len({mark for mark in marks if "stroke" in mark}) >= 7 and len(shapes) >= 7
    assert len(set(figures._COLOURS[:7])) == 7 and all(f"policy {n}" in drawn for n in range(7))


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours, as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_curves_stand_out_from_the_page_in_both_modes():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for ground in ("#ffffff", "#1c2027"):  # of a card, light and dark
        assert min(contrast(colour, ground) for colour in figures._COLOURS) >= 3
