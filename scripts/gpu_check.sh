#!/usr/bin/env bash
# What only a GPU shows: that the kernels are right on it, without races, and what they gain. Needs CUDA's nvcc, CMake, a
# Python with PyTorch for CUDA, numpy, onnx_ir and ml_dtypes (PYTHON names it); lsp-deploy need not be installed. Where
# compute-sanitizer, ncu or lsp-deploy[tensorrt] are, races and bounds are looked for, kernels profiled, engines run.
#
#   scripts/gpu_check.sh OUT [--full]      6 to 10 minutes (estimated), with --full 20
#
# Each part has a time limit and a file of its own in OUT, written as it goes; one that fails does not stop the others.
# OUT/summary.txt says how each ended. The exit code is 1 if any of them failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: scripts/gpu_check.sh OUT [--full]}
shift
full=("$@")
python=${PYTHON:-python3}
nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
PATH=$PATH:$(dirname "$nvcc") # where compute-sanitizer and ncu are, too
mkdir -p "$out"
: > "$out/summary.txt"
failed=0

# The package as the build lays it out.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/lsp_deploy"
ln -s "$root"/lsp_deploy/* "$root"/{passes,engines,plugins} "$tree/lsp_deploy/"
export PYTHONPATH="$tree" PYTHONUNBUFFERED=1

say() { echo "$*" | tee -a "$out/summary.txt"; }

# part FILE SECONDS NAME COMMAND...
part() {
    local file=$out/$1 limit=$2 name=$3 status=0 start=$SECONDS
    shift 3
    timeout -k 10 "$([[ ${#full[@]} -gt 0 ]] && echo $((limit * 4)) || echo "$limit")" "$@" 2>&1 | tee -a "$file" || status=$?
    case $status in
        0) say "$name: passed, $((SECONDS - start)) s" ;;
        124 | 137) say "$name: NOT FINISHED after $((SECONDS - start)) s" ;;
        *) say "$name: FAILED with status $status after $((SECONDS - start)) s" ;;
    esac
    [[ $status -eq 0 ]] || failed=1
    return "$status"
}

# shellcheck disable=SC2329 # called through bash, for its time limit
build() {
    cmake -S "$root/plugins/cuda" -B "$tree/build" -DLSP_CUDA_SHARED=ON "-DCMAKE_CUDA_COMPILER=$nvcc" \
        "-DCMAKE_CUDA_ARCHITECTURES=$architecture" &&
        cmake --build "$tree/build" -j"$(nproc)" --target lsp_cuda_shared &&
        "$nvcc" -O3 -shared -Xcompiler -fPIC -std=c++17 "-arch=sm_$architecture" -o "$tree/libmma_peak.so" \
            "$root/benchmarks/mma_peak.cu"
}
# shellcheck disable=SC2329
build_plugin() {
    cmake -S "$root/plugins/tensorrt" -B "$tree/plugin" "-DTENSORRT_INCLUDE_DIR=${TENSORRT_INCLUDE_DIR:-}" \
        "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$architecture" &&
        cmake --build "$tree/plugin" -j"$(nproc)"
}
export -f build build_plugin
export root tree nvcc architecture

state() { # before and after the measurements: clocks, temperature, and what slowed it down
    nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE,POWER >> "$out/device.txt" 2>&1 || say "device: nvidia-smi does not answer"
}

rm -f "$out"/{device.txt,build.log,check.log,tables.md,sanitizer.log,profile.txt,forward.md,plugin.log,engines.log}
nvidia-smi 2>&1 | tee "$out/device.txt"
architecture=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")') ||
    { say "PyTorch sees no GPU here" && exit 1; }
part build.log 150 build bash -c build || exit 1
bench=("$python" "$root/benchmarks/gpu_kernel.py" "$tree/build/liblsp_cuda.so")

part check.log 90 check "${bench[@]}" --parts check
state
part tables.md 150 tables "${bench[@]}" --parts tables --peak "$tree/libmma_peak.so" "${full[@]}"
state

if command -v compute-sanitizer > /dev/null; then
    filter=--kernel-regex
    compute-sanitizer --help | grep -q -- --kernel-name && filter=--kernel-name
    for tool in memcheck racecheck; do
        part sanitizer.log 75 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no \
            "$filter" kns=block_sparse_linear "${bench[@]}" --parts check --check-every 50
    done
else
    say "memcheck, racecheck: not done, compute-sanitizer is not there"
fi

part forward.md 180 forward "${bench[@]}" --parts forward --energy-seconds 20 "${full[@]}"
state

if command -v ncu > /dev/null; then
    part profile.txt 60 profile ncu --clock-control none --kernel-name regex:block_sparse_linear --section SpeedOfLight \
        --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis --section Occupancy --section WarpStateStats \
        "${bench[@]}" --parts profile
else
    say "profile: not done, ncu is not there"
fi

if "$python" -I -c 'import lsp_deploy, tensorrt; from cuda.bindings import runtime' 2> /dev/null; then
    plugin=() # with TensorRT's headers (TENSORRT_INCLUDE_DIR), block-sparse engines too
    part plugin.log 150 plugin bash -c build_plugin
    [[ ! -f $tree/plugin/liblsp_block_sparse.so ]] || plugin=(--plugin "$tree/plugin/liblsp_block_sparse.so")
    [[ ${#plugin[@]} -gt 0 ]] || say "plugin: not built, TensorRT's headers are not there"
    part engines.log 300 engines "$python" "$root/benchmarks/gpu_engines.py" "$out/engines" "${plugin[@]}"
else
    say "engines: not done, lsp-deploy[tensorrt] is not installed in $python"
fi
cat "$out/summary.txt"
exit "$failed"
