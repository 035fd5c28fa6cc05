"""The embedded model's own stories enter; a preference file leaves, such as people have, for trying the tutorial.

    python run_scripts/story_pairs.py pairs.jsonl [--prompts=1500] [--seed=0]

Four endings of each story's opening are drawn, two pairs of them made, and VADER's sentiment says, with Bradley-Terry
noise, which of the two an annotator liked better. A line: `opening`, `liked`, `disliked`, `annotator`.
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mpo_jax import recipes, sampling
from mpo_jax.data.prompts import prompt_batch
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.models import hf
from mpo_jax.models.config import from_folder
from mpo_jax.scorers.preferences import first_wins
from mpo_jax.scorers.sentiment import vader

ROWS, PROMPT, REPLY = 100, 64, 56  # prompts at a time; tokens
NOISE = 0.2
ENDINGS = 4


def endings(openings: Sequence[str], seed: int) -> list[list[str]]:
    """`ENDINGS` endings of each opening, drawn at temperature 1."""
    folder = recipes.MODELS["tiny"]
    config, tokenizer = from_folder(folder), load_tokenizer(folder)
    settings = sampling.SamplingConfig(max_new_tokens=REPLY, n=ENDINGS, stop_ids=hf.read_stop_ids(folder))
    weights = hf.import_weights(folder, config)
    draw = jax.jit(lambda weights, prompts: sampling.sample(config, settings, weights, prompts, seed, 0))
    found: list[list[str]] = []
    for begin in range(0, len(openings), ROWS):
        some = list(openings[begin : begin + ROWS])
        filled = some + some[:1] * (ROWS - len(some))
        batch = draw(weights, prompt_batch(filled, tokenizer, PROMPT)).batch
        tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
        for row in range(len(some)):
            replies = (tokens[row][segments[row] == 2 + n] for n in range(ENDINGS))
            found.append([tokenizer.decode(reply, skip_special_tokens=True) for reply in replies])
    return found


def pairs(openings: Sequence[str], replies: Sequence[Sequence[str]], seed: int) -> Iterator[dict[str, str]]:
    """Rows of the file; endings that are equal make none."""
    for number, (opening, drawn) in enumerate(zip(openings, replies, strict=True)):
        for pair in range(ENDINGS // 2):
            first, second = drawn[2 * pair : 2 * pair + 2]
            if first.strip() == second.strip() or not first.strip() or not second.strip():
                continue
            liking = np.array(vader([], [first, second]))
            won = first_wins(liking[:1], liking[1:], NOISE, np.array([ENDINGS * number + pair]), seed)[0]
            liked, disliked = (first, second) if won else (second, first)
            yield {"opening": opening, "liked": liked, "disliked": disliked, "annotator": f"a{number % 3}"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a preference file of stories.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with gzip.open(recipes.STORIES, "rt", encoding="utf-8") as file:
        openings = [json.loads(line)["prompt"] for line in file][: given.prompts]
    rows = list(pairs(openings, endings(openings, given.seed), given.seed))
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{given.output}: {len(rows):,} pairs of {len(openings):,} prompts")


if __name__ == "__main__":
    main()
