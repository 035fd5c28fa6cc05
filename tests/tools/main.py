"""The command line of `mpo_jax.main` enters; it runs as where torch is not installed, which starts seconds sooner.

See `without_torch/sitecustomize.py`, which pytest's own children have on PYTHONPATH.
"""

from tests.tools.without_torch import sitecustomize  # noqa: F401, I001 - before the package

from mpo_jax import main

if __name__ == "__main__":
    main.run()
