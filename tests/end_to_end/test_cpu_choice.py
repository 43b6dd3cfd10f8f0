"""Runs for this machine's CPU: what runs each layer, by made-up times (conftest), and what the report says of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from exports import export_family
from made_up_timer import RATES

from lsp_deploy.files import sha256_of
from lsp_deploy.plan import Plan, load_plan
from lsp_deploy.plugins import library

INSIDE = ("qkv", "proj", "fc1", "fc2")

pytestmark = pytest.mark.skipif(library().path is None, reason="the operator's library is not built")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency of the whole model is not what is tested here."""
    from lsp_deploy.engines import profiler

    monkeypatch.setattr(profiler, "profile", functools.partial(profiler.profile, warm_up=0.0, block_seconds=0.01))


@pytest.fixture
def compress(run, bare: Path):
    def compress(*arguments: object, out: str = "out"):
        data = ("--calibration-data", "calibration.npz")
        return run("compress", bare.name, "--target", "cpu", *data, "--jobs", "1", "-o", out, *arguments)

    return compress


def inside(plan: Plan) -> set[tuple[str, str]]:
    return {(one.execution.kernel, one.precision.dtype) for one in plan.layers if one.role in INSIDE}


def report_of(folder: str = "out") -> dict[str, Any]:
    return json.loads((Path(folder) / "report.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_typed_precision_runs_in_the_fastest_kernel_and_replays(compress, precision: str) -> None:
    result = compress("--precision", precision, "--sparsity", "none")
    assert result.code == 0, result.err
    plan, report = load_plan(Path("out/plan.json")), report_of()
    assert inside(plan) == {("block_sparse", precision)}
    assert plan.compute_type == "fp32"
    for layer in report["layers"]:
        assert layer["engine"]["precision"] == layer["precision"]["dtype"], layer["name"]
        assert layer["engine"]["matches_request"] is True
        assert layer["time_ms"] > 0 and "measured" in layer["execution"]["reason"]
        if layer["role"] in INSIDE:
            assert layer["engine"]["kind"] == "BlockSparseLinear"
    times = report["linear_time"]
    assert 0 < times["compressed_ms"] < times["dense_ms"]
    assert times["compressed_ms"] == pytest.approx(sum(layer["time_ms"] for layer in report["layers"]))
    page = Path("out/report.html").read_text()
    assert "Time of linear layers" in page and "What was chosen to run them" in page
    again = compress("--plan", "out/plan.json", out="again")
    assert again.code == 0, again.err
    assert sha256_of(Path("out/model.onnx")) == sha256_of(Path("again/model.onnx"))
    assert "timing" not in again.out, "a plan that is carried out is not timed again"


def test_blocks_to_a_latency_that_was_measured(compress) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert compress("--precision", "fp32", "--sparsity", "none", "--no-build").code == 0
    whole = report_of()["linear_time"]["compressed_ms"]
    budget = f"{whole * 0.6:.6f}"
    found = compress("--precision", "fp32", "--sparsity", "block", "--max-latency-ms", budget, out="sparse")
    assert found.code == 0, found.err
    assert report_of("sparse")["linear_time"]["compressed_ms"] <= whole * 0.6 * 1.005
    assert not any("ordinary MatMuls" in warning for warning in report_of("sparse")["warnings"])


def test_gathers_where_they_are_the_fastest(compress, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the operator has portable kernels only."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setitem(RATES, "gather fp32", 2.0)
    typed = ("--precision", "fp32", "--sparsity", "block", "--block", "16x16", "--flops", "0.3", "--recover", "none")
    result = compress(*typed)
    assert result.code == 0, result.err
    sparse = [layer for layer in report_of()["layers"] if layer["sparsity"]["pattern"] == "block"]
    assert sparse and {layer["execution"]["kernel"] for layer in sparse} == {"gather"}
    for layer in sparse:
        assert layer["execution"]["reason"].startswith("gather fp32: ")
        assert layer["time_ms"] * 1000 == pytest.approx(layer["execution"]["times_us"]["gather fp32"])
        gone = layer["structure"] is not None and layer["structure"]["K"] == 0
        assert layer["engine"]["matches_request"] is (None if gone else True), layer["engine"]
    assert any("/panel_" in (layer["engine"]["layer"] or "") for layer in sparse)
    assert "gather fp32" in result.out
    again = compress("--plan", "out/plan.json", out="again")
    assert again.code == 0, again.err
    assert sha256_of(Path("out/model.onnx")) == sha256_of(Path("again/model.onnx"))


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "fp32"), ("int8", "int8")])
def test_convolutions_are_the_engines_and_int8_only_where_typed(
    run, tmp_path: Path, precision: str, dtype: str
) -> None:
    """ONNX Runtime dequantizes them, which takes longer than to leave them alone."""
    typed = ("--samples", "8", "--sparsity", "none", "--precision", precision, "--no-build", "-o", tmp_path / "out")
    result = run("compress", export_family("convnext_atto"), "--target", "cpu", *typed)
    assert result.code == 0, result.err
    layers = load_plan(tmp_path / "out" / "plan.json").layers
    mlp = [layer for layer in layers if layer.role in ("fc1", "fc2")]
    assert mlp and {(layer.execution.kernel, layer.precision.dtype) for layer in mlp} == {("engine", dtype)}
    assert all("convolution" in layer.execution.reason for layer in mlp)
    assert dtype == "int8" or all("does not run a convolution" in layer.precision.reason for layer in mlp)


def test_a_plan_that_cannot_run_so_is_refused(compress) -> None:
    assert compress("--precision", "bf16", "--sparsity", "none", "--no-build").code == 0
    path = Path("out/plan.json")
    whole = json.loads(path.read_text())
    for place, kernel, dtype, words in (
        (1, "engine", "bf16", "bf16"),
        (1, "qgemm", "fp32", "qgemm is for int8"),
        (1, "gather", "bf16", "gather is for fp32"),
        (0, "block_sparse", "fp32", "convolution"),
    ):
        changed = json.loads(json.dumps(whole))
        changed["layers"][place]["execution"]["kernel"] = kernel
        changed["layers"][place]["precision"]["dtype"] = dtype
        path.write_text(json.dumps(changed))
        result = compress("--plan", path, out="again")
        assert result.code == 2 and words in result.err
        assert len(result.err.strip().splitlines()) == 1
