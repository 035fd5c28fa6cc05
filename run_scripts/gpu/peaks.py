"""A device enters; what it can do at most leaves: products of bfloat16 a second, bytes through its memory a second.

Both as XLA programs, on random numbers, the median of several runs; the figures that shares are told of.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

SIZES = {"gpu": (8192, 1 << 31), "cpu": (512, 1 << 24)}  # side of the matrices, bytes of the array


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    given.json.write_text(json.dumps(measured()))
    return 0


def measured() -> dict[str, float]:
    """flops: of a bfloat16 product. bandwidth: bytes read and written a second by a copy. limit: bytes that a program
    may use."""
    side, size = SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(lambda a, b: jax.lax.dot(a, b))
    seconds = timed(lambda: product(a, b))
    array = jax.random.bits(jax.random.key(2), (size // 4,), jnp.uint32)
    copy = jax.jit(lambda x: x + jnp.uint32(1))
    copied = timed(lambda: copy(array))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return {
        "flops": 2.0 * side**3 / seconds,
        "bandwidth": 2.0 * size / copied,
        "side": side,
        "bytes": size,
        "limit": limit,
    }


def timed(call, calls: int = 10, runs: int = 5) -> float:
    """Seconds of one call, of several queued one behind the other."""
    jax.block_until_ready(call())
    samples = []
    for _ in range(runs):
        began = time.perf_counter()
        found = None
        for _ in range(calls):
            found = call()
        jax.block_until_ready(found)
        samples.append((time.perf_counter() - began) / calls)
    return statistics.median(samples)


if __name__ == "__main__":
    sys.exit(main())
