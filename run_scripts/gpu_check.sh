#!/usr/bin/env bash
# Proves and measures the path on one GPU: numbers against the CPU, a whole small run, speed. Installs nothing.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/gpu_check.sh [OUT] [--only=numbers,whole,speed] [--platform=gpu|cpu] [--wheels FOLDER]

Writes OUT/gpu.json and OUT/gpu.md (OUT is runs/gpu_check if it is not given), goes on after a failing part, and ends
with a status above 0 if one failed. Parts that --only leaves out keep what an earlier call found in OUT.
--wheels unpacks the wheels of a folder into OUT/site, for a machine that has no network; --platform=cpu runs what a CPU
can run, to prove the check itself. PYTHON names the interpreter.
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 1
}

out=""
wheels=""
arguments=()
while (($#)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --wheels) wheels="${2:-}"; [[ -n $wheels ]] || fail "--wheels needs a folder"; shift ;;
    --wheels=*) wheels="${1#*=}" ;;
    --only | --platform | --cases | --seconds)
      (($# > 1)) || fail "$1 needs a value"
      arguments+=("$1=$2")
      shift
      ;;
    --*) arguments+=("$1") ;;
    *)
      [[ -z $out ]] || { usage >&2; exit 1; }
      out="$1"
      ;;
  esac
  shift
done

clone="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${out:-$clone/runs/gpu_check}"
[[ ! -e $out || -d $out ]] || fail "OUT: $out is no folder"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
if [[ -n $wheels ]]; then
  compgen -G "$wheels/*.whl" > /dev/null || fail "--wheels: no wheels in $wheels"
  wheels="$(cd "$wheels" && pwd)"
fi
cd "$clone"
python="${PYTHON:-python3}"
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
if [[ -n $wheels ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/site" "$wheels"/*.whl
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" -m run_scripts.gpu.check "$out" "${arguments[@]}"
