"""Runs in a process of its own: prompts and replies enter as lines of JSON, scores of one function leave likewise.

The first line names the function and the path that modules are looked for on. What the function prints goes to standard
error. When standard input ends, so does the process, whatever the function does. Only the standard library is imported.
"""

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(os.fdopen(os.dup(0), encoding="utf-8"), lines), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    begin = json.loads(lines.get())
    sys.path[:] = begin["path"]
    function: Any = None

    def load() -> dict[str, Any]:
        nonlocal function
        function = getattr(importlib.import_module(begin["module"]), begin["function"], None)
        if not callable(function):
            found = "is not there" if function is None else f"is {type(function).__name__}, no function"
            return {"error": f"{begin['function']} {found} in {begin['module']}"}
        return {"ready": True}

    def score() -> dict[str, Any]:
        asked = json.loads(lines.get())
        return {"scores": [_number(each) for each in function(asked["prompts"], asked["replies"], asked["records"])]}

    answer = _caught(load)
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        answer = _caught(score)


def _read(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    os._exit(0)  # whoever asks is gone


def _caught(work: Any) -> dict[str, Any]:
    """What work gives, or what it raised, with the last line of somebody else's code that it came from."""
    try:
        return work()
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename != __file__]
        place = f" (line {frames[-1].lineno} of {os.path.basename(frames[-1].filename)})" if frames else ""
        return {"error": " ".join(f"raised {type(error).__name__}: {error}".split())[:300] + place}


def _number(score: Any) -> float | None:
    """TypeError for what is no number."""
    if isinstance(score, str | bytes):
        raise TypeError(f"a score is {score!r:.40}; expected a number or None")
    return None if score is None else float(score)


if __name__ == "__main__":
    main()
