"""Models, methods and topologies enter; docs/scaling.md leaves, with its plot: what each would need, and cost.

`python run_scripts/scaling_study.py [--compile] [--models=llama2-7b] [--topologies=v5e:8x8]`

Each cell is a stage of configs/tldr.py with that model, its programs traced for the topology. Figures that the TPU
compiler gave are kept in docs/scaling.json and marked; --compile asks it for those that are missing, one cell after the
other, and may be stopped and started again. All others are arithmetic, and say so.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags, logging

from configs import tldr
from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.models import presets
from mpo_jax.planning import chips, report, stages
from mpo_jax.planning.chips import GIB, Topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.stages import kinds
from mpo_jax.stages.base import Training

MODELS = ("llama2-7b", "llama2-13b", "llama-30b", "llama2-70b")
TOPOLOGIES = ("v5e:4x8", "v5e:8x8", "v5e:16x16", "v4:2x2x4")
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "DPO": (("dpo",), {"stages.dpo.pairs": "split/all"}),
    "PPO": (("mpo",), {"stages.mpo.prompts": "split/all"}),
    "PPO, LoRA": (("mpo",), {"stages.mpo.prompts": "split/all", "model.lora.rank": 16}),
    "MPO, whole": (("sft", "reward", "split", "dpo", "mpo"), {}),
}
"""The stages of a method, and what changes in the config: DPO and PPO alone see all pairs, MPO its parts of them."""

_COMPILE = flags.DEFINE_bool("compile", False, "Compile the cells that have not been.")
_MODELS = flags.DEFINE_list("models", list(MODELS), "Some models.")
_TOPOLOGIES = flags.DEFINE_list("topologies", list(TOPOLOGIES), "Some topologies.")
_METHODS = flags.DEFINE_list("methods", ["DPO", "PPO", "PPO-LoRA", "MPO"], "Some of DPO, PPO, PPO-LoRA, MPO.")
_DOCS = Path(__file__).resolve().parent.parent / "docs"
_BY_HAND = "\n## 13B and 30B"
"""What stands from here on in the page is kept as it is."""
_FIGURES, _PAGE, _PLOT = _DOCS / "scaling.json", _DOCS / "scaling.md", _DOCS / "scaling.png"


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    chips.prepare()
    logging.set_verbosity(logging.ERROR)
    known = json.loads(_FIGURES.read_text()) if _FIGURES.exists() else {}
    wanted = {name.replace("-", ", ") if name != "MPO" else "MPO, whole" for name in _METHODS.value}
    for topology in _TOPOLOGIES.value:
        place = chips.topology(topology)
        for model in _MODELS.value:
            for method in METHODS:
                if method not in wanted:
                    continue
                name = f"{model} | {method} | {topology}"
                if name not in known or (_COMPILE.value and known[name]["source"] != "compiler"):
                    how = place if _COMPILE.value else dataclasses.replace(place, compiled=False)
                    known[name] = cell(model, method, how)
                    print(f"{name}: {known[name]['peak'] / GIB:.1f} GiB, {known[name]['source']}", flush=True)
                    _FIGURES.write_text(json.dumps(known, indent=1) + "\n")
    draw(known)
    by_hand = _PAGE.read_text().partition(_BY_HAND) if _PAGE.exists() else ("", "", "")
    _PAGE.write_text(page(known) + by_hand[1] + by_hand[2])


def cell(model: str, method: str, place: Topology) -> dict[str, Any]:
    """The figures of a method: its largest stage's memory, and the sums of its stages' work and time."""
    names, changes = METHODS[method]
    config = kinds.read(tldr.get_config().to_dict())
    sizes = choose_mesh(model, place)
    shards = sizes["data"] * sizes["fsdp"]
    changes = changes | {"model.path": model} | {f"mesh.{axis}": size for axis, size in sizes.items()}
    for name, stage in config.stages.items():
        changes[f"stages.{name}.batch_size"] = math.lcm(64, shards)
        if isinstance(stage, Training):
            changes[f"stages.{name}.microbatch"] = math.lcm(32, shards)
    config = settings.replaced(config, changes)
    assumptions = Assumptions()
    plans = {name: stages.plan(job, place, assumptions) for name, job in stages.jobs(config, place, names).items()}
    programs = [each for plan in plans.values() for each in plan.programs.values()]
    return {
        "source": "compiler" if place.compiled else "arithmetic",
        "chip": place.chip.name,
        "chips": place.size,
        "memory": place.chip.memory,
        "mesh": sizes,
        "batch_size": math.lcm(64, shards),
        "peak": max(plan.peak for plan in plans.values()),
        "fits": all(plan.fits for plan in plans.values()),
        "flops": sum(each.report.flops * each.calls for each in programs) * place.size,
        "sent": sum(sum(each.report.collectives.values()) * each.calls for each in programs),
        "chip_hours": sum(plan.chip_hours for plan in plans.values()),
        "stages": report.as_json(place, sizes, plans, {}, assumptions)["stages"],
    }


def choose_mesh(model: str, place: Topology) -> dict[str, int]:
    """Tensor as small as lets the weights that sampling gathers, in bfloat16, take a third of a chip."""
    architecture = presets.find(model).architecture
    found = stages.meshes(architecture, place.size)
    if not found:
        raise InputError(f"{model}: no mesh divides it over {place.name}")
    weights = 2 * presets.parameters(architecture)
    fitting = [mesh for mesh in found if weights / mesh["tensor"] < place.chip.memory / 3]
    return min(fitting, key=lambda mesh: mesh["tensor"]) if fitting else max(found, key=lambda mesh: mesh["tensor"])


PAGE = """# What MPO costs at larger scale, on paper

