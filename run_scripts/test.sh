#!/usr/bin/env bash
# Makes .venv, installs the package with its test extra, runs the tests; arguments go to pytest: test.sh -m slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_scripts/install.sh
install '.[test]'
export HF_HUB_OFFLINE=1 JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m pytest "$@"
