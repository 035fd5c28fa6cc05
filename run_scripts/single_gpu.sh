#!/usr/bin/env bash
# The whole of MPO on one GPU: a small model, or adapters on a large one that is frozen in bfloat16.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/single_gpu.sh [--dry_run] WORKDIR [more flags of mpo_jax.main]

Runs configs/tldr.py:debug with pythia-1b, or what CONFIG and MODEL (a folder or hub id) say. Before anything runs, the
plan's arithmetic is asked, from the widest to the narrowest, what fits MEMORY GB of a GPU (16, 24, 40, 48, 80 or 141;
without it the card is asked): all weights trained, then with remat, then LoRA adapters, then those with remat. RANK (0
trains all weights) and REMAT (none, dots or full) fix what they name. --dry_run prints the commands.
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
if [[ "${arguments[0]}" == -* ]]; then
  echo "error: expected WORKDIR before other flags; found ${arguments[0]}" >&2
  exit 1
fi
if [[ ! "${RANK:-0}" =~ ^[0-9]+$ ]]; then
  echo "error: RANK: '$RANK'; expected a whole number, 0 to train all weights" >&2
  exit 1
fi
# The plan is for one card: the first that is visible, and the run sees no other.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
card="${CUDA_VISIBLE_DEVICES:-0}"
export CUDA_VISIBLE_DEVICES="${card%%,*}"
[[ "${arguments[0]}" == /* || "${arguments[0]}" == *://* ]] || arguments[0]="$PWD/${arguments[0]}"

cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[[ -z "${PYTHON:-}" && -x .venv/bin/python ]] && python=.venv/bin/python
model=()
[[ -n "${MODEL:-}" ]] && model=(--config.model.path="$MODEL")
overrides=()
for argument in "${arguments[@]:1}"; do
  case "$argument" in
    --config.*=* | --stages=*) overrides+=("$argument") ;;
    --config.* | --stages)
      echo "error: write $argument=VALUE, so that the plan reads it too" >&2
      exit 1
      ;;
  esac
done

# The largest size that the plan knows and the card is not below, in GB as cards are sold.
memory() {
  if [[ -n "${MEMORY:-}" ]]; then
    echo "$MEMORY"
    return
  fi
  local mib size found=""
  mib="$(nvidia-smi -i "$CUDA_VISIBLE_DEVICES" --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null)" || true
  if [[ ! "$mib" =~ ^[0-9]+$ ]]; then
    echo "error: nvidia-smi tells no GPU's memory; set MEMORY, in GB" >&2
    return 1
  fi
  for size in 16 24 40 48 80 141; do
    if ((mib >= size * 940)); then found=$size; fi
  done
  if [[ -z "$found" ]]; then
    echo "error: a GPU of $mib MiB; the plan begins at 16 GB" >&2
    return 1
  fi
  echo "$found"
}

candidates=()
for rank in ${RANK:-0 16}; do
  for remat in ${REMAT:-none full}; do
    candidates+=("$rank $remat")
  done
done

size="$(memory)"
for candidate in "${candidates[@]}"; do
  read -r rank remat <<<"$candidate"
  # Adapters need larger learning rates than whole weights; a config of one's own says its own.
  config="${CONFIG:-configs/tldr.py:debug,pythia-1b$( ((rank == 0)) || echo ,lora)}"
  settings=(--config="$config" "${model[@]}" --config.model.lora.rank="$rank" --config.model.remat="$remat")
  plan=("$python" -m mpo_jax.plan "${settings[@]}" "${overrides[@]}" --needed --topology="gpu:${size}GB" --nopropose)
  run=("$python" -m mpo_jax.main "${settings[@]}" --workdir="${arguments[0]}" "${arguments[@]:1}")
  if ((dry_run)); then
    printf '%q ' "${plan[@]}"
    printf '\n'
    printf '%q ' "${run[@]}"
    printf '\n'
    exit 0
  fi
  what="all weights"
  ((rank > 0)) && what="LoRA adapters of rank $rank"
  status=0
  told="$(JAX_PLATFORMS=cpu "${plan[@]}" 2>&1)" || status=$?
  case $status in
    0)
      echo "fits a GPU of $size GB: training $what, remat $remat"
      echo "$told"
      exec "${run[@]}"
      ;;
    2) echo "does not fit a GPU of $size GB: training $what, remat $remat" >&2 ;;
    *)
      echo "$told" >&2
      exit "$status"
      ;;
  esac
done
echo "error: nothing that was tried fits; take a smaller model, or a smaller batch_size or microbatch" >&2
exit 2
