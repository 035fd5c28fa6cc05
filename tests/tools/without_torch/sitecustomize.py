"""Python starts; torch is not to be had. First on PYTHONPATH, it does so in the processes that tests start.

torch is there for the parity tests alone; where transformers finds it, a tokenizer imports it, which takes seconds.
"""

import importlib.util
import sys


class _WithoutTorch:
    """A finder that knows of no torch: `import torch` fails."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch': tests start their processes without", name=name)


_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else _find(name, package)
sys.meta_path.insert(0, _WithoutTorch)
