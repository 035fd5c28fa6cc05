"""Words enter; a JSONL file of story beginnings leaves, as prompts for stories260K.

python tests/tools/story_prompts.py FILE
"""

import itertools
import json
import sys
from pathlib import Path

NAMES = ("Tom", "Lily", "Sara", "Ben", "Mia", "Tim", "Anna", "Max", "Sue", "Sam")
KINDS = ("girl", "boy", "cat", "dog", "bird")
MOODS = ("little", "happy", "sad", "kind", "brave")
PLACES = ("went to the park", "saw a big box", "lost a toy")


def prompts() -> list[str]:
    return [
        f"Once upon a time, there was a {mood} {kind} named {name}. One day, {name} {place}."
        for mood, kind, name, place in itertools.product(MOODS, KINDS, NAMES, PLACES)
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()))
