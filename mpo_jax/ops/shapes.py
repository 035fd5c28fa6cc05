"""Takes arrays and what they should be, such as "f32[B,2]"; gives the sizes of the letters, or a ValueError.

Shapes and dtypes are known while tracing, so that the check costs nothing at run time.
"""

import re

import jax

_DTYPES = {"f32": "float32", "i32": "int32", "bool": "bool"}


def check(pattern: str, **arrays: jax.Array | None) -> dict[str, int]:
    """Arrays in the order of the pattern's parts: `check("f32[B,2] f32[B]", scores=scores, weight=weight)`.

    A letter stands for one size in all arrays, a digit for itself, `f32[...]` for any shape that all parts written so
    share. None passes. Scores in an integer buffer, which would round them, are refused like a wrong shape.
    Raises ValueError that names the array, what was found and what was expected.
    """
    parts = pattern.split()
    if len(parts) != len(arrays):
        raise ValueError(f"pattern {pattern!r} describes {len(parts)} arrays, {len(arrays)} given")
    sizes: dict[str, int] = {}
    common: tuple[int, ...] | None = None
    for part, (name, array) in zip(parts, arrays.items(), strict=True):
        if array is None:
            continue
        match = re.fullmatch(r"(\w+)\[(.*)\]", part)
        if match is None:
            raise ValueError(f"pattern part {part!r} is not like f32[B,N]")
        dtype, letters = match[1], match[2]
        found = f"{name} is {array.dtype}{list(array.shape)}"
        if array.dtype != _DTYPES[dtype]:
            raise ValueError(f"{found}; expected dtype {_DTYPES[dtype]}")
        if letters == "...":
            common = array.shape if common is None else common
            if array.shape != common:
                raise ValueError(f"{found}; expected the shape of the others, {list(common)}")
            continue
        dims = letters.split(",") if letters else []
        bound = dict(sizes)
        fits = len(dims) == len(array.shape) and all(
            have == (int(dim) if dim.isdigit() else bound.setdefault(dim, have))
            for dim, have in zip(dims, array.shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{dim} = {sizes[dim]}" for dim in dict.fromkeys(dims) if dim in sizes)
            raise ValueError(f"{found}; expected [{letters}]" + (f" with {known}" if known else ""))
        sizes = bound
    return sizes
