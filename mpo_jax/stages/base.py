"""What a kind of stage declares of itself enters; the graph, the pipeline, the plan, the report and the command lines
read it from here.

A kind is one `Stage`, in a file of its own. Nothing outside that file names the kind.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import annotated_types
import pydantic

from mpo_jax import settings
from mpo_jax.evaluation.sections import Shown
from mpo_jax.optim import Optimizer
from mpo_jax.run import Remat, StageSettings
from mpo_jax.settings import Amount, Count, OneOrWeighted, Role, Whole, setting
from mpo_jax.stages.job import Job
from mpo_jax.stages.nonfinite import CHOICES
from mpo_jax.stages.programs import Call, Programs


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of stage.

    settings: what it can be set to, its roles among that. produces: what its artifact is.
    run: does the work of a job, leaves the artifact's files in the job's folder, returns the summary for the manifest.
    programs: every jitted function that `run` calls, with the shapes it is called with; by `programs.made_once` they
    are the same for `run` as for `calls`.
    check: raises InputError for a job that can't be meant; nothing is loaded, compiled or written.
    rows: (job, pairs of the data, share of them that is easy) -> rows read in an epoch, for the plan's estimates.
    shown: what the report makes of it.
    content: what else enters a stage's key, such as the text of a file of the package that a setting names.
    calls: (job) -> what `run` will call, as far as it can be told before the weights of the policies and reward models
    among the inputs are there; InputError where nothing can. It is compiled while an earlier stage is at work.
    """

    kind: str
    settings: type[StageSettings]
    produces: str
    run: Callable[[Job], dict[str, Any]]
    programs: Callable[[Job], Programs]
    check: Callable[[Job], None]
    rows: Callable[[Job, int, float], float]
    shown: Shown = Shown()  # noqa: RUF009, it is frozen
    content: Callable[[Any], Mapping[str, Any]] = lambda settings: {}
    calls: Callable[[Job], Iterable[Call]] = lambda job: ()

    @property
    def roles(self) -> dict[str, Role]:
        """Setting -> what must be named there."""
        return settings.roles(self.settings)


def rows_of_share(job: Job, pairs: int, easy: float) -> float:
    """`Stage.rows` of a kind that reads the pairs of its setting `share`."""
    return pairs * dict(job.config.data.shares)[job.settings.share]


class Training(StageSettings, Optimizer):
    """What every training has."""

    data: OneOrWeighted = setting(
        "",
        'the data that is learned from: a name of data.sources, or several, mixed by weight ({"a": 0.7, "b": 0.3}); '
        "empty: the run's own data",
    )
    batch_size: Count = setting(16, "rows of a step, over all devices together", unit="rows")
    microbatch: Whole = setting(
        0,
        "rows whose gradients are computed at a time, and then accumulated; 0: all of them at once",
        unit="rows",
        operational=True,
    )
    remat: Literal["", Remat] = setting(
        "", "model.remat for this stage; empty: the value of model.remat", operational=True
    )
    epochs: Annotated[float, annotated_types.Interval(gt=0, le=10_000)] = setting(1.0, "passes over the rows")
    steps: Whole = setting(0, "number of steps; 0: as many as `epochs` gives", unit="steps")
    eval_every: Whole = setting(
        0, "how often held-out rows are evaluated; 0: after every tenth of the steps", unit="steps"
    )
    eval_batches: Count = setting(32, "largest number of held-out batches in an evaluation", unit="batches")
    save_every: Whole = setting(
        0, "how often a checkpoint is saved; 0: after every tenth of the steps", unit="steps", operational=True
    )
    keep: Count = setting(2, "number of latest checkpoints that are kept", operational=True)
    log_every: Count = setting(1, "how often metrics are written", unit="steps", operational=True)
    select: Literal["last", "best"] = setting(
        "last", "the weights that the stage returns: the last, or those of the best evaluation"
    )
    on_nonfinite: Literal[CHOICES] = setting(  # type: ignore[valid-type]
        "stop",
        "what happens if a batch's loss or gradient is not finite: stop the run, or skip the batch",
        operational=True,
    )
    wandb: bool = setting(False, "also log to Weights & Biases, whose package must be installed", operational=True)
    wandb_project: str = setting("mpo_jax", "the project at Weights & Biases", operational=True, min_length=1)
    wandb_entity: str = setting(
        "", "the user or team at Weights & Biases; empty: the account that is logged in", operational=True
    )

    @property
    def update_rows(self) -> int:
        """Rows of one update of the weights."""
        return self.batch_size

    @pydantic.model_validator(mode="after")
    def _microbatches(self):
        if self.microbatch and self.update_rows % self.microbatch:
            name = "batch_size" if self.update_rows == self.batch_size else "the minibatch of"
            raise settings.wrong("microbatch", f"{self.microbatch} rows do not divide {name} {self.update_rows}")
        return self


class PolicyTraining(Training):
    """What every training of a policy has."""

    snapshots: Whole = setting(
        0,
        "number of intermediate weights that are kept, at even distances over the steps; `evaluate` draws curves of "
        "score against KL with them; 0: none",
        later=True,
    )

    def snapshot_steps(self, steps: int) -> list[int]:
        """After which of a training's steps weights are kept, in their order; the last is not among them, since the
        stage leaves those anyway."""
        apart = (round(each * steps / (self.snapshots + 1)) for each in range(1, self.snapshots + 1))
        return [step for step in dict.fromkeys(apart) if 0 < step < steps]


class Sampling(StageSettings):
    """What every stage that samples replies has."""

    data: OneOrWeighted = setting(
        "",
        "the data that is read, each row once: a name of data.sources, or several with weights, of which the largest "
        'means all rows ({"a": 1.0, "b": 0.5}: all of a, half of b); empty: the run\'s own data',
    )
    temperature: Amount = setting(1.0, "sampling temperature; 0: greedy decoding")
    top_k: Whole = setting(
        0, "sample only from this many most probable tokens; 0: from the whole vocabulary", unit="tokens"
    )
    top_p: settings.Share = setting(
        0.0, "sample only from the most probable tokens that together have this probability; 0: from all"
    )
    min_new_tokens: Whole = setting(
        0, "shortest reply: no stop token is sampled before it has this many tokens", unit="tokens"
    )
    max_new_tokens: Count = setting(64, "longest reply, including its stop token", unit="tokens")

    @pydantic.model_validator(mode="after")
    def _draws(self):
        if 0 < self.temperature < 1e-3:
            raise settings.wrong("temperature", f"{self.temperature}; expected 0 (greedy) or a number from 0.001 up")
        if self.min_new_tokens > self.max_new_tokens:
            raise settings.wrong(
                "min_new_tokens", f"{self.min_new_tokens}; expected at most max_new_tokens {self.max_new_tokens}"
            )
        return self
