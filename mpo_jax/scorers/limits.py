"""How scorers outside the device are asked: a run's settings, all operational."""

from typing import Annotated

import annotated_types

from mpo_jax.settings import Count, Positive, Section, setting


class Limits(Section):
    """How scorers outside the device are asked: Python functions and servers."""

    batch: Count = setting(64, "replies scored in one call", unit="replies", operational=True)
    seconds: Positive = setting(60.0, "that a call may take, or a function's import", unit="seconds", operational=True)
    concurrency: Annotated[int, annotated_types.Interval(ge=1, le=1024)] = setting(
        8, "calls of a server at a time", operational=True
    )
    attempts: Count = setting(5, "at a call of a server, before the stage stops", operational=True)
    backoff: Positive = setting(
        0.5, "before the second attempt at a call, doubled from there", unit="seconds", operational=True
    )
    token_variable: str = setting(
        "MPO_SCORER_TOKEN",
        "environment variable whose value is sent as bearer token, where it is set",
        operational=True,
    )