This page is written by `python run_scripts/scaling_study.py`; `scaling.json` holds the figures of every program. The
paper (Gou & Nguyen 2024) tests 7B and leaves larger models open. Nothing below was run on an accelerator.

**Where the figures come from.** The table has {cells} rows. In {compiled} of them, memory, traffic and collectives
come from the TPU compiler, for the programs that a run would call (source: compiler). In {reckoned} of them they come
from arithmetic on the shapes of the same programs (source: arithmetic). A test checks that this arithmetic is within
10 % of XLA's memory on CPU at small shapes; at 7B on TPU the error is larger. FLOPs are always counted on the traced
programs.

Chip-hours are **estimates**. A call takes as long as the slowest of work, memory and collectives at {utilisation:.0%}
of the chip's peak. The data is {pairs:,} pairs (as many as TL;DR has), {easy:.0%} of them easy, in the shares of
`configs/tldr.py`. Loading, saving and the final evaluation are left out.

Prompts have 512 tokens and replies 128. The global batch is 64 (more where the mesh has more shards), with remat
full, Adam in float32, frozen weights in bfloat16, and LoRA of rank 16 on q, k, v and o. DPO and PPO alone train on all
pairs of the policy share. Whole MPO is SFT, the reward model, the split (4 sampled replies to a prompt), DPO on
the easy half and PPO on the hard half.

![Peak memory of a chip by model](scaling.png)

| model | method | slice (chips) | fsdp x tensor | GiB a chip | fits | PFLOP | GB sent a chip | chip-hours | source |
| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | --- |
"""


def page(known: dict[str, Any]) -> str:
    """The page, as Markdown."""
    compiled = sum(each["source"] == "compiler" for each in known.values())
    text = PAGE.format(
        cells=len(known), compiled=compiled, reckoned=len(known) - compiled, **dataclasses.asdict(Assumptions())
    )
    lines = []
    for name, each in sorted(known.items(), key=lambda item: _order(item[0])):
        model, method, topology = name.split(" | ")
        mesh = each["mesh"]
        lines.append(
            f"| {model} | {method} | {topology} ({each['chips']}) | {mesh['fsdp']} x {mesh['tensor']} | "
            f"{each['peak'] / GIB:.1f} of {each['memory'] / GIB:.1f} | {'yes' if each['fits'] else 'no'} | "
            f"{each['flops'] / 1e15:,.0f} | {each['sent'] / 1e9:,.0f} | {each['chip_hours']:,.0f} | {each['source']} |"
        )
    return text + "\n".join([*lines, "", *_answer(known), ""])


def _answer(known: dict[str, Any]) -> list[str]:
    """What whole MPO costs beside DPO and PPO, by model, on one topology that all fit best."""
    lines = ["## Does MPO's cost grow with the model?", ""]
    for topology in TOPOLOGIES:
        ratios = []
        for model in MODELS:
            cells = [known.get(f"{model} | {method} | {topology}") for method in ("MPO, whole", "PPO", "DPO")]
            if all(cells):
                whole, ppo, dpo = (each["flops"] for each in cells if each)
                ratios.append(f"{model} {whole / ppo:.2f} and {whole / dpo:.1f}")
        if ratios:
            lines.append(
                f"- {topology}: FLOPs of whole MPO, divided by those of PPO and by those of DPO on all pairs: "
                f"{'; '.join(ratios)}."
            )
    return lines


def _order(name: str) -> tuple[int, int, int]:
    model, method, topology = name.split(" | ")
    places = (MODELS, list(METHODS), TOPOLOGIES)
    return tuple(  # type: ignore[return-value]
        list(known).index(each) if each in known else len(known)
        for known, each in zip(places, (model, method, topology), strict=True)
    )


def draw(known: dict[str, Any]) -> None:
    """Peak memory of a chip over the model's size, one panel for each topology."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    topologies = [each for each in TOPOLOGIES if any(name.endswith(each) for name in known)]
    figure, axes = pyplot.subplots(1, len(topologies), figsize=(3.2 * len(topologies), 3.4), sharey=True, squeeze=False)
    for axis, topology in zip(axes[0], topologies, strict=True):
        for method in METHODS:
            points = []
            for model in MODELS:
                each = known.get(f"{model} | {method} | {topology}")
                if each:
                    size = presets.parameters(presets.find(model).architecture) / 1e9
                    points.append((size, each["peak"] / GIB, each["source"] == "compiler"))
            # Dashed, since the largest memory of whole MPO is that of its PPO.
            style = "--" if method == "MPO, whole" else "-"
            line = axis.plot([p[0] for p in points], [p[1] for p in points], style, label=method)[0]
            for filled in (True, False):
                some = [p for p in points if p[2] is filled]
                face = line.get_color() if filled else "white"
                axis.scatter(
                    [p[0] for p in some], [p[1] for p in some], color=line.get_color(), facecolor=face, zorder=3
                )
        memory = next(each["memory"] for name, each in known.items() if name.endswith(topology))
        axis.axhline(memory / GIB, color="grey", linestyle="--", linewidth=1)
        axis.set(title=topology, xlabel="billion weights", xscale="log", yscale="log")
        sizes = [presets.parameters(presets.find(model).architecture) / 1e9 for model in MODELS]
        axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        axis.set_xticks([], minor=True)
    axes[0][0].set_ylabel("peak GiB of a chip\n(filled: compiler; grey: what there is)")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(_PLOT, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    app.run(main)
