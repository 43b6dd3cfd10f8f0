"""What a report says about its own result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from report_samples import sample_engine, sample_plan, sample_profile

from lsp_deploy.engines.fidelity import Fidelity
from lsp_deploy.recipe import Recipe
from lsp_deploy.reporting.judgement import budget_section, run_warnings
from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.steps.building import Built

EXPECTED = {"expected_drop_points": 0.8, "expected_drop_low_points": 0.5, "expected_drop_high_points": 1.2}
MEASURED = {"measured_drop_points": 1.4, "measured_drop_low_points": 0.9, "measured_drop_high_points": 1.9}


def fidelity(samples: int = 100, **fields: float) -> Fidelity:
    return Fidelity(samples=samples, sqnr_db=20.0, cosine=0.99, **fields)


def data(kind: str = "images", skipped: int = 0, preprocess_from: str = "model metadata") -> SimpleNamespace:
    dataset = SimpleNamespace(name="photos", kind=kind, skipped=skipped)
    return SimpleNamespace(calibration=dataset, held_out=dataset, preprocess_from=preprocess_from)


@pytest.mark.parametrize(("samples", "measure", "met"), [(499, "expected", True), (500, "measured", False)])
def test_which_drop_decides(samples: int, measure: str, met: bool) -> None:
    budget = budget_section(fidelity(samples, **EXPECTED, **MEASURED), Recipe(target="a100", max_drop=1.0))
    assert budget is not None
    assert (budget.measure, budget.met, budget.typed) == (measure, met, True)
    assert budget.drop_points == (0.8 if met else 1.4)


def test_the_default_budget() -> None:
    budget = budget_section(fidelity(**EXPECTED), Recipe(target="a100"))
    assert budget is not None
    assert (budget.max_drop_points, budget.typed) == (1.0, False)
    assert budget.warning is None


@pytest.mark.parametrize(("low", "high", "settled"), [(-0.4, 1.6, False), (2.0, 4.0, True)])
def test_an_interval_wider_than_the_budget(low: float, high: float, settled: bool) -> None:
    ends = {"expected_drop_low_points": low, "expected_drop_high_points": high}
    budget = budget_section(fidelity(**EXPECTED | ends), Recipe(target="a100"))
    assert budget is not None and budget.warning is not None
    assert "wider than the budget of 1" in budget.warning
    assert ("more held-out images" in budget.warning) != settled


def test_without_class_scores_there_is_no_budget() -> None:
    assert budget_section(fidelity(), Recipe(target="a100")) is None


def test_nothing_to_warn_of() -> None:
    plan = sample_plan(blocks=1, width=64)
    for layer in plan.layers:
        layer.sparsity.pattern = "dense"
    rows = layer_rows(plan, sample_engine(plan))
    budget = budget_section(fidelity(**EXPECTED), Recipe(target="a100"))
    assert run_warnings(data(), rows, budget, Built(info=sample_engine(plan)), fidelity(**EXPECTED)) == []  # type: ignore[arg-type]


def test_everything_to_warn_of() -> None:
    plan = sample_plan(blocks=1, width=64)
    plan.layers[2].sparsity.pattern = "block"
    engine = sample_engine(plan, other_precision=[plan.layers[1].name])
    bad = fidelity(**EXPECTED | {"expected_drop_points": 3.0, "expected_drop_high_points": 9.0}, non_finite_samples=2)
    warnings = run_warnings(
        data(skipped=3, preprocess_from="default"),  # type: ignore[arg-type]
        layer_rows(plan, engine),
        budget_section(bad, Recipe(target="a100", max_drop=1.0)),
        Built(info=engine, failures=["the builder failed"]),
        bad,
    )
    for expected in (
        "the builder failed",
        "NaN or infinity for 2 samples",
        "the expected top-1 loss is 3.00 points: --max-drop 1: not met",
        "wider than the budget of 1",
        "imagenet was assumed",
        "3 images of photos did not decode",
        f"1 of 6 linear layers in another element type than asked: {plan.layers[1].name}",
        f"the block zeros of 1 layer stay in ordinary MatMuls, at the dense speed: {plan.layers[2].name}: left to the",
        "2:4 zeros of 3 layers gain no speed in the tensorrt_rtx engine",
    ):
        assert sum(expected in warning for warning in warnings) == 1, expected
    assert len(warnings) == 9


def test_block_zeros_that_an_operator_skips_are_no_warning() -> None:
    plan = sample_plan(blocks=1, width=64)
    for layer in plan.layers:
        layer.sparsity.pattern, layer.execution.kernel = "block", "block_sparse"
    rows = layer_rows(plan, sample_engine(plan))
    warnings = run_warnings(data(), rows, None, Built(info=sample_engine(plan)), fidelity())  # type: ignore[arg-type]
    assert not any("ordinary MatMuls" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("samples", "confidence", "max_drop", "warns"),
    [
        (100, 0.2, None, True),
        (100, 9.9, None, True),
        (100, 55.0, None, False),
        (100, 55.0, 60.0, True),
        (500, 0.2, None, False),
    ],
)
def test_an_expected_loss_that_cannot_reach_the_budget_is_no_comfort(
    samples: int, confidence: float, max_drop: float | None, warns: bool
) -> None:
    measured = fidelity(samples, **EXPECTED, **MEASURED, dense_confidence_percent=confidence)
    budget = budget_section(measured, Recipe(target="a100", max_drop=max_drop))
    assert budget is not None
    warnings = run_warnings(data(), [], budget, Built(), measured)  # type: ignore[arg-type]
    assert any(f"a probability of {confidence:g} % on average" in warning for warning in warnings) == warns


@pytest.mark.parametrize(("disturbed", "discarded", "warns"), [(0, 0, False), (10, 0, True), (2, 2, False)])
def test_times_of_a_busy_machine_are_called_so(disturbed: int, discarded: int, warns: bool) -> None:
    profile = sample_profile(blocks=10, disturbed_blocks=disturbed, discarded_blocks=discarded)
    warnings = run_warnings(data(), [], None, Built(not_built="--no-build"), fidelity(), [profile])  # type: ignore[arg-type]
    assert any("other programs took CPU time in 10 of 10 blocks" in warning for warning in warnings) == warns


def test_without_an_engine_nothing_is_said_of_its_kernels() -> None:
    plan = sample_plan(blocks=1, width=64)
    assert run_warnings(data(), layer_rows(plan, None), None, Built(not_built="--no-build"), fidelity()) == []  # type: ignore[arg-type]
