# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. `install [EXTRA]` makes .venv and installs the package, with the versions of
# constraints.txt; a second call does nothing until those or pyproject.toml change.
install() {
  local python="${PYTHON:-python3}" extra="${1:+[$1]}"
  local stamp=".venv/.installed${1:+-$1}"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is $("$python" -V); expected Python 3.11 or newer (name one with PYTHON=...)" >&2
    return 1
  fi
  if [[ -f $stamp && ! pyproject.toml -nt $stamp && ! constraints.txt -nt $stamp ]]; then
    return
  fi
  echo "installing into .venv ..."
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra"
  touch "$stamp"
}
