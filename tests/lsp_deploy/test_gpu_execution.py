"""What runs each layer on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
from gpu_plans import block_plan, inside

from lsp_deploy.allocation.gpu_execution import decide_gpu_execution, operator_cannot_run
from lsp_deploy.hardware.target import Target, load_target
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.plan import ExecutionDecision, Plan

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"


@pytest.fixture(scope="module")
def canonical() -> ir.Model:
    return canonicalize(load_model(ASSETS / "digits_vit.onnx"), max_opset=23)


def decided(canonical: ir.Model, plan: Plan, target: Target) -> Plan:
    for layer in plan.layers:
        layer.execution = ExecutionDecision()
        layer.sparsity.asked = "block"
    question = SimpleNamespace(layers=inside(canonical), target=target, gpu_timings=None)
    return decide_gpu_execution(question, plan)


def test_layers_that_lost_blocks_are_run_by_the_operator(canonical: ir.Model) -> None:
    plan = block_plan(canonical, "fp16", block=(16, 16))
    del plan.masks[plan.layers[0].name]
    plan.masks[plan.layers[1].name][:] = True
    result = decided(canonical, plan, load_target("a100"))
    kernels = [layer.execution.kernel for layer in result.layers]
    assert kernels == ["engine", "engine", *["block_sparse"] * (len(kernels) - 2)]
    reason = result.layers[2].execution.reason
    assert reason.startswith("block_sparse: ") and "% of the blocks survive" in reason and "not measured" in reason
    assert all(layer.execution.kernel == "engine" for layer in plan.layers)  # the question's plan is not changed


@pytest.mark.parametrize(("density", "words"), [(0.05, "; faster than the"), (0.95, "; no faster than the")])
def test_the_reason_says_what_the_cost_model_expects(canonical: ir.Model, density: float, words: str) -> None:
    plan = block_plan(canonical, "fp16", density=density)
    for layer in plan.layers:
        layer.M = 3152
    result = decided(canonical, plan, load_target("a100"))
    reasons = {layer.execution.reason for layer in result.layers if layer.execution.kernel == "block_sparse"}
    assert reasons and all(words in reason for reason in reasons)


@pytest.mark.parametrize(
    ("target", "dtype", "block", "words"),
    [
        ("t4", "fp16", (16, 16), "needs compute capability 8.0, t4 has 7.5"),
        ("a100", "fp32", (16, 16), "computes in fp16, bf16 and int8 on a GPU"),
        ("a100", "fp16", (8, 16), "has no blocks of 8x16 on a GPU, but of 16, 32, 64"),
        ("a100", "int8", (64, 16), None),
        ("agx-orin-64gb", "fp16", (16, 16), None),
    ],
)
def test_what_the_kernels_cannot_run_is_left_to_the_engine(
    canonical: ir.Model, target: str, dtype: str, block: tuple[int, int], words: str | None
) -> None:
    plan = block_plan(canonical, dtype, block=block)
    one, layer = inside(canonical)[0], plan.layers[0]
    assert operator_cannot_run(layer, one, block, load_target(target)) == words
    result = decided(canonical, plan, load_target(target)).layers[0].execution
    assert result.kernel == ("block_sparse" if words is None else "engine")
    assert words is None or result.reason == f"left to the engine, at the dense speed: the operator {words}"


def test_a_convolution_is_left_to_the_engine(canonical: ir.Model) -> None:
    plan = block_plan(canonical, "fp16")
    conv = SimpleNamespace(node=SimpleNamespace(op_type="Conv"))
    assert operator_cannot_run(plan.layers[0], conv, (32, 32), load_target("a100")) == "does no convolutions"


def test_a_target_without_peak_rates_has_no_estimate(canonical: ir.Model) -> None:
    target = load_target("a100").model_copy(update={"peak": {}})
    result = decided(canonical, block_plan(canonical, "fp16"), target)
    assert all("its speed is not estimated: a100 has no peak rates" in one.execution.reason for one in result.layers)
