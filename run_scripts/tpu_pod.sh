#!/usr/bin/env bash
# A run on a Cloud TPU slice: the slice is created, the package installed on every host, the run started, and, after a
# preemption, the slice made again and the run resumed. Needs gcloud, logged in. See docs/pods.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/tpu_pod.sh [--dry_run] COMMAND

  create    the slice (a queued resource; waits until it is there)
  install   this checkout and its packages on every host, and the bucket mounted there
  run       the run, on every host at once; ends when it ends
  watch     create, install and run; after a preemption the slice is made again and the run goes on, until it is done
  logs      what process 0 said last
  delete    the slice

Settings, as environment variables (defaults in brackets):
  NAME [mpo]  PROJECT, ZONE [gcloud's own]  TYPE [v5litepod-32]  RUNTIME [v2-alpha-tpuv5-lite]  SPOT [1: may be preempted]
  BUCKET      its name: the workdir is /mnt/BUCKET/NAME on every host (gcsfuse)
  CONFIG [configs/tldr.py]  FLAGS [more flags of mpo_jax.main, as --config.model.path=...]  ATTEMPTS [20, of watch]

--dry_run prints the commands instead of running them. Plan first: python -m mpo_jax.plan --topology=v5e:4x8 ...
TEXT
}

dry_run=0
command=""
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    create | install | run | watch | logs | delete) command=$argument ;;
    *) echo "error: unknown argument '$argument'; see --help" >&2; exit 1 ;;
  esac
done
if [[ -z "$command" ]]; then
  usage >&2
  exit 1
fi

NAME=${NAME:-mpo}
TYPE=${TYPE:-v5litepod-32}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1}
CONFIG=${CONFIG:-configs/tldr.py}
FLAGS=${FLAGS:-}
ATTEMPTS=${ATTEMPTS:-20}
where=()
[[ -n "${PROJECT:-}" ]] && where+=("--project=$PROJECT")
[[ -n "${ZONE:-}" ]] && where+=("--zone=$ZONE")
readonly PREEMPTED=75 # the exit code of a run that was told to stop and saved

need_bucket() {
  if [[ -z "${BUCKET:-}" ]]; then
    echo "error: BUCKET: not set; give the name of a Cloud Storage bucket for the run's folder" >&2
    exit 1
  fi
}

# Runs a command, or prints it so that it can be pasted.
do_() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on_all_hosts() {
  do_ gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

create() {
  local spot=()
  ((SPOT)) && spot=(--spot)
  do_ gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${spot[@]}"
  ((dry_run)) && return
  until [[ "$(state)" == ACTIVE ]]; do
    case "$(state)" in
      FAILED | SUSPENDED) echo "error: the slice is $(state); delete it, and try another ZONE or TYPE" >&2; return 1 ;;
    esac
    sleep 30
  done
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null ||
    echo NONE
}

install() {
  need_bucket
  local archive
  archive=$(mktemp -t mpo_jax.XXXXXX)
  do_ git archive --format=tar.gz --output="$archive" HEAD
  do_ gcloud compute tpus tpu-vm scp "$archive" "$NAME:mpo_jax.tar.gz" "${where[@]}" --worker=all
  rm -f "$archive"
  on_all_hosts "set -e; mkdir -p mpo_jax; tar xzf mpo_jax.tar.gz -C mpo_jax; cd mpo_jax
python3 -m venv .venv; .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'
command -v gcsfuse || { export GCSFUSE_REPO=gcsfuse-\$(lsb_release -c -s)
echo \"deb https://packages.cloud.google.com/apt \$GCSFUSE_REPO main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc
sudo apt-get update -q; sudo apt-get install -q -y gcsfuse; }
sudo mkdir -p /mnt/$BUCKET; mountpoint -q /mnt/$BUCKET ||
sudo gcsfuse -o allow_other --implicit-dirs --uid \$(id -u) --gid \$(id -g) $BUCKET /mnt/$BUCKET"
}

# The same command on every host: each learns from the platform who the others are. Starting it again goes on.
run() {
  need_bucket
  on_all_hosts "cd mpo_jax && .venv/bin/python -m mpo_jax.main --distributed --config=$CONFIG \
--workdir=/mnt/$BUCKET/$NAME $FLAGS 2>&1 | tee -a run.log; exit \${PIPESTATUS[0]}"
}

watch() {
  local attempt code
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    code=0
    if ((dry_run)) || [[ "$(state)" != ACTIVE ]]; then
      ((dry_run)) || delete || true
      create
      install
    fi
    run || code=$?
    if ((code == 0)); then
      return 0
    fi
    if ((code != PREEMPTED)) && [[ "$(state)" == ACTIVE ]]; then
      echo "error: the run failed with code $code on a slice that is up; see 'logs'" >&2
      return "$code"
    fi
    echo "stopped (attempt $attempt of $ATTEMPTS); the slice is $(state)" >&2
  done
  echo "error: not done after $ATTEMPTS attempts" >&2
  return 1
}

logs() {
  do_ gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 --command="tail -n 40 mpo_jax/run.log"
}

delete() {
  do_ gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

"$command"
