#!/usr/bin/env bash
# mypy --strict over the whole package. It does not know that the build puts the top-level folders passes, engines and
# plugins inside lsp_deploy, so it is shown a temporary tree in which they are.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/lsp_deploy"
ln -s "$root"/lsp_deploy/* "$root"/{passes,engines,plugins} "$tree/lsp_deploy/"

cd "$tree"
"${MYPY:-$root/.venv/bin/mypy}" --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" --strict -p lsp_deploy |
    sed -E 's#^lsp_deploy/(passes|engines|plugins)/#\1/#'
