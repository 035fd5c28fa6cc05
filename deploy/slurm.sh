#!/usr/bin/env bash
#SBATCH --job-name=mpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# A run under SLURM, one task a node. Called by hand, it installs a commit in the shared file system and submits itself;
# called by SLURM, it runs. What was stopped and saved is queued again, and goes on.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: WORKDIR=/shared/runs/tldr [CONFIG=configs/tldr.py] bash deploy/slurm.sh [SBATCH_FLAGS] [-- FLAGS of mpo_jax.main]

  WORKDIR   the run's folder, on a file system that all nodes share
  CONFIG    [configs/tldr.py]
  COMMIT    [HEAD] what runs; what is not committed does not. It is unpacked and installed beside WORKDIR, so that a job
            that is queued again runs what was submitted
  EXTRA     [cuda] of the package: cuda, cuda12
  RESTARTS  [50] at most; then the job fails
HF_TOKEN goes to the nodes by the submitting environment. 120 seconds before the time limit, and at a preemption, the run is
told to stop: it saves, and the job is queued again. Flags of sbatch override the #SBATCH lines: --nodes=4 --time=12:00:00.
TEXT
}

submit() {
  local root code commit flags=()
  while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == --help || $1 == -h ]]; then
      usage
      return
    fi
    flags+=("$1")
    shift
  done
  if [[ -z ${WORKDIR:-} ]]; then
    echo "error: WORKDIR: not set; give the run's folder on a file system that all nodes share" >&2
    return 1
  fi
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if ! commit=$(git -C "$root" rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}"); then
    echo "error: COMMIT: '${COMMIT:-HEAD}' is no commit of this checkout" >&2
    return 1
  fi
  mkdir -p "$WORKDIR"
  WORKDIR="$(cd "$WORKDIR" && pwd)"
  code="$(dirname "$WORKDIR")/mpo_jax-${commit:0:12}"
  if [[ ! -f $code/COMMIT ]]; then
    mkdir -p "$code"
    git -C "$root" archive "$commit" | tar x -C "$code"
    echo "$commit" >"$code/COMMIT" # last: a folder that has it is whole
  fi
  echo "commit $commit in $code" >&2
  (cd "$code" && bash run_scripts/install.sh ".[${EXTRA:-cuda}]")
  export WORKDIR CODE="$code" COMMIT="$commit" CONFIG="${CONFIG:-configs/tldr.py}" RESTARTS="${RESTARTS:-50}"
  exec sbatch --output="$WORKDIR/slurm-%j.log" "${flags[@]}" "$code/deploy/slurm.sh" "${@:2}"
}

# Signals to the steps, not to srun: that one would kill them.
work() {
  local code=0 steps told=0
  # Before the steps begin: the notice may come while they do.
  trap 'told=1; echo "told to stop; the run saves" >&2; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  srun --kill-on-bad-exit=0 --wait=600 bash "$CODE/run_scripts/host.sh" start "$COMMIT" \
    --distributed --config="$CONFIG" --workdir="$WORKDIR" "$@" &
  steps=$!
  if ((told)); then scancel --signal=TERM "$SLURM_JOB_ID"; fi
  wait "$steps" || code=$?
  while kill -0 "$steps" 2>/dev/null; do # a signal ends `wait`, not the steps
    code=0
    wait "$steps" || code=$?
  done
  case "$code" in
    75 | 143)
      if ((${SLURM_RESTART_COUNT:-0} >= RESTARTS)); then
        echo "error: stopped with code $code, and queued again $RESTARTS times already" >&2
        return "$code"
      fi
      echo "stopped with code $code; queued again" >&2
      scontrol requeue "$SLURM_JOB_ID"
      ;;
  esac
  return "$code"
}

if [[ -n ${SLURM_JOB_ID:-} && -n ${CODE:-} ]]; then
  work "$@"
else
  submit "$@"
fi
