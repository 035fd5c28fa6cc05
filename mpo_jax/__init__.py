"""Mixed Preference Optimization (Gou & Nguyen 2024, arXiv 2403.19443) in JAX and Flax."""

__version__ = "0.1.0"
