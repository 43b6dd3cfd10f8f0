"""What runs each layer on a CPU, decided from made-up times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from digits import ASSETS, digits_statistics
from fake_pruner import INSIDE, FakePruner

from lsp_deploy.allocation.decide import decide
from lsp_deploy.allocation.execution import linear_time_us
from lsp_deploy.allocation.question import Question
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cpu_timings import CpuTimings, LayerTimes
from lsp_deploy.hardware.target import load_target
from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps.preparation import PreparedModel, prepare
from lsp_deploy.steps.timing import layer_shape

Curves = Mapping[str, Mapping[float, float]]

# As on a CPU with AVX512_BF16: the operator about as fast as qgemm on dense weights, faster with zeros.
USUAL: Curves = {
    "matmul fp32": {1.0: 200.0},
    "qgemm int8": {1.0: 60.0},
    "block_sparse fp32": {1.0: 190.0, 0.5: 100.0, 0.1: 40.0},
    "block_sparse bf16": {1.0: 100.0, 0.5: 55.0, 0.1: 30.0},
    "block_sparse int8": {1.0: 70.0, 0.5: 40.0, 0.1: 20.0},
    "gather fp32": {1.0: 230.0, 0.5: 150.0, 0.1: 80.0},
}
ATTENTION = {"exported fp32": 500.0, "lsp fp32": 200.0, "lsp bf16": 120.0}
Ask = Callable[..., Question]


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return prepare(ASSETS / "digits_vit.onnx", Recipe(target="cpu"), load_target("cpu"))


@pytest.fixture(scope="module")
def statistics(prepared: PreparedModel):
    return digits_statistics(prepared)


@pytest.fixture
def ask(prepared: PreparedModel, statistics) -> Ask:
    """Return a question about the embedded model on a CPU of which all layers take `curves`."""

    def ask(
        loss: Callable[[Plan], float] | None = lambda plan: 0.0,
        *,
        curves: Curves = USUAL,
        attention: Mapping[str, float] = ATTENTION,
        left: Mapping[str, str] = {},
        **asked: object,
    ) -> Question:
        recipe = Recipe.model_validate({"target": "cpu", "sparsity": "none", **asked})
        times = {}
        for layer in prepared.layers:
            shape = layer_shape(layer, recipe.block_shape)
            times[layer.name] = LayerTimes(shape, {"matmul fp32": {1.0: 200.0}} if shape.is_conv else curves)
        return Question(
            recipe=recipe,
            target=load_target("cpu"),
            model_sha256=prepared.sha256,
            opset=prepared.opset,
            compute_type="fp32",
            layers=prepared.layers,
            weights=prepared.weights,
            statistics=lambda plan: statistics,
            attention_flops=prepared.attention_flops,
            real_images=True,
            held_out=100,
            recover=True,
            pruner=FakePruner(prepared.layers, recipe.flops),
            why_no_pruner="install torch",
            loss=loss,
            timings=CpuTimings(2, times, attention, left),
        )

    return ask


def inside(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer.role in INSIDE]


def kernels(plan: Plan) -> set[tuple[str, str]]:
    return {(layer.execution.kernel, layer.precision.dtype) for layer in inside(plan)}


def uses_bf16(plan: Plan) -> bool:
    return any(layer.precision.dtype == "bf16" for layer in plan.layers) or plan.attention.compute == "bf16"


def test_without_timings_all_is_left_to_the_engine(ask: Ask) -> None:
    plan, _ = decide(replace(ask(precision="fp32"), timings=None))
    assert kernels(plan) == {("engine", "fp32")}
    assert all(layer.execution.times_us == {} for layer in plan.layers)
    assert plan.attention.kernel == "engine"


def test_every_layer_takes_the_fastest_of_its_type(ask: Ask) -> None:
    plan, _ = decide(ask(precision="fp32"))
    assert kernels(plan) == {("block_sparse", "fp32")}
    slower = dict(USUAL) | {"block_sparse fp32": {1.0: 210.0, 0.1: 40.0}}
    plan, _ = decide(ask(precision="fp32", curves=slower))
    assert kernels(plan) == {("engine", "fp32")}
    assert linear_time_us(plan.layers[1]) == 200.0
    assert (plan.attention.kernel, plan.attention.compute) == ("lsp", "fp32"), "fp32 is typed"


def test_the_reason_and_the_plan_have_all_that_was_measured(ask: Ask) -> None:
    plan, _ = decide(ask(precision="int8"))
    layer = plan.layers[1]
    assert layer.execution.times_us == {name: curve[1.0] for name, curve in USUAL.items()}
    assert layer.execution.threads == 2
    assert layer.execution.reason == (
        "qgemm int8: 60 µs; block_sparse int8 70 µs, block_sparse bf16 100 µs, block_sparse fp32 190 µs, "
        "matmul fp32 200 µs, gather fp32 230 µs (measured, 2 threads)"
    )
    assert plan.attention.reason.startswith("lsp bf16: 120 µs in all layers; exported fp32 500 µs; lsp fp32 200 µs")


def test_attention_that_stays_as_exported_is_told_with_its_reason(ask: Ask) -> None:
    left = {
        "a/Softmax": "its heads are mixed",
        "b/Softmax": "its heads are mixed",
        "c/Softmax": "it computes in DOUBLE",
    }
    words = "2 stay as exported: its heads are mixed; 1 stays as exported: it computes in DOUBLE"
    plan, _ = decide(ask(precision="fp32", left=left))
    assert plan.attention.left == left
    assert plan.attention.reason.startswith("lsp fp32: 200 µs in all other layers; exported fp32 500 µs")
    assert plan.attention.reason.endswith(f"(measured, 2 threads); {words}")
    plan, _ = decide(ask(precision="fp32", left=left, attention={}))
    assert (plan.attention.kernel, plan.attention.left, plan.attention.reason) == ("engine", left, words)
    plan, _ = decide(ask(precision="fp32", attention={}))
    assert plan.attention.reason == "left to the engine: no attention was found"


def test_typed_int8_stays_int8_even_where_it_is_slow(ask: Ask) -> None:
    slow = dict(USUAL) | {"qgemm int8": {1.0: 900.0}, "block_sparse int8": {1.0: 800.0, 0.1: 300.0}}
    plan, _ = decide(ask(precision="int8", curves=slow))
    assert kernels(plan) == {("block_sparse", "int8")}
    assert {layer.name for layer in inside(plan)} <= plan.weight_scales.keys()


def test_auto_leaves_int8_where_another_type_is_faster(ask: Ask) -> None:
    slow = dict(USUAL) | {"qgemm int8": {1.0: 150.0}, "block_sparse int8": {1.0: 140.0, 0.1: 90.0}}
    plan, _ = decide(ask(precision="auto", curves=slow))
    assert kernels(plan) == {("block_sparse", "bf16")}
    assert not plan.weight_scales
    assert "bf16: 100 µs, int8 takes 140 µs (measured, 2 threads)" in plan.layers[1].precision.reason
    plan, _ = decide(ask(precision="auto"))
    assert kernels(plan) == {("qgemm", "int8")}


def test_bf16_is_taken_back_once_where_the_loss_does_not_allow_it(ask: Ask) -> None:
    seen: list[bool] = []

    def loss(plan: Plan) -> float:
        seen.append(uses_bf16(plan))
        return 3.0 if uses_bf16(plan) else 0.5

    slow = dict(USUAL) | {"qgemm int8": {1.0: 150.0}, "block_sparse int8": {1.0: 140.0, 0.1: 90.0}}
    plan, _ = decide(ask(loss, precision="auto", curves=slow))
    assert seen.count(True) == 1, "all bf16 is checked together"
    assert not uses_bf16(plan)
    assert kernels(plan) == {("block_sparse", "int8")}, "int8 was within the budget"
    head = plan.layers[-1]
    assert (head.role, head.precision.dtype) == ("head", "fp32")
    assert head.precision.reason == "fp32: bf16 would exceed 1 point of loss on held-out images"
    assert (plan.attention.kernel, plan.attention.compute) == ("lsp", "fp32")
    assert "would exceed 1 point of loss" in plan.attention.reason


def test_what_bf16_loses_counts_when_zeros_are_added(ask: Ask) -> None:
    def loss(plan: Plan) -> float:
        zeros = sum(layer.sparsity.zeros for layer in plan.layers) / len(inside(plan))
        return (0.4 if uses_bf16(plan) else 0.0) + zeros

    plan, pruning = decide(ask(loss, sparsity="auto", precision="auto", max_drop=1.0))
    assert pruning is not None and uses_bf16(plan)
    assert plan.attention.compute == "bf16"
    assert 0.3 < loss(plan) - 0.4 <= 0.6, "zeros take what bf16 leaves of the budget"


def test_without_a_class_output_bf16_is_taken_and_the_reason_says_so(ask: Ask) -> None:
    plan, _ = decide(ask(None, precision="auto"))
    head = plan.layers[-1]
    assert head.precision.dtype == "bf16" and "no class output" in head.precision.reason


def test_typed_bf16_is_the_operators_but_for_convolutions(ask: Ask) -> None:
    plan, _ = decide(ask(lambda plan: 99.0, precision="bf16"))
    assert kernels(plan) == {("block_sparse", "bf16")}
    patch = plan.layers[0]
    assert (patch.role, patch.precision.dtype, patch.execution.kernel) == ("patch", "fp32", "engine")
    assert "convolution" in patch.precision.reason and "convolution" in patch.execution.reason
    assert plan.compute_type == "fp32" and plan.attention.compute == "bf16"


STOCK = {name: USUAL[name] for name in ("matmul fp32", "qgemm int8", "gather fp32")}


@pytest.mark.parametrize("slow_operator", [{}, {"block_sparse fp32": {1.0: 400.0, 0.5: 220.0, 0.1: 90.0}}])
def test_stock_operators_run_what_is_sparse_where_the_operator_is_missing_or_slow(
    ask: Ask, slow_operator: Curves
) -> None:
    plan, _ = decide(ask(precision="fp32", sparsity="block", flops=0.4, curves=STOCK | slow_operator))
    for layer in inside(plan):
        assert layer.execution.kernel == "gather"
        assert layer.execution.reason.startswith("gather fp32: ")
        assert linear_time_us(layer) == layer.execution.times_us["gather fp32"] < 200


def test_sparse_layers_are_looked_up_at_their_density(ask: Ask) -> None:
    plan, _ = decide(ask(precision="int8", sparsity="block", flops=0.5))
    for layer in inside(plan):
        left = float(plan.masks[layer.name].mean())
        expected = 40.0 if left == 0.5 else pytest.approx(layer.execution.times_us["block_sparse int8"])
        assert linear_time_us(layer) == expected
        assert f"{left:.0%} of the blocks survive" in layer.execution.reason
    assert kernels(plan) == {("block_sparse", "int8")}


def test_auto_adds_blocks_as_far_as_the_loss_allows(ask: Ask) -> None:
    def loss(plan: Plan) -> float:
        return sum(layer.sparsity.zeros for layer in plan.layers) / len(inside(plan)) * 2

    question = ask(loss, sparsity="auto", precision="int8", max_drop=1.0)
    plan, pruning = decide(question)
    assert pruning is not None and pruning.asked == "auto"
    assert plan.block_shape == (32, 32)
    assert kernels(plan) == {("block_sparse", "int8")}
    assert all(layer.sparsity.asked == "auto" and layer.sparsity.pattern == "block" for layer in inside(plan))
    assert not any("no faster" in layer.sparsity.reason for layer in plan.layers)
    assert 0.5 <= loss(plan) <= 1.0


@pytest.mark.parametrize(
    ("change", "curves", "why"),
    [
        ({"real_images": False}, USUAL, "real images"),
        ({"loss": None}, USUAL, "no class output"),
        ({"pruner": None}, USUAL, "install torch"),
        ({}, {"matmul fp32": {1.0: 10.0}, "block_sparse fp32": {1.0: 20.0, 0.1: 12.0}}, "no layer faster (measured)"),
        ({}, {"matmul fp32": {1.0: 10.0}, "block_sparse fp32": {1.0: 20.0, 0.1: 9.9}}, "less than 3%"),
    ],
)
def test_auto_stays_dense_without_the_means_or_the_gain(
    ask: Ask, change: dict[str, object], curves: Curves, why: str
) -> None:
    plan, pruning = decide(replace(ask(sparsity="auto", precision="fp32", curves=curves), **change))
    assert pruning is None and not plan.masks and plan.block_shape is None
    assert all(why in layer.sparsity.reason and layer.sparsity.asked == "auto" for layer in plan.layers)


def test_auto_goes_without_blocks_where_gradients_fail(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakePruner, keep: float) -> None:
        raise UserError("no gradient of NonZero")

    monkeypatch.setattr(FakePruner, "blocks", fail)
    plan, pruning = decide(ask(sparsity="auto"))
    assert pruning is None
    assert all("no gradient of NonZero" in layer.sparsity.reason for layer in plan.layers)


def test_auto_removes_no_more_blocks_than_flops_needs(ask: Ask) -> None:
    question = ask(sparsity="auto", flops=0.73, max_drop=1.0)
    decide(question)
    assert isinstance(question.pruner, FakePruner)
    assert min(question.pruner.kept) == 0.73
