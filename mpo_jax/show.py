"""A data path, a tokenizer and a record's number enter; that record's text and tokens are printed, every mark visible.

`python -m mpo_jax.show --config=configs/quickstart.py --split=train --index=0`, or without a config
`python -m mpo_jax.show --data_path=FILE --tokenizer=FOLDER --split=train --index=0`.
"""

import dataclasses
import sys

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mpo_jax.data.encode import Encoded, Limits, encode
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import TextRecord
from mpo_jax.data.rows import tight_rows
from mpo_jax.data.shares import Division, share_of
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError

_MULTIPLE = 8


def describe(record: TextRecord, encoded: Encoded, tokenizer, share: str) -> str:
    """The text of a record, and its row token by token: column, position, segment, mask, id, token, marks."""
    taken = f"share {share}" if share else "in no share: its prompt is held out"
    lines = [f"record {record.id} of split {record.split}, {taken}"]
    lines += [f"prompt_id {encoded.prompt_id[0]}, confidence {record.confidence}, margin {record.margin}"]
    for name in ("prompt", "chosen", "rejected"):
        text = getattr(record, name)
        if text is not None:
            lines += [f"--- {name}", text]
    done = {name: count for name, count in encoded.counts.items() if count and name not in ("rows", "kept")}
    lines += ["--- tokens" + (f" ({', '.join(done)})" if done else "")]
    length = -(-int(encoded.piece_lens[0].sum()) // _MULTIPLE) * _MULTIPLE
    row = {name: array[0] for name, array in tight_rows(encoded, np.array([0]), length).items()}
    names = ["padding", "prompt", *(f"response {n}" for n in range(encoded.replies))]
    lines += ["column  position  segment     mask  id      token"]
    known = encoded.conventions
    for column in range(length):
        token, segment = int(row["tokens"][column]), int(row["segments"][column])
        mark = ""
        if segment and token == tokenizer.bos_token_id:
            mark = "  <- BOS"
        elif segment and token == known.eos_id:
            mark = "  <- EOS"
        elif segment and token == known.turn_end_id:
            mark = "  <- end of turn"
        elif not segment:
            mark = "  <- padding"
        text = repr(tokenizer.convert_ids_to_tokens(token))
        position, mask = row["positions"][column], str(segment > 0)
        lines.append(f"{column:6}  {position:8}  {names[segment]:10}  {mask:5}  {token:<6}  {text}{mark}")
    return "\n".join(lines)


def settings() -> tuple[Division, str, Limits]:
    """Data and how they are divided, tokenizer folder and limits, from the flags and, beneath them, the config."""
    path, folder = _DATA_PATH.value, _TOKENIZER.value
    limits, division = Limits(512, 192), Division(path or "")
    if _CONFIG.value is not None:
        data = _CONFIG.value.data
        path, folder = path or data.path, folder or _CONFIG.value.model.path
        limits = Limits(data.max_length, data.max_response, data.max_prompt or None, data.too_long)
        fractions = {name: float(part) for name, part in data.shares.items()}
        division = Division(path, data.split, data.eval_split, fractions, reading=Reading.of(data.to_dict()))
    if not path or not folder:
        raise InputError("no data path or tokenizer: give --config, or --data_path and --tokenizer")
    if _MAX_LENGTH.value is not None:
        limits = dataclasses.replace(limits, max_length=_MAX_LENGTH.value)
    if _MAX_RESPONSE.value is not None:
        limits = dataclasses.replace(limits, max_response=_MAX_RESPONSE.value)
    return division, folder, limits


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        division, folder, limits = settings()
        tokenizer = load_tokenizer(folder)
        records, account = load(division.path, _SPLIT.value, tokenizer, reading=division.reading)
        if not 0 <= _INDEX.value < len(records):
            raise InputError(f"--index={_INDEX.value}: expected 0 to {len(records) - 1}; {account.line()}")
        record = records[_INDEX.value]
        replies = (record.chosen is not None) + (record.rejected is not None)
        encoded = encode([record], tokenizer, replies, limits)
        heldout: list[TextRecord] = []
        if division.eval_split:
            heldout, _ = load(division.path, division.eval_split, tokenizer, reading=division.reading)
        share = share_of(record, division, {other.first_turn for other in heldout})
    except InputError as error:
        sys.exit(f"error: {error}")
    print(account.text())
    print(describe(record, encoded, tokenizer, share))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config whose data and model keys the other flags override."
    )
    _DATA_PATH = flags.DEFINE_string(
        "data_path", None, "File, folder, tfds:name or hub name. Default: config.data.path."
    )
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer folder. Default: config.model.path.")
    _SPLIT = flags.DEFINE_string("split", "train", "Split to read; 'all' for every one.")
    _INDEX = flags.DEFINE_integer("index", 0, "Which of the records kept.")
    _MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens of a row. Default: config.data.max_length, or 512.")
    _MAX_RESPONSE = flags.DEFINE_integer(
        "max_response", None, "Tokens of one reply. Default: config.data.max_response, or 192."
    )
    app.run(main)
