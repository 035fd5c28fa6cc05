#!/usr/bin/env bash
# Makes .venv and installs the package there: `install WHAT` where this is sourced (quickstart.sh, test.sh), a command
# where it is run (rented hosts). Brings a Python of its own where the machine has none that will do.

install_usage() {
  cat <<'TEXT'
usage: run_scripts/install.sh [WHAT]

Makes .venv and installs WHAT [.] there, as '.[tpu,gcs]' or '.[test]', with the versions of constraints.txt. A second call
does nothing until that or pyproject.toml changes. The Python is the first of these:
  PYTHON     an interpreter of 3.11 or newer
  python3    where it is 3.11 or newer and has venv and pip
  uv         brings Python 3.12: neither pip, venv nor root need be there, curl alone
uv itself is UV (a file), or uv of the PATH or of ~/.local/bin, or is fetched from astral.sh into ~/.local/bin. Without the
internet: UV=FILE (the wheel of `pip download uv` has it), and uv's own UV_PYTHON_INSTALL_MIRROR and UV_DEFAULT_INDEX for
mirrors of Python and of the packages.
TEXT
}

readonly UV_RELEASE=0.13.9 OWN_PYTHON=3.12

install() {
  local stamp=".venv/installed $1" python uv
  if [[ -f $stamp && ! pyproject.toml -nt $stamp && ! constraints.txt -nt $stamp ]]; then
    return
  fi
  echo "installing into .venv ..."
  if [[ -n ${PYTHON:-} ]] && ! new_enough "$PYTHON"; then
    echo "error: $PYTHON is $("$PYTHON" -V); expected Python 3.11 or newer (name one with PYTHON=...)" >&2
    return 1
  fi
  python="${PYTHON:-python3}"
  if new_enough "$python" && "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$1"
  else
    uv="$(find_uv)" || return 1
    [[ -x .venv/bin/python ]] || "$uv" venv --quiet --managed-python --python "${UV_PYTHON:-$OWN_PYTHON}" .venv
    "$uv" pip install --quiet --python .venv/bin/python -c constraints.txt -e "$1"
  fi
  touch "$stamp"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The path of uv, which is fetched where it is nowhere.
find_uv() {
  local own="$HOME/.local/bin/uv"
  if [[ -n ${UV:-} ]]; then
    if [[ ! -x $UV ]]; then
      echo "error: UV: $UV: no such program; expected uv's own file" >&2
      return 1
    fi
    echo "$UV"
  elif command -v uv; then
    :
  else
    if [[ ! -x $own ]]; then
      echo "fetching uv $UV_RELEASE ..." >&2
      if ! curl -LsSf "https://astral.sh/uv/$UV_RELEASE/install.sh" |
        env UV_INSTALL_DIR="$HOME/.local/bin" UV_NO_MODIFY_PATH=1 sh >&2; then
        echo "error: uv can't be fetched; give a Python of 3.11 or newer with PYTHON=..., or uv's file with UV=..." >&2
        return 1
      fi
    fi
    echo "$own"
  fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    install_usage
    exit 0
  fi
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  install "${1:-.}"
  echo "installed: $(.venv/bin/python -V), $(uname -m)"
fi
