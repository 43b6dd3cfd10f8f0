"""What a budget counts, for every field of a recipe that can hold one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from networks import digits_network  # noqa: E402
from pass_models import layer as planned  # noqa: E402
from pass_models import plan  # noqa: E402

from lsp_deploy.errors import UserError  # noqa: E402
from lsp_deploy.hardware.cost_model import layer_cost  # noqa: E402
from lsp_deploy.hardware.cpu_timings import CpuTimings, LayerTimes  # noqa: E402
from lsp_deploy.hardware.target import load_target  # noqa: E402
from lsp_deploy.plan import ExecutionDecision, Plan  # noqa: E402
from lsp_deploy.recipe import Recipe  # noqa: E402
from lsp_deploy.search.block_curves import block_mask_of, block_sizes  # noqa: E402
from lsp_deploy.search.measure import Measure, measure_of, planned_cost  # noqa: E402
from lsp_deploy.steps.pruning import missed_budget  # noqa: E402
from lsp_deploy.steps.timing import layer_shape  # noqa: E402

LAYERS = digits_network(samples=2).layers


def measured(target: str = "a100", dtype: str = "fp16", attention: int = 1000, **fields: object):
    recipe = Recipe.model_validate({"target": target, "sparsity": "block", "block": "16x16", **fields})
    return measure_of(recipe, load_target(target), {layer.name: dtype for layer in LAYERS}, attention)


@pytest.mark.parametrize(
    ("field", "value", "kind", "budget", "unit"),
    [
        ("flops", 0.5, "flops", 0.5, "FLOP"),
        ("max_latency_ms", 0.25, "latency_us", 250.0, "µs"),
        ("max_energy_mj", 3.0, "energy_uj", 3000.0, "µJ"),
        ("max_parameters", 12345, "parameters", 12345.0, "parameter"),
        ("max_size_mb", 0.125, "bytes", 125000.0, "byte"),
    ],
)
def test_each_field_has_its_measure_and_its_unit(field: str, value: float, kind: str, budget: float, unit: str) -> None:
    measure, found = measured(**{field: value})
    assert (measure.kind, found, measure.unit) == (kind, budget, unit)
    assert measure.always == 0
    assert measure.block == (16, 16)
    for layer in LAYERS:
        sizes = block_sizes(layer, measure.block)
        costs = measure.of_blocks(layer, sizes)
        assert costs.shape == (len(sizes) + 1,)
        assert np.isfinite(costs).all() and (np.diff(costs) <= 1e-9).all() and costs[0] > 0


@pytest.mark.parametrize(("field", "saves"), [("max_latency_ms", False), ("max_energy_mj", False), ("flops", True)])
def test_zeros_of_a_layer_that_runs_dense_save_no_time_but_flops(field: str, saves: bool) -> None:
    layer = LAYERS[0]
    recipe = Recipe.model_validate({"target": "a100", "sparsity": "block", field: 0.5})
    measure, _ = measure_of(recipe, load_target("a100"), {layer.name: "fp16"}, 0, dense_only=[layer.name])
    costs = measure.of_blocks(layer, block_sizes(layer, measure.block))
    assert costs[0] == pytest.approx(measure.of_dense(layer))
    assert (costs[-1] < costs[0]) == saves


def test_without_a_budget_flops_are_counted() -> None:
    measure, budget = measured()
    assert (measure.kind, budget) == ("flops", None)


def test_flops_and_parameters_and_bytes_are_exact() -> None:
    layer = next(layer for layer in LAYERS if layer.role == "fc1")
    sizes = block_sizes(layer, (16, 16))
    left = layer.K * layer.N - np.concatenate([[0], np.cumsum(sizes)])
    flops, _ = measured(flops=0.5)
    np.testing.assert_array_equal(flops.of_blocks(layer, sizes), 2.0 * layer.M * left)
    assert flops.of_dense(layer) == 2.0 * layer.M * layer.K * layer.N
    parameters, _ = measured(max_parameters=1)
    np.testing.assert_array_equal(parameters.of_blocks(layer, sizes), left)
    for dtype, width in (("fp16", 2), ("fp32", 4), ("int8", 1)):
        size, _ = measured(max_size_mb=1, dtype=dtype)
        # Every surviving block has its place in 4 bytes; a layer that would not shrink is stored dense.
        stored = np.arange(len(sizes), -1, -1) * (16 * 16 * width + 4)
        np.testing.assert_array_equal(size.of_blocks(layer, sizes), np.minimum(stored, layer.K * layer.N * width))


def test_attention_counts_where_flops_are_the_models() -> None:
    assert measured(flops=0.5, flops_of="model", attention=777)[0].always == 777
    assert measured(flops=0.5, flops_of="linear", attention=777)[0].always == 0


def test_a_dense_layer_costs_what_the_target_says() -> None:
    measure, _ = measured(max_latency_ms=1)
    layer = LAYERS[3]
    assert measure.of_dense(layer) == layer_cost(
        "latency_us", measure.target, layer.M, layer.K, layer.N, "fp16", pattern="dense", block=(16, 16)
    )


@pytest.mark.parametrize("field", ["max_latency_ms", "max_energy_mj"])
def test_a_target_without_figures_cannot_estimate(field: str) -> None:
    with pytest.raises(UserError, match="cpu") as raised:
        measure, _ = measured(target="cpu", dtype="fp32", **{field: 1.0})
        measure.of_dense(LAYERS[1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("field", "value"), [("flops", 0.5), ("max_parameters", 100), ("max_size_mb", 1.0)])
def test_a_target_without_figures_can_count(field: str, value: float) -> None:
    measure, _ = measured(target="cpu", dtype="fp32", **{field: value})
    assert isinstance(measure, Measure)
    assert measure.of_dense(LAYERS[1]) > 0


@pytest.mark.parametrize("field", ["max_latency_ms", "max_energy_mj", "max_size_mb"])
def test_a_plan_is_held_to_its_budget_with_the_element_types_as_decided(field: str) -> None:
    def plan_of(dtype: str, kept_blocks: int) -> Plan:
        decided = plan(
            *(planned(one.name, one.K, one.N, dtype, role=one.role).model_copy(update={"M": one.M}) for one in LAYERS)
        )
        wide = next(one for one in LAYERS if one.role == "fc1")
        gone = np.arange(len(block_sizes(wide, (16, 16)))) >= kept_blocks
        decided.masks[wide.name] = block_mask_of(wide, (16, 16), gone)
        return decided

    measure, _ = measured(dtype="int8", **{field: 1.0})
    cost = planned_cost(measure, plan_of("int8", 8))
    assert cost < planned_cost(measure, plan_of("int8", 64))
    budget = cost / (1e6 if field == "max_size_mb" else 1e3)
    recipe = Recipe.model_validate({"target": "a100", "sparsity": "block", "block": "16x16", field: budget})
    assert missed_budget(plan_of("int8", 8), recipe, load_target("a100"), 0) is None
    missed = missed_budget(plan_of("fp32", 64), recipe, load_target("a100"), 0)
    assert missed is not None and f"--{field.replace('_', '-')}" in missed and "estimated" in missed


CURVES = {"matmul fp32": {1.0: 100.0}, "block_sparse fp32": {1.0: 120.0, 0.5: 70.0, 0.1: 30.0}}
TIMINGS = CpuTimings(2, {layer.name: LayerTimes(layer_shape(layer, (16, 16)), CURVES) for layer in LAYERS})


def timed(**fields: object) -> tuple[Measure, float | None]:
    recipe = Recipe.model_validate({"target": "cpu", **fields})
    return measure_of(recipe, load_target("cpu"), {layer.name: "fp32" for layer in LAYERS}, 0, TIMINGS)


def test_latency_on_a_cpu_is_what_was_measured() -> None:
    measure, budget = timed(sparsity="block", block="16x16", max_latency_ms=0.5)
    assert (measure.kind, measure.is_measured, budget) == ("latency_us", True, 500.0)
    layer = next(one for one in LAYERS if one.role == "fc1")
    costs = measure.of_blocks(layer, block_sizes(layer, (16, 16)))
    assert costs[0] == measure.of_dense(layer) == 100.0, "dense, the engine's own MatMul is faster"
    assert costs[len(costs) // 2] == pytest.approx(70.0)
    assert costs[-1] == 30.0
    assert (np.diff(costs) <= 0).all()
    shared = replace(layer, M=3 * layer.M)  # a weight that three layers use
    np.testing.assert_allclose(measure.of_blocks(shared, block_sizes(layer, (16, 16))), 3 * costs)
    assert measure.times_key != timed(sparsity="block", flops=0.5)[0].times_key == {}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"sparsity": "auto"}, "latency_us"),
        ({"sparsity": "auto", "allocator": "lsp"}, "flops"),
        ({"sparsity": "auto", "flops": 0.5}, "flops"),
        ({"sparsity": "block"}, "flops"),
    ],
)
def test_zeros_that_auto_adds_are_to_save_time(fields: dict[str, object], kind: str) -> None:
    assert timed(**fields)[0].kind == kind


def test_a_latency_budget_on_a_cpu_is_checked_by_the_times_in_the_plan() -> None:
    recipe = Recipe.model_validate({"target": "cpu", "sparsity": "block", "max_latency_ms": 0.5})
    decided = plan(planned("a", 64, 64), planned("b", 64, 64))
    for layer, time in zip(decided.layers, (300.0, 250.0), strict=True):
        layer.execution = ExecutionDecision(kernel="block_sparse", times_us={"block_sparse fp32": time}, threads=2)
    missed = missed_budget(decided, recipe, load_target("cpu"), 0)
    assert missed is not None and "0.55 in its linear layers (measured" in missed and "estimated" not in missed
    decided.layers[0].execution.times_us["block_sparse fp32"] = 200.0
    assert missed_budget(decided, recipe, load_target("cpu"), 0) is None
    decided.layers[0].execution.kernel = "engine"
    unknown = missed_budget(decided, recipe, load_target("cpu"), 0)
    assert unknown is not None and "was not checked: the plan does not say what a takes" in unknown
