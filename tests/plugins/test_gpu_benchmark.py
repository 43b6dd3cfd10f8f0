"""benchmarks/gpu_kernel.py on emulated kernels: what is to run on a borrowed GPU at once has to run here."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_emulation import emulation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


class Graph:
    """A CUDA graph in that it can be replayed."""

    def __init__(self, actions: Sequence[Callable[[], object]]) -> None:
        self.actions = actions

    def replay(self) -> None:
        for action in self.actions:
            action()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., SimpleNamespace]:
    """Return a call that runs the benchmark with some arguments; its modules take this CPU for a GPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_forward
    import gpu_kernel
    import gpu_layers
    import gpu_self_check

    def on_the_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *sizes, **options: make(*sizes, **options | ({"device": "cpu"} if "device" in options else {}))

    def enqueued(enqueue: Callable[[int], object]) -> float:
        start = time.perf_counter()
        enqueue(0)
        return (time.perf_counter() - start) * 1e6

    for name in ("randn", "empty", "randint", "tensor"):
        monkeypatch.setattr(torch, name, on_the_cpu(getattr(torch, name)))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    fakes = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "current_stream": lambda: SimpleNamespace(cuda_stream=0),
        "get_device_properties": lambda device: SimpleNamespace(name="made up", multi_processor_count=4),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    library = emulation(Path(request.config.cache.mkdir("cuda")))
    library.c.lsp_cuda_emulated_device(4, 1 << 20, 0)
    monkeypatch.setattr(gpu_kernel, "CudaLibrary", lambda path: library)
    for module in (gpu_layers, gpu_kernel):
        monkeypatch.setattr(module, "time_us", enqueued)
    monkeypatch.setattr(gpu_forward, "captured", Graph)
    monkeypatch.setattr(gpu_kernel, "LAYERS", (*[(48, 64, "none")] * 6, (64, 48, "gelu_tanh")))
    monkeypatch.setattr(gpu_kernel, "TOKENS", 9)
    modules = SimpleNamespace(forward=gpu_forward, kernel=gpu_kernel, self_check=gpu_self_check)

    def run(*arguments: str) -> SimpleNamespace:
        if arguments:
            monkeypatch.setattr(sys, "argv", ["gpu_kernel.py", "liblsp_cuda.so", *arguments])
            gpu_kernel.main()
        return modules

    return run


def small_cases(self_check: Any, dtypes: Sequence[Any]) -> list[Any]:
    case = self_check.Case
    cases = [case(dtype, (96, 64), (32, 32), 0.5, rows) for dtype in dtypes for rows in (1, 70)]
    return [*cases, case(dtypes[0], (51, 35), (16, 16), 0.5, 40, compared=20)]


def test_the_self_check_passes(
    benchmark: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    cases = small_cases(benchmark().self_check, (torch.float16, torch.bfloat16, torch.int8))
    monkeypatch.setattr(benchmark().self_check, "_cases", lambda every: iter(cases))
    benchmark("--parts", "check")
    assert ", 0 wrong" in capsys.readouterr().out


def test_the_self_check_finds_a_wrong_kernel(
    benchmark: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    self_check = benchmark().self_check
    cases = small_cases(self_check, (torch.float16,))
    monkeypatch.setattr(self_check, "_cases", lambda every: iter(cases))
    exact = self_check._exact
    monkeypatch.setattr(self_check, "_exact", lambda *layer: exact(*layer) + 0.01)
    with pytest.raises(SystemExit, match="self-checks failed"):
        benchmark("--parts", "check")
    assert "WRONG: 128x64, Case(" in capsys.readouterr().out


def test_the_self_check_says_where_cuda_gave_up(
    benchmark: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    self_check = benchmark().self_check
    cases = small_cases(self_check, (torch.float16,))
    monkeypatch.setattr(self_check, "_cases", lambda every: iter(cases))
    errors = iter([0.0, 0.0])

    def error(y: Any, exact: Any) -> float:
        for one in errors:
            return one
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(self_check, "_error", error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        benchmark("--parts", "check")
    assert "rows=1, compared=None), after 128x128, Case(" in capsys.readouterr().out


def test_tables_have_all_layers(
    benchmark: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark().kernel, "LAYERS", ((48, 64, "gelu_tanh"),))
    monkeypatch.setattr(benchmark().kernel, "_dense_us", lambda *layer: (1000.0, " without bias"))
    benchmark("--parts", "tables")
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| 48 x 64")]
    assert len(rows) == 2 * 2 * 4  # types, batches, kinds of blocks
    head = next(line for line in lines if line.startswith("| K x N"))
    assert all(line.count("|") == head.count("|") and "1000.00 without bias" in line for line in rows)
    assert len([line for line in lines if line.startswith("- width 48, batch 16")]) == 2 * 4


def test_the_profile_launches_each_tactic(
    benchmark: Callable[..., SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark("--parts", "profile")
    launches = [line for line in capsys.readouterr().out.splitlines() if line.startswith("launch ")]
    assert launches[0] == "launch 0: 256x128" and launches[-1].endswith("32x32")


def test_a_forward_agrees_with_the_dense_one(
    benchmark: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    class Dense:
        """A dense layer of PyTorch's, in float32."""

        def __init__(self, weights: Any, m: int, *, activation: str, copies: int) -> None:
            self.weight, self.bias = torch.from_numpy(weights.weight).float(), torch.from_numpy(weights.bias)
            self.activation = activation

        def tune(self, *tensors: Any) -> None: ...

        def __call__(self, x: Any, y: Any, residual: Any = None) -> None:
            sums = x.float() @ self.weight + self.bias
            if self.activation != "none":
                sums = torch.nn.functional.gelu(sums, approximate="tanh")
            y.copy_(sums if residual is None else sums + residual.float())

    forward = benchmark().forward
    for name, value in {"Dense": Dense, "WIDTHS": {"deit_base": 64}, "TOKENS": 5, "BLOCKS": 1}.items():
        monkeypatch.setattr(forward, name, value)
    monkeypatch.setattr(forward, "energy_j", lambda: 250 * time.perf_counter())
    benchmark("--parts", "forward", "--energy-seconds", "0.2")
    said = capsys.readouterr().out
    errors = [float(line.split()[3]) for line in said.splitlines() if line.startswith("Outputs differ by")]
    assert len(errors) == 2 and max(errors) < 1e-2
    sparse = [line.split("|") for line in said.splitlines() if line.startswith("| block-sparse")]
    assert len(sparse) == 2 and all(240 < float(row[4]) < 260 for row in sparse)  # watts
