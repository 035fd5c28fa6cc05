"""The package, with the configs beside it as `mpo_jax/configs`; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mpo_jax*"]), "mpo_jax.configs"],
    package_dir={"mpo_jax.configs": "configs"},
)
