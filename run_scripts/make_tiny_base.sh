#!/usr/bin/env bash
# Makes the embedded base model of the quickstart anew: make_tiny_base.sh TEACHER_FOLDER [OUTPUT] [SCRATCH]
# At most 60 minutes on 2 cores; seeded, so that the same teacher and package versions give the same model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  exit $(($# < 1))
fi
teacher="$1" output="${2:-mpo_jax/assets/tiny_stories}" scratch="${3:-runs/tiny_base}"
if [[ -e $output/model.safetensors ]]; then
  echo "error: $output holds a model already; remove it or name another folder" >&2
  exit 1
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1
python="${PYTHON:-.venv/bin/python}"
step() { "$python" run_scripts/make_tiny_base.py "$@" --folder="$scratch" --teacher="$teacher"; }
[[ -e $scratch/init/config.json ]] || { step stories && step begin; }
"$python" -m mpo_jax.main --config=configs/tiny_base.py --workdir="$scratch/run" \
  --config.model.path="$scratch/init" --config.data.path="$scratch/train.jsonl.gz"
step finish --stage="$(ls -d "$scratch"/run/sft-*)" --output="$output"
