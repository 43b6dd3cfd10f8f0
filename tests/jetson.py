"""A tree that looks like a Jetson's: trtexec, which only pretends, and the sensors of an AGX Orin."""

from pathlib import Path

# What TensorRT 10.3's trtexec prints, as its source has it; inferences take 5 ms each.
_TRTEXEC = """#!/usr/bin/env python3
import sys, time
from pathlib import Path

here = Path(__file__)
flags = dict(part.partition("=")[::2] for part in sys.argv[1:])
with here.with_name("calls.txt").open("a") as calls:
    print(*sys.argv[1:], file=calls)

def say(text, severity="I"):
    print(f"[11/28/2026-10:00:00] [{severity}] {text}", flush=True)

say("TensorRT version: 10.3.0")
if here.with_name("broken").exists():
    say("Error[4]: ITensor::getDimensions: Error Code 4: shape mismatch", "E")
    say("Engine set up failed", "E")
    sys.exit(1)
if "--saveEngine" in flags:
    assert Path(flags["--onnx"]).is_file()
    assert all(Path(flags[name]).is_file() for name in ("--dynamicPlugins",) if name in flags)
    Path(flags["--saveEngine"]).write_bytes(b"engine")
    if "--sparsity" in flags:
        say("(Sparsity) Found 16 layer(s) eligible to use sparse tactics: a, b")
    sys.exit(0)
assert Path(flags["--loadEngine"]).read_bytes() == b"engine"
assert "--skipInference" not in flags


def write_whole(path, text):
    # As the kernel does: whoever reads sees the old number or the new one, never an empty file.
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


gpu = here.parents[4] / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0/curr1_input"
if gpu.exists():
    write_whole(gpu, "1500")  # 10 W more
say("Starting inference")
time.sleep(float(flags["--warmUp"]) / 1000)
start = time.monotonic()
time.sleep(float(flags["--duration"]))
seconds = time.monotonic() - start
queries = round(seconds / 0.005)
say("Warmup completed 400 queries over 2000 ms")
say(f"Timing trace has {queries} queries over {seconds:g} s")
say("")
say("=== Performance summary ===")
say(f"Throughput: {queries / seconds:g} qps")
quantiles = ", ".join(f"percentile({part}%) = {{}} ms" for part in flags["--percentile"].split(","))
say("Latency: min = 4.9 ms, max = 7 ms, mean = 5.02 ms, median = 5 ms, " + quantiles.format(5, 5.1, 5.2, 5.5))
say("Enqueue Time: min = 0.1 ms, max = 0.2 ms, mean = 0.1 ms, median = 0.1 ms, " + quantiles.format(0, 0, 0, 0))
say("GPU Compute Time: min = 4.5 ms, max = 6 ms, mean = 4.6 ms, median = 4.6 ms, " + quantiles.format(4.6, 5, 5, 5))
say(f"Total Host Walltime: {seconds:g} s")
time.sleep(1)
if gpu.exists():
    write_whole(gpu, "1000")
"""
# Compiles nothing: the library is an empty file where CMake was told to put it.
_CMAKE = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/calls.txt"
for flag in "$@"; do
    case $flag in
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) touch "${flag#*=}/liblsp_block_sparse.so" ;;
    esac
done
"""
_RAILS = {
    ("1-0040", 1): ("VDD_GPU_SOC", 20_000, 1000),
    ("1-0040", 2): ("VDD_CPU_CV", 20_000, 500),
    ("1-0040", 3): ("VIN_SYS_5V0", 5000, 2000),
    ("1-0041", 1): ("NC", 0, 0),
    ("1-0041", 2): ("VDDQ_VDD2_1V8AO", 5000, 800),
}


def make_jetson(root: Path) -> Path:
    """Make the tree in `root`, and return the folder of trtexec.

    The rails take 20 W + 10 W + 10 W, and 10 W more while trtexec runs; the power mode is MAXN.
    """
    tools = root / "usr/src/tensorrt/bin"
    _executable(tools / "trtexec", _TRTEXEC)
    for tool in ("cmake", "nvcc"):
        _executable(root / "usr/local/cuda/bin" / tool, _CMAKE)
    for (chip, channel), (label, mv, ma) in _RAILS.items():
        sensor = root / f"sys/bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon{chip[-1]}"
        for name, content in ((f"in{channel}_label", label), (f"in{channel}_input", mv), (f"curr{channel}_input", ma)):
            _write(sensor / name, f"{content}\n")
    _write(root / "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=MAXN >\n")
    _write(root / "var/lib/nvpmodel/status", "pmode:0000\n")
    return tools


def _executable(path: Path, content: str) -> None:
    _write(path, content)
    path.chmod(0o755)


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
