"""HH-RLHF or TL;DR files enter; a TFDS dataset of ArrayRecord shards leaves, prepared once and read without TensorFlow.

The rows keep their source's own columns, so shards and files give the same records and the same report of drops.
`python -m mpo_jax.data.tfds_builder --source=FOLDER --kind=hh|comparisons|posts --data_dir=OUT`
"""

import sys

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from etils import epath

from mpo_jax.data import sources
from mpo_jax.errors import InputError

_TEXT = tfds.features.Text
FEATURES = {
    "hh": lambda: {"chosen": _TEXT(), "rejected": _TEXT()},
    "comparisons": lambda: {
        "info": {name: _TEXT() for name in ("id", "subreddit", "title", "post", "site", "article")},
        "summaries": tfds.features.Sequence({"text": _TEXT(), "policy": _TEXT()}),
        "choice": np.int32,
        "split": _TEXT(),
        "extra": {"confidence": np.int32},
    },
    "posts": lambda: {name: _TEXT() for name in ("id", "subreddit", "title", "post", "summary")},
}
SCHEMA = {"hh": "hh", "comparisons": "tldr_comparison", "posts": "tldr_post"}


class Preferences(tfds.core.GeneratorBasedBuilder):
    """The files of `source` as shards, a split for each that the source has."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: str, kind: str, **kwargs):
        if kind not in FEATURES:
            raise InputError(f"kind {kind!r}: expected one of {', '.join(FEATURES)}")
        self.name = f"preferences_{kind}"
        self._source, self._kind = source, kind
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(FEATURES[self._kind]())
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)  # order gives the ids

    def _split_generators(self, dl_manager):
        parts = sources.parts(self._source)
        names = sorted({split for part in parts for split in _splits(part)})
        return {name: self._generate_examples(parts, name) for name in names}

    def _generate_examples(self, parts, split):
        number = 0
        for part in parts:
            for row in part.rows():
                if sources.split_of(part, row) == split:
                    sources.expect_schema(row, SCHEMA[self._kind])
                    yield number, _fill(self._kind, row)
                    number += 1


def prepare(source: str, kind: str, data_dir: str) -> epath.Path:
    """Writes the shards, unless `data_dir` has them; returns their folder, which `sources.load` takes as a path.

    kind: "hh" (chosen and rejected dialogues), "comparisons" or "posts" (TL;DR). Raises InputError as `load` does.
    """
    builder = Preferences(source=source, kind=kind, data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return epath.Path(builder.data_path)


def _splits(part: sources.Part) -> set[str]:
    return {sources.split_of(part, row) for row in part.rows()}


def _fill(kind: str, row) -> dict:
    """The columns of a row that the shards keep. TFDS has no null: an empty text and -1 stand for it."""
    if kind == "hh":
        return {key: row.get(key) for key in ("chosen", "rejected")}
    if kind == "posts":
        row_text = {key: str(row.values.get(key) or "") for key in ("id", "subreddit", "title")}
        return {**row_text, "post": row.get("post"), "summary": row.get("summary")}
    confidence = row.get("extra.confidence", int, optional=True)
    return {
        "info": {key: str(row.get("info", dict).get(key) or "") for key in FEATURES[kind]()["info"]},
        "summaries": [{"text": s["text"], "policy": str(s.get("policy") or "")} for s in row.get("summaries", list)],
        "choice": row.get("choice", int),
        "split": str(row.values.get("split") or ""),
        "extra": {"confidence": -1 if confidence is None else confidence},
    }


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        folder = prepare(_SOURCE.value, _KIND.value, _DATA_DIR.value)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"shards in {folder}")


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "File, folder or hub name to read.", required=True)
    _KIND = flags.DEFINE_enum("kind", None, list(FEATURES), "Kind of the rows.", required=True)
    _DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder to which the shards are written.", required=True)
    app.run(main)
