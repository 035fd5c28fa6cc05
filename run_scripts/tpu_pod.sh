#!/usr/bin/env bash
# A run on Cloud TPU slices: they are created, the package is installed on every host, the run started, and, after a
# preemption, the slices made again and the run resumed. Needs gcloud, logged in. See docs/pods.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/tpu_pod.sh [--dry_run] COMMAND

  create    the slices (a queued resource; waits until they are there)
  install   a commit of this checkout on every host, with a Python and packages of its own, and the Hugging Face token
  run       the run, on every host at once; ends when it ends. If the connection ends, the run does not: `run` follows it
  watch     create, install and run; goes on after preemptions, lost hosts and lost connections, until it is done
  stop      tells the run to save and end (end a `watch` first: it would start it again)
  logs      what process 0 said last
  delete    the slices

Settings, as environment variables (defaults in brackets):
  NAME [mpo]  PROJECT, ZONE [gcloud's own]  TYPE [v5litepod-32]  RUNTIME [v2-alpha-tpuv5-lite]  SPOT [1: may be preempted]
  SLICES [1]  with more, mesh.data is a multiple of it: FLAGS=--config.mesh.data=2
  BUCKET      its name: the workdir is gs://BUCKET/NAME, which every host reads and writes, compiled programs too
  CONFIG [configs/tldr.py]  FLAGS [more flags of mpo_jax.main, as --config.model.path=...]
  COMMIT [HEAD]  what is installed; what is not committed stays here
  HF_TOKEN_FILE  a file with the Hugging Face token; or HF_TOKEN, exported. It goes to the hosts as a file of mode 600
  ATTEMPTS [50]  starts of a `watch`   FAILURES [3]  of them in a row that end in an error, with nothing new in the workdir
  WAIT [240]     minutes that a slice may take to become active; then the request is deleted

Exit codes after which `watch` starts the run again: 75 (told to stop, and saved), 143 or 241 (SIGTERM), 255 (ssh lost), and
any code if the slices are no longer active. Others are errors, and are tried FAILURES times. It waits 30 s before a start,
then twice as long each time, up to 30 minutes, and 30 s again once the run has made progress. docs/pods.md says what a start
costs.
Before it, for several hosts: ssh-add ~/.ssh/google_compute_engine. Plan first: python -m mpo_jax.plan --topology=v5e:4x8 ...
--dry_run prints the commands instead of running them.
TEXT
}

dry_run=0
command=""
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    create | install | run | watch | stop | logs | delete) command=$argument ;;
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
SLICES=${SLICES:-1}
CONFIG=${CONFIG:-configs/tldr.py}
FLAGS=${FLAGS:-}
ATTEMPTS=${ATTEMPTS:-50}
FAILURES=${FAILURES:-3}
WAIT=${WAIT:-240}
for number in SPOT SLICES ATTEMPTS FAILURES WAIT; do
  if [[ ! ${!number} =~ ^[0-9]+$ || ($number != SPOT && ${!number} == 0) ]]; then
    echo "error: $number: '${!number}'; expected a number$([[ $number == SPOT ]] || echo ' above 0')" >&2
    exit 1
  fi
done
export -n HF_TOKEN 2>/dev/null || true # no program that is called here needs to see it
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! commit=$(git rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}"); then
  echo "error: COMMIT: '${COMMIT:-HEAD}' is no commit of this checkout" >&2
  exit 1
