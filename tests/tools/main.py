"""The command line of `mpo_jax.main` enters; it runs as where torch is not installed, which starts seconds sooner.

torch is there for the parity tests alone; where transformers finds it, a tokenizer imports it.
"""

import importlib.util

_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else _find(name, package)

from mpo_jax import main  # noqa: E402 - after the change

if __name__ == "__main__":
    main.run()
