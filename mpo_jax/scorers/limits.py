"""How scorers outside the device are asked: a run's settings, all operational."""

from typing import Annotated

import annotated_types

from mpo_jax.settings import Count, Positive, Section, setting


class Limits(Section):
    """How scorers outside the device are asked: Python functions and servers."""

    batch: Count = setting(64, "replies scored in one call", unit="replies", operational=True)
    seconds: Positive = setting(
        60.0, "longest time of a call, and of a function's import", unit="seconds", operational=True
    )
    concurrency: Annotated[int, annotated_types.Interval(ge=1, le=1024)] = setting(
        8, "number of calls to a server at a time", operational=True
    )
    attempts: Count = setting(5, "number of attempts at a call to a server before the stage stops", operational=True)
    backoff: Positive = setting(
        0.5,
        "pause before the second attempt at a call; each further pause is twice as long",
        unit="seconds",
        operational=True,
    )
    token_variable: str = setting(
        "MPO_SCORER_TOKEN",
        "environment variable whose value is sent to servers as a bearer token, if it is set",
        operational=True,
    )
