#!/usr/bin/env bash
# Builds the source archive and the wheel of this checkout and looks at them as an index and a user would.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_scripts/release_check.sh [FOLDER]

Builds sdist and wheel into FOLDER [build/release], from what git has committed, and then asks:
  - is the metadata what an index takes (twine check --strict), and does CITATION.cff have the same version?
  - do the archives hold what is read at run time, and no tests, data, notes, keys or machine's paths?
  - does the wheel install in an empty folder, and do `mpo --help` and a dry run of the quickstart work there?
The wheel is installed in an environment of its own, made from the index that pip is set up with; `--no-deps` as the second
argument takes the packages of .venv instead, which needs no network.
TEXT
}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  usage
  exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="$(mkdir -p "${1:-build/release}" && cd "${1:-build/release}" && pwd)"
python="$PWD/.venv/bin/python"
if [[ ! -x $python ]] || ! "$python" -c 'import build, twine' 2>/dev/null; then
  source run_scripts/install.sh
  install '.[release]'
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

step() { printf '\n== %s\n' "$*"; }

step "build"
rm -f "$folder"/*.whl "$folder"/*.tar.gz
mkdir "$scratch/source"
git archive HEAD | tar -x -C "$scratch/source"
isolation=()
[[ ${2:-} == --no-deps ]] && isolation=(--no-isolation)  # setuptools of .venv
"$python" -m build --quiet "${isolation[@]}" --outdir "$folder" "$scratch/source"
wheel=("$folder"/*.whl)
archive=("$folder"/*.tar.gz)
ls -l "$folder"

step "metadata"
"$python" -m twine check --strict "${wheel[0]}" "${archive[0]}"
version="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
if ! grep -qx "version: $version" CITATION.cff; then
  echo "error: CITATION.cff: expected version: $version, as in pyproject.toml" >&2
  exit 1
fi

step "contents"
"$python" run_scripts/release_contents.py "${wheel[0]}" "${archive[0]}"

step "install in an empty folder"
mkdir "$scratch/empty"
if [[ ${2:-} == --no-deps ]]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index --target "$scratch/site" "${wheel[0]}"
  mpo=(env "PYTHONPATH=$scratch/site" "$python" "$scratch/site/bin/mpo")
else
  "$python" -m venv "$scratch/environment"
  "$scratch/environment/bin/python" -m pip install --quiet --disable-pip-version-check "${wheel[0]}" -c constraints.txt
  mpo=("$scratch/environment/bin/mpo")
fi
cd "$scratch/empty"
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
"${mpo[@]}" --help
"${mpo[@]}" --version | tee "$scratch/version"
grep -q " $version\$" "$scratch/version"
"${mpo[@]}" run --config=quickstart --workdir=q --dry_run | tee "$scratch/graph"
grep -q "evaluate \[evaluate\]" "$scratch/graph"
if [[ -n $(ls -A) ]]; then
  echo "error: --help or --dry_run wrote into the folder: $(ls -A)" >&2
  exit 1
fi

step "all is well"
echo "${wheel[0]}"
echo "${archive[0]}"
