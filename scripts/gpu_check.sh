#!/usr/bin/env bash
# What only a GPU shows: that the kernels are right on it, without races, and what they gain. Needs CUDA's nvcc, CMake, a
# Python with PyTorch for CUDA, numpy, onnx_ir and ml_dtypes (PYTHON names it); lsp-deploy need not be installed. Where
# lsp-deploy[tensorrt] is, engines are built and run too.
#
#   scripts/gpu_check.sh OUT [--full]      about 6 minutes, with --full 20; the tables go to OUT/kernels.md
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: scripts/gpu_check.sh OUT [--full]}
shift
python=${PYTHON:-python3}
mkdir -p "$out"

# The package as the build lays it out.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/lsp_deploy"
ln -s "$root"/lsp_deploy/* "$root"/{passes,engines,plugins} "$tree/lsp_deploy/"
export PYTHONPATH="$tree" PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv | tee "$out/gpu.csv"
architecture=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")')
cmake -S "$root/plugins/cuda" -B "$tree/build" -DLSP_CUDA_SHARED=ON "-DCMAKE_CUDA_ARCHITECTURES=$architecture" > "$out/build.log"
cmake --build "$tree/build" -j4 >> "$out/build.log"
library=$tree/build/liblsp_cuda.so

"$python" "$root/benchmarks/gpu_kernel.py" "$library" --check-only | tee "$out/check.log"
found=0
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        status=0
        timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=block_sparse_linear \
            "$python" "$root/benchmarks/gpu_kernel.py" "$library" --check-only --check-every 50 > "$out/$tool.log" 2>&1 || status=$?
        case $status in
            0) echo "$tool: nothing found" ;;
            9) echo "$tool: FOUND something, see $out/$tool.log" && found=1 ;;
            *) echo "$tool: did not run to its end (status $status), see $out/$tool.log" ;;
        esac
    done
else
    echo "compute-sanitizer is not there: races and bounds were not looked for"
fi
"$python" "$root/benchmarks/gpu_kernel.py" "$library" --check-every 50 --forward deit_base --energy-seconds 20 "$@" | tee "$out/kernels.md"

if "$python" -I -c 'import lsp_deploy, tensorrt; from cuda.bindings import runtime' 2> /dev/null; then
    "$python" "$root/benchmarks/gpu_engines.py" "$out/engines"
else
    echo "lsp-deploy[tensorrt] is not installed in $python: no engine was built and run"
fi
exit $found
