"""A Hugging Face folder enters; it is imported onto 8 virtual devices, and the peak of resident memory leaves, JSON.

    python tests/tools/import_memory.py FOLDER [--fsdp 4 --tensor 2]

`baseline` is the same memory before the import (Python, JAX and its libraries), `bytes` the parameters' in f32.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax


def unmapped() -> int:
    """RssAnon + RssShmem of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)

    from mpo_jax.models import config, hf
    from mpo_jax.sharding import make_mesh

    mesh = make_mesh(-1, arguments.fsdp, arguments.tensor)
    model = config.from_folder(arguments.folder).for_mesh(mesh)
    jax.block_until_ready(jax.device_put(0.0))
    baseline = peak = unmapped()
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, unmapped())

    sampler = threading.Thread(target=sample)
    sampler.start()
    begun = time.monotonic()
    weights = jax.block_until_ready(hf.import_weights(arguments.folder, model, mesh))
    seconds = time.monotonic() - begun
    done.set()
    sampler.join()
    peak = max(peak, unmapped())
    size = sum(leaf.size for leaf in jax.tree.leaves(weights)) * 4
    print(json.dumps({"bytes": size, "peak": peak, "baseline": baseline, "ratio": peak / size, "seconds": seconds}))


if __name__ == "__main__":
    main()
