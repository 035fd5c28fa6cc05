# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. `install WHAT` makes .venv and installs `.` or `.[EXTRA]` there, with the versions of
# constraints.txt; a second call does nothing until that or pyproject.toml changes.
install() {
  local python="${PYTHON:-python3}" stamp=".venv/installed $1"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is $("$python" -V); expected Python 3.11 or newer (name one with PYTHON=...)" >&2
    return 1
  fi
  if [[ -f $stamp && ! pyproject.toml -nt $stamp && ! constraints.txt -nt $stamp ]]; then
    return
  fi
  echo "installing into .venv ..."
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e "$1"
  touch "$stamp"
}
