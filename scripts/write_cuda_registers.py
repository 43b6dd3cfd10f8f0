"""Write tests/plugins/data/cuda_registers.json again: what nvcc gives each kernel on each architecture."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cuda_toolkit import build, find_nvcc, release  # noqa: E402


def main() -> None:
    """Compile all kernels and write the table."""
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("error: nvcc was not found; install CUDA, or the packages nvidia-cuda-nvcc and nvidia-cuda-cccl")
    with tempfile.TemporaryDirectory() as folder:
        use = build(nvcc, Path(folder)).use
    rows = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(use.items())]
    table = ",\n".join(rows)
    path = ROOT / "tests" / "plugins" / "data" / "cuda_registers.json"
    path.parent.mkdir(exist_ok=True)
    head = f'{{\n  "toolkit": {json.dumps(release(nvcc))},\n  "registers_and_spilled_bytes": {{\n'
    path.write_text(f"{head}{table}\n  }}\n}}\n")


if __name__ == "__main__":
    main()
