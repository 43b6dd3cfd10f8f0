#!/usr/bin/env bash
# Write requirements-dev.txt again: the newest releases that fit pyproject.toml on Python 3.10 to 3.13. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."

cat > requirements-dev.txt.new <<'HEADER'
# The development environment, locked for Python 3.10 to 3.13 on Linux; written by scripts/lock.sh.
# torch and torchvision are pinned there by hand: they must be of the same release, and 2.13.0 is a release that is at
# hand as a CPU build where pip is told so (--find-links). What a CUDA build of torch needs is left to torch: it names
# the exact versions itself, and a CPU build needs none of it.
HEADER
printf 'torch==2.13.0\ntorchvision==0.28.0\n' |
    uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-header --no-annotate \
        --constraints - --extra dev --extra tensorrt-rtx --extra torch pyproject.toml |
    # Linux only; TensorRT-RTX has wheels for x86-64 only.
    sed -E "/^nvidia-ml-py/b
        /^(nvidia-|cuda-|triton)|sys_platform == '(win32|emscripten)'/d
        s/( and| ;) sys_platform != 'emscripten'//
        /^tensorrt-rtx/ s/$/ ; platform_machine == 'x86_64'/" >> requirements-dev.txt.new
mv requirements-dev.txt.new requirements-dev.txt
