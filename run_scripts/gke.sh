#!/usr/bin/env bash
# A run on TPU slices of GKE: the image of a commit, the Hugging Face token as a Secret, the JobSet of deploy/. Needs
# kubectl, and docker for the image. See docs/pods.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/gke.sh [--dry_run] COMMAND

  image     builds and pushes IMAGE:COMMIT, which brings Python and the packages of that commit
  secret    the Hugging Face token, as the Secret mpo-hf, from HF_TOKEN_FILE or HF_TOKEN (exported)
  start     applies deploy/gke_jobset.yaml for that commit
  status    the JobSet, its restarts, its pods
  logs      what process 0 says, as it says it
  delete    the JobSet; the same `start` goes on from what was saved

Settings, as environment variables (defaults in brackets):
  IMAGE     the image's name without a tag, as REGION-docker.pkg.dev/PROJECT/REPOSITORY/mpo_jax
  BUCKET    the bucket of the workdir gs://BUCKET/NAME
  NAME [mpo-tldr]   COMMIT [HEAD]   MANIFEST [deploy/gke_jobset.yaml, to be copied for another slice or config]
--dry_run prints the commands, and the manifest as it is applied.
TEXT
}

dry_run=0
command=""
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    image | secret | start | status | logs | delete) command=$argument ;;
    *) echo "error: unknown argument '$argument'; see --help" >&2; exit 1 ;;
  esac
done
if [[ -z "$command" ]]; then
  usage >&2
  exit 1
fi

NAME=${NAME:-mpo-tldr}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MANIFEST=${MANIFEST:-deploy/gke_jobset.yaml}
export -n HF_TOKEN 2>/dev/null || true
if ! commit=$(git rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}"); then
  echo "error: COMMIT: '${COMMIT:-HEAD}' is no commit of this checkout" >&2
  exit 1
fi
scratch=$(mktemp -d -t mpo_jax.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

need() {
  if [[ -z "${!1:-}" ]]; then
    echo "error: $1: not set; give $2" >&2
    exit 1
  fi
}

do_() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# From `git archive`: what is not committed is in no image.
image() {
  need IMAGE "the image's name, without a tag"
  [[ -z $(git status --porcelain --untracked-files=no) ]] || echo "note: what is not committed stays here" >&2
  git archive --format=tar --output="$scratch/code.tar" "$commit"
  do_ docker build --build-arg "COMMIT=$commit" --file deploy/Dockerfile --tag "$IMAGE:$commit" - <"$scratch/code.tar"
  do_ docker push "$IMAGE:$commit"
}

# By a file and a pipe: neither a command line nor a log holds it.
secret() {
  local file="${HF_TOKEN_FILE:-}"
  if [[ -z $file ]]; then
    need HF_TOKEN "the Hugging Face token, or HF_TOKEN_FILE, a file that holds it"
    file="$scratch/hf_token"
    (umask 077 && printf '%s' "$HF_TOKEN" >"$file")
  fi
  if [[ ! -s $file ]]; then
    echo "error: HF_TOKEN_FILE: $file: no such file, or it is empty" >&2
    exit 1
  fi
  local create=(kubectl create secret generic mpo-hf "--from-file=token=$file" --dry-run=client --output=yaml)
  if ((dry_run)); then
    printf '%q ' "${create[@]}" "|" kubectl apply --filename=-
    printf '\n'
  else
    "${create[@]}" | kubectl apply --filename=-
  fi
}

manifest() {
  sed -e '/^ *#/d' -e "s|IMAGE|$IMAGE|g; s|COMMIT|$commit|g; s|BUCKET|$BUCKET|g; s|\bNAME\b|$NAME|g" "$MANIFEST"
}

start() {
  need IMAGE "the image's name, without a tag"
  need BUCKET "the name of a Cloud Storage bucket for the run's folder"
  echo "commit $commit" >&2
  manifest >"$scratch/jobset.yaml"
  do_ kubectl apply --filename="$scratch/jobset.yaml"
  if ((dry_run)); then cat "$scratch/jobset.yaml"; fi
}

status() {
  do_ kubectl get jobset "$NAME" --output=wide
  do_ kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
}

logs() {
  do_ kubectl logs --follow \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
}

delete() { do_ kubectl delete jobset "$NAME"; }

"$command"
