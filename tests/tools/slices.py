"""The command line of `mpo_jax.main` enters; it runs with each process's CPU devices as one TPU slice, the last
process's as the first, and says which processes the rows of `data` lie in."""

import numpy as np

from mpo_jax import sharding
from tests.tools import main


class OfSlice:
    """A CPU device, which is of slice 0 in every process, as one of its process's slice."""

    def __init__(self, device):
        self.device, self.slice_index = device, -device.process_index

    def __getattr__(self, name):
        return getattr(self.device, name)


def laid_out(sizes, devices) -> np.ndarray:
    found = over_slices(sizes, [OfSlice(device) for device in devices])
    print("processes of data:", [sorted({each.process_index for each in row.flat}) for row in found], flush=True)
    return np.vectorize(lambda each: each.device, otypes=[object])(found)


over_slices, sharding.over_slices = sharding.over_slices, laid_out
sharding.slices = lambda devices: len({device.process_index for device in devices})

if __name__ == "__main__":
    main.main.run()
