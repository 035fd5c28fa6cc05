#!/usr/bin/env bash
# The quickstart once for each of SEEDS (0 1 2), each in runs/seedN; then one report over them, runs/seeds.html, and the
# README's table in Markdown. Arguments go to every run; what is finished is not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=()
for seed in ${SEEDS:-0 1 2}; do
  bash run_scripts/quickstart.sh --config.seed="$seed" --workdir="runs/seed$seed" "$@"
  runs+=("runs/seed$seed")
done
if [ "${#runs[@]}" -gt 1 ]; then
  JAX_PLATFORMS=cpu .venv/bin/python -m mpo_jax.render "${runs[@]}" --output=runs/seeds.html
fi
JAX_PLATFORMS=cpu .venv/bin/python -m mpo_jax.render "${runs[@]}" --markdown
