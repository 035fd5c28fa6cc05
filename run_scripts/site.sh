#!/usr/bin/env bash
# Builds the documentation as a site, build/site/index.html; any warning, a broken link or anchor too, is an error.
# Arguments go to mkdocs: site.sh serve shows the pages while you write.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/mkdocs ]]; then
  source run_scripts/install.sh
  install '.[docs]'
fi
export NO_MKDOCS_2_WARNING=1  # Material's own advertisement, which strict mode would count
exec .venv/bin/python -m mkdocs "${@:-build}" --strict
