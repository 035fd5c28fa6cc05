"""Encoded rows and a static length enter; the host's numpy rows of a Batch leave, tight or in slot form.

Which columns are real comes from lengths alone: a tokenizer's pad id may be its EOS id.
"""

import numpy as np

from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import FILLER

FIELDS = ("tokens", "positions", "segments", "id", "prompt_id", "weight")


def tight_rows(encoded: Encoded, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Rows `[prompt | response 0 | ... | padding]` of `length` columns: the array fields of `types.Batch`.

    rows: int [B], indices into `encoded`; FILLER gives a row of padding with weight 0 and ids -1. tokens, positions,
    segments: i32 [B, length]; id, prompt_id: i32 [B]; weight: f32 [B]. Every response's positions continue from the
    prompt.
    """
    result = _empty(encoded, rows, length)
    for place, row in enumerate(rows):
        if row == FILLER:
            continue
        pieces = encoded.row(row)
        first = len(pieces[0])
        end = 0
        for segment, piece in enumerate(pieces, 1):
            start, end = end, end + len(piece)
            result["tokens"][place, start:end] = piece
            result["segments"][place, start:end] = segment
            begin = 0 if segment == 1 else first
            result["positions"][place, start:end] = np.arange(begin, begin + len(piece))
    return result


def prompt_slots(encoded: Encoded, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Prompts alone, left-padded to `length` columns, as the sampler takes them; fields as in `tight_rows`.

    Works on rows with replies too, which it leaves out. The last column is every prompt's last token.
    """
    result = _empty(encoded, rows, length)
    for place, row in enumerate(rows):
        if row == FILLER:
            continue
        prompt = encoded.row(row)[0]
        start = length - len(prompt)
        result["tokens"][place, start:] = prompt
        result["segments"][place, start:] = 1
        result["positions"][place, start:] = np.arange(len(prompt))
    return result


def _empty(encoded: Encoded, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
    rows = np.asarray(rows)
    shape = (len(rows), length)
    real = rows != FILLER
    return {
        "tokens": np.full(shape, encoded.conventions.pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "id": np.where(real, encoded.id[rows], -1).astype(np.int32),
        "prompt_id": np.where(real, encoded.prompt_id[rows], -1).astype(np.int32),
        "weight": real.astype(np.float32),
    }
