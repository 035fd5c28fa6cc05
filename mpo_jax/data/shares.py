"""A run's data settings and the name of a share enter; the share's records leave, with the account of what was read."""

import dataclasses
from collections.abc import Collection, Mapping

from mpo_jax.data import division, sources
from mpo_jax.data.account import Account
from mpo_jax.data.division import EVAL, REPORT, SELECT
from mpo_jax.data.parts import canonical
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Division:
    """Where records are and how they are divided. path, split, limit, reading: see `sources.load`. eval_split: the
    split that is held out; "" for the `eval` share of `split`. fractions: share → part."""

    path: str
    split: str = "train"
    eval_split: str = ""
    fractions: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(division.SHARES))
    limit: int | None = None
    reading: Reading | None = None

    def of_training(self) -> dict[str, float]:
        """The parts that `split` itself is divided into: all but `eval`, where that has a split of its own."""
        if not self.eval_split:
            return dict(self.fractions)
        kept = {name: part for name, part in self.fractions.items() if name != EVAL}
        if sum(kept.values()) <= 0:
            raise InputError(
                f"data.shares {dict(self.fractions)}: nothing is left beside {EVAL!r}; expected parts above 0"
            )
        return {name: part / sum(kept.values()) for name, part in kept.items()}


_HELDOUT = {EVAL: 1.0}
"""How a split is divided that is held out whole."""


def share_of(record: TextRecord, data: Division, heldout: Collection[str] = ()) -> str:
    """The share that a run with these settings takes a record of `split` or `eval_split` for. heldout: first turns of
    the held-out split; "" for a record that none takes, since it begins as one of those does."""
    if data.eval_split and record.split == canonical(data.eval_split, {record.split}):
        return division.share_or_half(record.first_turn, _HELDOUT)
    return "" if record.first_turn in heldout else division.share_or_half(record.first_turn, data.of_training())


def names(data: Division) -> list[str]:
    """The shares that a run with these settings has."""
    fractions = {name: part for name, part in data.of_training().items() if part > 0}
    return division.names(fractions | (_HELDOUT if data.eval_split else {}))


def read_share(data: Division, share: str, tokenizer=None) -> tuple[list[TextRecord], Account]:
    """The records of a share, or of one half of what is held out ("select", "report"), as `division.select` names them.

    With a held-out split, training shares lose the records whose conversations begin as one that is held out does; the
    account counts them. InputError as `sources.load` and `division.select` have, and where none is left beside those.
    """
    heldout: list[TextRecord] = []
    if data.eval_split:
        heldout, account = sources.load(data.path, data.eval_split, tokenizer, data.limit, data.reading)
        if share in (SELECT, REPORT):
            chosen = division.select(heldout, share, _HELDOUT)
            return chosen, account.of_share(share, len(chosen))
    records, account = sources.load(data.path, data.split, tokenizer, data.limit, data.reading)
    kept = division.without(records, heldout)
    if not kept:
        raise InputError(
            f"{data.path}: every prompt of split {data.split!r} is in split {data.eval_split!r} too, which is held "
            "out; expected splits without prompts in common, or data.eval_split='' and an 'eval' share"
        )
    chosen = division.select(kept, share, data.of_training())
    return chosen, account.of_share(share, len(chosen), len(records) - len(kept))