fi
folder="mpo_jax-${commit:0:12}"
where=()
[[ -n "${PROJECT:-}" ]] && where+=("--project=$PROJECT")
[[ -n "${ZONE:-}" ]] && where+=("--zone=$ZONE")
resources=(gcloud compute tpus queued-resources)
hosts=("${where[@]}" --node=all --worker=all --batch-size=all)
scratch=$(mktemp -d -t mpo_jax.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

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

on_all_hosts() { do_ "${resources[@]}" ssh "$NAME" "${hosts[@]}" --command="$1"; }

to_all_hosts() { do_ "${resources[@]}" scp "$1" "$NAME:$2" "${hosts[@]}"; }

# ACTIVE, another word of the service, NONE where there is no such resource, UNKNOWN where it can't be asked.
state() {
  local said
  if said=$("${resources[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)' 2>"$scratch/said"); then
    echo "${said:-UNKNOWN}"
  elif grep -qiE 'not[_ ]found' "$scratch/said"; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

# The state, asked again while it can't be, for five minutes.
settled() {
  local found _
  for _ in {1..10}; do
    found=$(state)
    [[ $found != UNKNOWN ]] && break
    sleep 30
  done
  echo "$found"
}

create() {
  local spot=() nodes=(--node-id="$NAME")
  ((SPOT)) && spot=(--spot)
  ((SLICES > 1)) && nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  do_ "${resources[@]}" create "$NAME" "${where[@]}" "${nodes[@]}" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" "${spot[@]}" || return
  ((dry_run)) || become_active
}

become_active() {
  local asked found
  for ((asked = 0; asked < 2 * WAIT; asked++)); do
    found=$(state)
    case "$found" in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | NONE)
        echo "error: the slice is $found; delete it, and try another ZONE or TYPE" >&2
        return 1
        ;;
    esac
    sleep 30
  done
  echo "error: the slice is $found after $WAIT minutes; the request is deleted, so that it costs nothing unseen" >&2
  delete
  return 1
}

install() {
  local archive="$scratch/$folder.tar.gz" sum=SUM
  [[ -z $(git status --porcelain --untracked-files=no) ]] || echo "note: what is not committed stays here" >&2
  echo "commit $commit" >&2
  do_ git archive --format=tar.gz --output="$archive" "$commit" || return
  ((dry_run)) || sum=$(sha256sum <"$archive" | cut -d ' ' -f 1)
  on_all_hosts "install -d -m 700 .mpo" || return
  to_all_hosts "$archive" .mpo/code.tar.gz || return
  token || return
  # COMMIT is written last: a folder that has it is whole.
  on_all_hosts "set -e; echo '$sum  .mpo/code.tar.gz' | sha256sum --check --quiet
[ -f $folder/COMMIT ] || { rm -rf $folder; mkdir $folder; tar xzf .mpo/code.tar.gz -C $folder; echo $commit >$folder/COMMIT; }
bash $folder/run_scripts/install.sh '.[tpu,gcs]'"
}

# The token's file; its folder on the hosts, made before, is closed to others from the beginning.
token() {
  local file="${HF_TOKEN_FILE:-}"
  if [[ -z $file && -n ${HF_TOKEN:-} ]]; then
    file="$scratch/hf_token"
    (umask 077 && printf '%s\n' "$HF_TOKEN" >"$file")
  fi
  [[ -n $file ]] || return 0
  if [[ ! -s $file ]]; then
    echo "error: HF_TOKEN_FILE: $file: no such file, or it is empty" >&2
    return 1
  fi
  to_all_hosts "$file" .mpo/hf_token && on_all_hosts "chmod 600 .mpo/hf_token"
}

# The same command on every host: each learns from the platform who the others are. Starting it again goes on.
run() {
  need_bucket
  local id arguments
  id="$(date +%s)-$$-$RANDOM"
  arguments=$(printf '%q ' --distributed --config="$CONFIG" --workdir="gs://$BUCKET/$NAME")
  on_all_hosts "bash $folder/run_scripts/host.sh run $id $commit $arguments$FLAGS"
}

stop() { on_all_hosts "bash $folder/run_scripts/host.sh stop"; }

logs() {
  do_ "${resources[@]}" ssh "$NAME" "${where[@]}" --node=0 --worker=0 --command="bash $folder/run_scripts/host.sh logs"
}

delete() { do_ "${resources[@]}" delete "$NAME" "${where[@]}" --force --quiet; }

# What the workdir holds, as one number: it changes when the run gets on. Programs and locks are no progress.
progress() {
  { gcloud storage ls "gs://$BUCKET/$NAME/**" 2>/dev/null || true; } | grep -vE '/compiled/|lock' | sort | cksum
}

# Slices that are up, with the commit on every host.
ready() {
  local found
  found=$(settled)
  while [[ $found == DELETING || $found == SUSPENDING ]]; do
    sleep 30
    found=$(settled)
  done
  case "$found" in
    ACTIVE) ;;
    NONE) create || return ;;
    CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES) become_active || return ;;
    UNKNOWN) echo "error: the state of the slice can't be asked: $(tail -n 1 "$scratch/said")" >&2; return 1 ;;
    *) delete && create || return ;;
  esac
  install
}

watch() {
  need_bucket
  if ((dry_run)); then
    create && install && run
    return
  fi
  trap 'echo "the run goes on without this: run follows it, stop ends it, delete gives the slice back" >&2; exit 130' INT
  local attempt code found before after pause=30 failures=0
  before=$(progress)
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    code=0
    ready || code=$?
    if ((code == 0)); then run || code=$?; fi
    if ((code == 0)); then
      echo "done after $attempt starts" >&2
      return 0
    fi
    found=$(settled)
    after=$(progress)
    if [[ $after != "$before" ]]; then
      before=$after pause=30 failures=0
    fi
    case "$code" in
      75 | 143 | 241 | 255) echo "stopped with code $code (start $attempt of $ATTEMPTS); the slice is $found" >&2 ;;
      *)
        if [[ $found == ACTIVE || $found == NONE ]]; then
          failures=$((failures + 1))
          if ((failures >= FAILURES)); then
            echo "error: code $code, $failures times in a row with nothing new in the workdir; the slice is $found and" \
              "costs as long as it is there: see 'logs', then 'delete'" >&2
            return "$code"
          fi
        fi
        echo "failed with code $code (start $attempt of $ATTEMPTS, $failures of $FAILURES failures); the slice is" \
          "$found" >&2
        ;;
    esac
    sleep "$pause"
    pause=$((pause * 2 < 1800 ? pause * 2 : 1800))
  done
  echo "error: not done after $ATTEMPTS starts; the slice is $found: see 'logs', then 'delete'" >&2
  return 1
}

"$command"
