#!/usr/bin/env bash
# A finished stage as a Hugging Face folder, read again and compared.
# usage: bash run_scripts/export_hf.sh WORKDIR/mpo FOLDER [--adapter]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash run_scripts/export_hf.sh WORKDIR/STAGE FOLDER [--adapter]" >&2
  exit 1
fi
exec python -m mpo_jax.export --stage="$1" --output="$2" --verify "${@:3}"
