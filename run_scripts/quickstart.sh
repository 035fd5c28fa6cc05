#!/usr/bin/env bash
# The whole of MPO on a bare machine: no network but a package index, no GPU. Makes .venv, installs the package, runs
# configs/quickstart.py in runs/quickstart; arguments go to the run: quickstart.sh --stages=dpo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_scripts/install.sh
install .
export HF_HUB_OFFLINE=1 JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m mpo_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
