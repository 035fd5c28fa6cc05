#!/usr/bin/env bash
# One host's part of a run: the commit is checked and told, the token is found, the run is started, followed, stopped.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/host.sh COMMAND

  start COMMIT FLAGS     the run in the foreground, if this checkout is of that commit; FLAGS are those of mpo_jax.main
  run ID COMMIT FLAGS    the same behind a connection that may end: a run that goes on without it is followed, not started
                         again, and one that ended under this ID only tells its exit code
  stop                   SIGTERM to that run: it saves, and this waits until it has ended
  logs [LINES]           what it said last [40]

STATE [~/.mpo] holds run.log, the exit codes, and hf_token, a file of mode 600 with the Hugging Face token, if there is one.
TEXT
}

state="${STATE:-$HOME/.mpo}"
self="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/host.sh"
cd "$(dirname "$self")/.."

# What this checkout is of: as the archive's sender wrote it, or as git knows it.
commit() {
  if [[ -f COMMIT ]]; then
    cat COMMIT
  else
    git rev-parse HEAD 2>/dev/null || echo unknown
  fi
}

start() {
  local found
  found="$(commit)"
  if [[ $found != "$1" ]]; then
    echo "error: $(uname -n) has commit $found; expected $1: install it again" >&2
    return 1
  fi
  echo "$(uname -n): commit $found" >&2
  # By the file: a token in the environment or on a command line is seen by more than its reader.
  [[ -f $state/hf_token ]] && export HF_TOKEN_PATH="$state/hf_token"
  exec .venv/bin/python -m mpo_jax.main "${@:2}"
}

keeper() { cat "$state/pid" 2>/dev/null || echo 0; }

alive() {
  local pid
  pid="$(keeper)"
  ((pid)) && grep -qs host.sh "/proc/$pid/cmdline" # not a stranger with that number after a reboot
}

run() {
  local id="$1" other from=1
  install -d -m 700 "$state"
  exec 9>"$state/lock"
  flock 9 # gcloud calls again by itself where a connection ends
  if alive; then
    read -r id other <"$state/id"
    if [[ $other != "$2" ]]; then
      echo "error: $(uname -n) runs commit $other; expected $2: stop that run first" >&2
      return 1
    fi
    from=$(($(wc -l <"$state/run.log") - 20))
  elif [[ ! -f $state/code.$id ]]; then
    [[ -f $state/run.log ]] && from=$(($(wc -l <"$state/run.log") + 1))
    echo "$id $2" >"$state/id"
    setsid bash "$self" keep "$@" >>"$state/run.log" 2>&1 </dev/null 9>&- &
    echo $! >"$state/pid"
  fi
  exec 9>&-
  tail -n "+$((from > 0 ? from : 1))" -F --pid="$(keeper)" "$state/run.log" 2>/dev/null || true
  if [[ -f $state/code.$id ]]; then
    return "$(cat "$state/code.$id")"
  fi
  echo "error: the run on $(uname -n) was killed" >&2
  return 137
}

# Runs in a session of its own, so that the end of a connection is not the end of the run; writes the exit code.
keep() {
  local id="$1" code=0 child="" told=0
  # Before the run begins: a signal may come while it does.
  trap 'told=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null' TERM
  bash "$self" start "${@:2}" &
  child=$!
  if ((told)); then kill -TERM "$child"; fi
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the run
    code=0
    wait "$child" || code=$?
  done
  echo "$code" >"$state/code.$id.new"
  mv "$state/code.$id.new" "$state/code.$id"
}

stop() {
  local id
  if ! alive; then
    echo "no run on $(uname -n)"
    return
  fi
  kill -TERM "$(keeper)"
  while alive; do sleep 1; done
  read -r id _ <"$state/id"
  echo "$(uname -n): ended with code $(cat "$state/code.$id")"
}

logs() { tail -n "${1:-40}" "$state/run.log"; }

case "${1:-}" in
  --help | -h) usage ;;
  start | run | keep | stop | logs) "$@" ;;
  *) usage >&2; exit 1 ;;
esac
