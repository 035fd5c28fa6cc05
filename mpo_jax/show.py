"""Takes a data path, a tokenizer and the number of a record; prints the record's text and each of its tokens.

`python -m mpo_jax.show --config=configs/quickstart.py --split=train --index=0`, or without a config
`python -m mpo_jax.show --data_path=FILE --tokenizer=FOLDER --split=train --index=0`. `--source=NAME` looks at a
named source of the config. If the columns are in no known form, it says what each of them probably is. With
`--settings` it prints the reference of all settings, with `--schema` their JSON schemas.
"""

import dataclasses

import numpy as np
from absl import flags
from ml_collections import config_flags

from mpo_jax import command, main
from mpo_jax.data import template
from mpo_jax.data.encode import Encoded, Limits, encode
from mpo_jax.data.reading import Reading, of_source
from mpo_jax.data.records import TextRecord
from mpo_jax.data.rows import tight_rows
from mpo_jax.data.shares import Division, share_of
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.settings import nearest
from mpo_jax.stages import job as jobs

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


def look(division: Division, folder: str, split: str, index: int, limits: Limits, end_of_turn: str = "") -> str:
    """What `describe` tells of one record of a source. division: the data. folder: the tokenizer's. index: of the
    records kept. end_of_turn: see `template.dressed`. InputError for a record that is not there."""
    reading = division.reading or Reading()
    tokenizer = template.dressed(load_tokenizer(folder), reading.template, end_of_turn)
    records, account = load(division.path, split, tokenizer, reading=division.reading)
    if not 0 <= index < len(records):
        raise InputError(f"--index={index}: expected 0 to {len(records) - 1}; {account.line()}")
    record = records[index]
    replies = (record.chosen is not None) + (record.rejected is not None)
    encoded = encode([record], tokenizer, replies, limits)
    heldout: list[TextRecord] = []
    if division.eval_split:
        heldout, _ = load(division.path, division.eval_split, tokenizer, reading=division.reading)
    share = share_of(record, division, {other.first_turn for other in heldout})
    return f"{account.text()}\n{describe(record, encoded, tokenizer, share)}"


def define() -> None:
    config_flags.DEFINE_config_file("config", None, "Config whose data and model settings the other flags override.")
    flags.DEFINE_string("data_path", None, "File, folder, tfds:name or hub name. Default: config.data.path.")
    flags.DEFINE_string("source", "", "A name of config.data.sources; empty: the run's own data.")
    flags.DEFINE_string("tokenizer", None, "Tokenizer folder. Default: config.model.path.")
    flags.DEFINE_string("split", "train", "Split to read; all: all splits.")
    flags.DEFINE_integer("index", 0, "Number of the record among those that are kept, from 0.")
    flags.DEFINE_integer(
        "max_length", None, "Largest length of a row in tokens. Default: config.data.max_length, or 512."
    )
    flags.DEFINE_integer(
        "max_response", None, "Largest length of one reply in tokens. Default: config.data.max_response, or 192."
    )
    flags.DEFINE_bool("settings", False, "Print the reference of all settings instead of a record, as Markdown.")
    flags.DEFINE_bool("schema", False, "Print the JSON schemas of all settings instead of a record, for editors.")


def work() -> None:
    given = flags.FLAGS
    if given.settings or given.schema:
        print(command.settings_page() if given.settings else command.schemas())
        return
    path, folder = given.data_path, given.tokenizer
    limits, division, end_of_turn = Limits(512, 192), Division(path or ""), ""
    if given.config is not None:
        for section, value in (("data", path), ("model", folder)):
            if value:
                given.config[section] = given.config.get(section, {})
                given.config[section].path = value
        config = main.read(given.config)
        data, folder = config.data, config.model.path
        limits = Limits(data.max_length, data.max_response, data.max_prompt or None, data.too_long)
        if given.source and given.source not in data.sources:
            raise InputError(f"--source: no source {given.source!r}{nearest(given.source, data.sources)}")
        division = jobs.data_division(data, given.source)
        source = data.sources[given.source] if given.source else data
        path, end_of_turn = source.path, source.end_of_turn
    if not path or not folder:
        raise InputError("no data path or tokenizer: give --config, or --data_path and --tokenizer")
    changes = {name: value for name in ("max_length", "max_response") if (value := given[name].value) is not None}
    division = dataclasses.replace(division, path=path)
    with of_source(given.source):
        told = look(division, folder, given.split, given.index, dataclasses.replace(limits, **changes), end_of_turn)
    print(told)


def run() -> None:
    command.start(define, work)


if __name__ == "__main__":
    run()
