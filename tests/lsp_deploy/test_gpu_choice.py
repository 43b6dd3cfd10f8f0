"""What runs each layer on a GPU, and which zeros `auto` adds there, decided from made-up times and a made-up loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from digits import ASSETS, digits_statistics
from fake_pruner import INSIDE, FakePruner

from lsp_deploy.allocation.decide import decide
from lsp_deploy.allocation.execution import linear_time_us
from lsp_deploy.allocation.gpu_execution import gpu_time_us
from lsp_deploy.allocation.question import Question
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cpu_timings import LayerTimes
from lsp_deploy.hardware.gpu_timings import GpuTimings
from lsp_deploy.hardware.target import Peak, load_target
from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps.preparation import PreparedModel, prepare
from lsp_deploy.steps.timing import layer_shape

Curves = Mapping[str, Mapping[float, float]]
Ask = Callable[..., Question]

USUAL: Curves = {
    "matmul fp16": {1.0: 10.0},
    "matmul int8": {1.0: 6.0},
    "block_sparse fp16": {1.0: 14.0, 0.6: 9.0, 0.4: 6.0, 0.2: 4.0},
    "block_sparse int8": {1.0: 9.0, 0.6: 6.5, 0.4: 4.0, 0.2: 3.0},
}
TWO_FOUR = {"fp16": 8.0, "int8": 5.0}


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return prepare(ASSETS / "digits_vit.onnx", Recipe(target="a100"), load_target("a100"))


@pytest.fixture(scope="module")
def statistics(prepared: PreparedModel):
    return digits_statistics(prepared)


@pytest.fixture
def ask(prepared: PreparedModel, statistics) -> Ask:
    """Return a question about the embedded model on a GPU that is here."""

    def ask(
        loss: Callable[[Plan], float] | None = lambda plan: 0.0,
        *,
        curves: Curves | None = USUAL,
        two_four: Mapping[str, float] = TWO_FOUR,
        **asked: object,
    ) -> Question:
        recipe = Recipe.model_validate({"target": "a100", "sparsity": "none", **asked})
        inner = [layer for layer in prepared.layers if layer.role in INSIDE]
        timings = curves and GpuTimings(
            "a made-up GPU",
            {layer.name: LayerTimes(layer_shape(layer, recipe.block_shape), curves) for layer in inner},
            {layer.name: two_four for layer in inner},  # type: ignore[misc]
        )
        return Question(
            recipe=recipe,
            target=load_target("a100"),
            model_sha256=prepared.sha256,
            opset=prepared.opset,
            compute_type="fp16",
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
            gpu_timings=timings or None,
        )

    return ask


def inside(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer.role in INSIDE]


def kernels(plan: Plan) -> set[tuple[str, str, str]]:
    return {(layer.execution.kernel, layer.sparsity.pattern, layer.precision.dtype) for layer in inside(plan)}


def pruner_of(question: Question) -> FakePruner:
    assert isinstance(question.pruner, FakePruner)
    return question.pruner


def test_dense_layers_are_left_to_the_engine_with_what_was_measured(ask: Ask) -> None:
    plan, _ = decide(ask())
    assert kernels(plan) == {("engine", "dense", "int8")}
    layer = inside(plan)[0]
    assert layer.execution.times_us == {"matmul fp16": 10.0, "matmul int8": 6.0}
    assert layer.execution.reason == (
        "left to the engine: matmul int8 6.0 µs, matmul fp16 10.0 µs (measured on a made-up GPU)"
    )
    assert linear_time_us(layer) == 6.0
    head = next(layer for layer in plan.layers if layer.role == "head")
    assert head.execution.reason == "left to the engine" and head.execution.times_us == {}


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "fp16"), ("int8", "int8")])
def test_auto_leaves_int8_where_the_compute_type_is_faster(ask: Ask, precision: str, dtype: str) -> None:
    plan, _ = decide(ask(curves=USUAL | {"matmul int8": {1.0: 11.0}}, precision=precision))
    assert kernels(plan) == {("engine", "dense", dtype)}
    if precision == "auto":
        reason = inside(plan)[0].precision.reason
        assert reason == "fp16: 10.0 µs, int8 takes 11.0 µs (measured on a made-up GPU)"
        assert not plan.weight_scales


def test_blocks_that_were_asked_for_are_run_by_the_operator_even_where_it_is_slower(ask: Ask) -> None:
    plan, _ = decide(ask(sparsity="block", block="16x16", flops=0.8, precision="fp16"))
    assert kernels(plan) == {("block_sparse", "block", "fp16")}
    assert all("no faster than the dense layer, " in layer.execution.reason for layer in inside(plan))
    assert "(measured on a made-up GPU)" in inside(plan)[0].execution.reason


def test_auto_takes_blocks_where_they_beat_two_four(ask: Ask) -> None:
    question = ask(sparsity="auto", precision="fp16")
    plan, pruning = decide(question)
    assert kernels(plan) == {("block_sparse", "block", "fp16")} and pruning is not None
    assert plan.block_shape == (32, 32)
    # After a look on the way, the first mask is already one that beats 2:4: 8 µs of 10, less 3 %.
    assert pruner_of(question).kept[:2] == pytest.approx([0.95, 0.97 * 0.8])
    assert all(layer.sparsity.asked == "auto" for layer in inside(plan))
    assert all("faster than the dense layer, " in layer.execution.reason for layer in inside(plan))
    assert gpu_time_us(question, plan) < 0.97 * 8.0 * len(inside(plan))


def test_auto_takes_two_four_where_blocks_lose_too_much(ask: Ask) -> None:
    def loss(plan: Plan) -> float:
        return 5.0 if any(layer.sparsity.pattern == "block" for layer in plan.layers) else 0.0

    question = ask(loss, sparsity="auto", precision="fp16")
    plan, _ = decide(question)
    assert kernels(plan) == {("engine", "2:4", "fp16")}
    assert pruner_of(question).kept == [0.95]  # one look was enough
    for layer in inside(plan):
        assert layer.sparsity.reason.startswith("2:4 pays (measured to save 2 µs on a made-up GPU, ")
        found = "5.00 points are lost with 95% of the time left"
        assert layer.sparsity.reason.endswith(f"too few to save 3% of the time (measured on a made-up GPU); {found}")
        assert linear_time_us(layer) == 8.0


def test_what_loses_little_on_the_way_is_looked_at_where_it_would_pay(ask: Ask) -> None:
    def loss(plan: Plan) -> float:
        lost = 1 - min((float(mask.mean()) for mask in plan.masks.values()), default=1.0)
        blocks = any(layer.sparsity.pattern == "block" for layer in plan.layers)
        return 4.0 * lost if blocks else 0.0  # 0.25 lose a point

    question = ask(loss, sparsity="auto", precision="fp16", max_drop=0.7)
    plan, _ = decide(question)
    assert kernels(plan) == {("engine", "2:4", "fp16")}
    assert pruner_of(question).kept == pytest.approx([0.95, 0.97 * 0.8])
    assert all(layer.sparsity.reason.endswith(" points are lost with 78% of the time left") for layer in inside(plan))


def test_one_shot_looks_at_nothing_on_the_way(ask: Ask) -> None:
    question = ask(sparsity="auto", precision="fp16", search="one-shot")
    decide(question)
    assert pruner_of(question).kept[0] == pytest.approx(0.97 * 0.8)


def test_two_four_that_was_measured_to_gain_nothing_is_not_added(ask: Ask) -> None:
    curves = {"matmul fp16": {1.0: 10.0}}
    plan, _ = decide(ask(sparsity="auto", precision="fp16", curves=curves, two_four={"fp16": 9.9}))
    assert kernels(plan) == {("engine", "dense", "fp16")}
    words = "left dense: 2:4 makes this layer no faster (measured on a made-up GPU)"
    assert all(layer.sparsity.reason.startswith(words) for layer in inside(plan))


def test_a_search_that_cannot_win_is_not_begun(ask: Ask) -> None:
    slow = {name: {density: 2 * time for density, time in curve.items()} for name, curve in USUAL.items()}
    curves = USUAL | {name: slow[name] for name in slow if name.startswith("block_sparse")}
    question = ask(sparsity="auto", precision="fp16", curves=curves, two_four={"fp16": 7.9})
    plan, _ = decide(question)
    assert pruner_of(question).kept == []
    assert all("zero blocks cannot save 3% of the time" in layer.sparsity.reason for layer in inside(plan))


def test_an_operator_that_was_not_timed_gets_no_blocks_by_auto(ask: Ask) -> None:
    question = ask(sparsity="auto", precision="fp16", curves={"matmul fp16": {1.0: 10.0}})
    plan, _ = decide(question)
    assert pruner_of(question).kept == []
    assert all("the operator was not timed" in layer.sparsity.reason for layer in inside(plan))


@pytest.mark.parametrize("asked", [{"flops": 0.7}, {"allocator": "lsp"}])
def test_auto_looks_for_no_blocks_where_something_else_than_time_counts(ask: Ask, asked: dict[str, object]) -> None:
    question = ask(sparsity="auto", precision="fp16", **asked)
    plan, _ = decide(question)
    assert pruner_of(question).kept == [] and not any(layer.sparsity.pattern == "block" for layer in plan.layers)


def test_blocks_that_auto_took_are_run_by_the_engine_where_that_is_faster(ask: Ask, monkeypatch) -> None:
    """One layer keeps nearly all of its blocks: there the operator would be slower."""
    whole = FakePruner.blocks

    def with_a_full_one(self: FakePruner, keep: float):
        pruning = whole(self, keep)
        name = next(name for name in pruning.masks if pruning.masks[name].shape[1] > 64)
        pruning.masks[name][:] = True
        pruning.masks[name][:32, :32] = False
        return pruning

    monkeypatch.setattr(FakePruner, "blocks", with_a_full_one)
    plan, _ = decide(ask(sparsity="auto", precision="fp16"))
    assert kernels(plan) == {("block_sparse", "block", "fp16"), ("engine", "block", "fp16")}
    (left,) = [layer for layer in inside(plan) if layer.execution.kernel == "engine"]
    assert left.execution.reason.startswith("left to the engine, at the dense speed: ")
    assert "no faster than the dense layer" in left.execution.reason


def test_without_a_gpu_the_choice_is_an_estimate_and_says_so(ask: Ask) -> None:
    question = ask(sparsity="auto", precision="fp16", curves=None)
    peak = {"fp16": Peak(dense=0.1)}  # TFLOP/s: slow enough for zeros to matter in layers so small
    plan, _ = decide(replace(question, target=question.target.model_copy(update={"peak": peak})))
    assert ("block_sparse", "block", "fp16") in kernels(plan)
    chosen = [layer for layer in inside(plan) if layer.execution.kernel == "block_sparse"]
    assert all("(estimated from a100's peak rates" in layer.execution.reason for layer in chosen)
    assert all(layer.execution.times_us == {} for layer in plan.layers)


def test_a_small_estimated_saving_is_not_worth_a_search(ask: Ask) -> None:
    question = ask(sparsity="auto", precision="fp16", curves=None)
    plan, pruning = decide(question)
    assert pruning is None and pruner_of(question).kept == []
    words = "zero blocks cannot save 15% of the time (estimated)"
    assert all(layer.sparsity.reason.endswith(words) for layer in inside(plan))


def test_a_target_without_figures_gets_no_blocks_by_auto(ask: Ask) -> None:
    question = ask(sparsity="auto", precision="fp16", curves=None)
    bare = replace(question, target=question.target.model_copy(update={"peak": {}}))
    plan, _ = decide(bare)
    assert all("blocks were not tried: a100 has no peak rates" in layer.sparsity.reason for layer in inside(plan))
    with pytest.raises(UserError, match="no peak rates"):
        gpu_time_us(bare, plan)
