#!/usr/bin/env bash
# The whole of MPO on one GPU: a small model, or adapters on a large one that is frozen in bfloat16.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/single_gpu.sh [--dry_run] WORKDIR [more flags of mpo_jax.main]

Runs configs/tldr.py:debug with pythia-1b, or what CONFIG and MODEL (a folder or hub id) say; RANK [16] is that of the
adapters, 0 trains all weights. MEMORY [80] GB of the GPU (24, 40, 80 or 141) are first held against a plan by
arithmetic. --dry_run prints the commands.
TEXT
}

dry_run=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done
if ((${#arguments[@]} == 0)); then
  usage >&2
  exit 1
fi

cd "$(dirname "$0")/.."
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
settings=(--config="${CONFIG:-configs/tldr.py:debug,pythia-1b}" --config.model.lora.rank="${RANK:-16}")
settings+=(--config.model.remat=full)
[[ -n "${MODEL:-}" ]] && settings+=(--config.model.path="$MODEL")
plan=("$python" -m mpo_jax.plan "${settings[@]}" --topology="gpu:${MEMORY:-80}GB")
run=("$python" -m mpo_jax.main "${settings[@]}" --workdir="${arguments[0]}" "${arguments[@]:1}")

if ((dry_run)); then
  printf '%q ' "${plan[@]}"
  printf '\n'
  printf '%q ' "${run[@]}"
  printf '\n'
  exit 0
fi
JAX_PLATFORMS=cpu "${plan[@]}"
"${run[@]}"
