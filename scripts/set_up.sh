#!/usr/bin/env bash
# Make .venv: the locked development environment, with this project in it, editable. Needs Python 3.10 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: Python 3.10 or newer is needed, not $("$python" --version 2>&1); set PYTHON, as in: make test PYTHON=python3.12" >&2; exit 1; }

if command -v uv > /dev/null; then
    uv venv --quiet --allow-existing --python "$python" .venv
    install=(uv pip install --python .venv/bin/python)
else
    "$python" -m venv .venv
    install=(.venv/bin/python -m pip install --disable-pip-version-check)
fi
"${install[@]}" --quiet --requirement requirements-dev.txt
# The lock has everything, the build's own needs included. Installing compiles what changed of the native operators;
# uv would leave that out where it finds the project installed.
"${install[@]}" --quiet --no-build-isolation --no-deps --force-reinstall --editable .
