"""A traced program enters; the floating-point operations of its matrix products leave.

Counted on the jaxpr: every loop as often as it runs, the longer branch of a condition. Products that nothing reads are
left out, as compilers drop them. With or without what a backward pass computes again, which JAX marks by a name.
"""

import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from mpo_jax.ops.product import RECOMPUTED


def flops(jaxpr: core.ClosedJaxpr, loops: tuple[int, int] = (1, 1)) -> int:
    """2 x multiplications of all products, over all devices. loops: iterations of while loops (data decides them), of
    innermost ones and of those around them."""
    return _count(_read(jaxpr), loops, needed=False)


def needed(jaxpr: core.ClosedJaxpr, loops: tuple[int, int] = (1, 1)) -> int:
    """As `flops`, without what the backward pass computes again, by remat or of its own: the model FLOPs of an MFU
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Inside of a Pallas kernel all counts."""
    return _count(_read(jaxpr), loops, needed=True)


def _read(jaxpr: core.ClosedJaxpr) -> Any:
    """Without equations whose results nothing reads: under adapters, those of the output matrix's gradient."""
    return partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[0]


def _count(jaxpr: Any, loops: tuple[int, int], needed: bool) -> int:
    return sum(
        _equation(equation, loops, needed)
        for equation in jaxpr.eqns
        if not (needed and RECOMPUTED in str(equation.source_info.name_stack))
    )


def _loops(jaxpr: Any) -> bool:
    """Whether there is a while loop in it."""
    inside = (each for equation in jaxpr.eqns for each in _jaxprs(equation.params))
    return any(equation.primitive.name == "while" for equation in jaxpr.eqns) or any(map(_loops, inside))


def _equation(equation: Any, loops: tuple[int, int], needed: bool) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    inside = [_count(each, loops, needed) for each in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "while":
        return loops[_loops(params["body_jaxpr"].jaxpr)] * sum(inside)
    if name == "cond":
        return max(inside, default=0)
    if name == "shard_map":
        return params["mesh"].size * sum(inside)
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int)) * sum(inside)
    return sum(inside)


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found
