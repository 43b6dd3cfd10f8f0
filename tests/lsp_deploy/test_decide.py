"""Decisions from what was asked and what is measured, with a pruner and a loss that are made up."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from digits import ASSETS, digits_statistics
from fake_pruner import INSIDE, FakePruner

from lsp_deploy.allocation.decide import decide
from lsp_deploy.allocation.pruning import OutOfReachError, Pruning, adopt
from lsp_deploy.allocation.question import Question
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import load_target
from lsp_deploy.plan import Plan
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps.preparation import PreparedModel, prepare


def zeros(plan: Plan) -> int:
    return sum(layer.name in plan.masks for layer in plan.layers)


def kept_columns(plan: Plan) -> dict[str, float]:
    return {name: float(mask.mean()) for name, mask in plan.masks.items()}


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return prepare(ASSETS / "digits_vit.onnx", Recipe(target="a100"), load_target("a100"))


@pytest.fixture(scope="module")
def statistics(prepared: PreparedModel):
    return digits_statistics(prepared)


@pytest.fixture
def ask(prepared: PreparedModel, statistics, tmp_path: Path):
    """Return a question about the embedded model."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        'base = "a100"\nname = "tiny"\n[pays]\nsparse24_min_k = 16\nsparse24_min_n = 16\nsource = "a test"\n'
        "block_zeros_min = 0.99\n"  # 2:4 or nothing
    )

    def ask(
        loss: Callable[[Plan], float] | None = lambda plan: 0.0,
        *,
        keep: float | None = None,
        pruner: bool = True,
        target: str = str(path),
        **asked: object,
    ) -> Question:
        recipe = Recipe.model_validate({"target": target, "precision": "fp16", **asked})
        return Question(
            recipe=recipe,
            target=load_target(target),
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
            pruner=FakePruner(list(prepared.layers), recipe.flops if keep is None else keep) if pruner else None,
            why_no_pruner="install torch",
            loss=loss,
        )

    return ask


def test_none_is_none(ask) -> None:
    plan, pruning = decide(ask(sparsity="none"))
    assert pruning is None and not plan.masks
    assert {layer.sparsity.reason for layer in plan.layers} == {"left dense: --sparsity none"}


def test_typed_two_four_takes_every_layer_that_can(ask) -> None:
    plan, pruning = decide(ask(loss=lambda plan: 99.0, sparsity="2:4"))
    assert pruning is not None
    for layer in plan.layers:
        assert (layer.sparsity.pattern == "2:4") == (layer.role in INSIDE)
        assert layer.sparsity.reason.startswith("asked for" if layer.role in INSIDE else "left dense")
        if layer.role in INSIDE:
            assert layer.sparsity.zeros == 0.5 and layer.sparsity.method == "fake"
            assert layer.recovery.method == "reconstruct"
            assert layer.name in plan.weights


@pytest.mark.parametrize("recover", [True, False])
def test_what_recovery_did_is_said_of_layers_without_zeros_too(ask, recover: bool) -> None:
    plan, _ = decide(replace(ask(sparsity="2:4"), recover=recover))
    for layer in plan.layers:
        dense = layer.sparsity.pattern == "dense"
        assert layer.recovery.reason == ("nothing was pruned" if dense else "fake" if recover else "not asked for")


@pytest.mark.parametrize("fits", [0, 1, 5, 16])
def test_auto_takes_the_least_damaging_layers_that_fit_the_budget(ask, fits: int) -> None:
    plan, _ = decide(ask(loss=lambda plan: 0.3 * zeros(plan), sparsity="auto", max_drop=0.3 * fits + 0.1))
    chosen = [layer.name for layer in plan.layers if layer.sparsity.pattern == "2:4"]
    inside = [layer.name for layer in plan.layers if layer.role in INSIDE]
    assert chosen == inside[len(inside) - fits :]
    for layer in plan.layers:
        if layer.name in inside and layer.name not in chosen:
            assert "would exceed" in layer.sparsity.reason and "points of loss" in layer.sparsity.reason


def test_auto_stops_where_flops_are_met(ask) -> None:
    plan, _ = decide(ask(sparsity="auto", flops=0.8, max_drop=50))
    flops = {layer.name: layer.flops * (0.5 if layer.name in plan.masks else 1) for layer in plan.layers}
    assert 0.7 < sum(flops.values()) / sum(layer.flops for layer in plan.layers) <= 0.8
    assert any("is met without it" in layer.sparsity.reason for layer in plan.layers)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"real_images": False}, "real images"),
        ({"held_out": 19}, "fewer than 20 images"),
        ({"loss": None}, "no class output"),
        ({"pruner": None}, "install torch"),
    ],
)
def test_auto_prunes_nothing_without_the_means(ask, change: dict[str, object], why: str) -> None:
    plan, pruning = decide(replace(ask(sparsity="auto"), **change))
    assert pruning is None and not plan.masks
    assert all(why in layer.sparsity.reason for layer in plan.layers if layer.role in INSIDE)


def test_auto_prunes_nothing_where_it_does_not_pay(ask) -> None:
    plan, _ = decide(ask(sparsity="auto", target="a100"))  # these layers are too small for 2:4 there
    assert not plan.masks
    assert all(layer.sparsity.reason.startswith("left dense") for layer in plan.layers)


def test_blocks_to_a_budget_are_asked_for_once(ask) -> None:
    question = ask(sparsity="block", flops=0.5, loss=lambda plan: 99.0)
    plan, pruning = decide(question)
    assert question.pruner.kept == [0.5]
    assert pruning is not None and plan.block_shape == (32, 32)
    for layer in plan.layers:
        assert (layer.sparsity.pattern == "block") == (layer.role in INSIDE)
    assert any(layer.sparsity.reason.startswith("the first columns stay") for layer in plan.layers)


@pytest.mark.parametrize("keep", [1.0, 1.7])
def test_a_budget_that_is_met_needs_no_pruning(ask, keep: float) -> None:
    question = ask(sparsity="block", max_parameters=10**9, keep=keep)
    plan, pruning = decide(question)
    assert pruning is None and question.pruner.kept == []
    assert all("met without pruning" in layer.sparsity.reason for layer in plan.layers)


@pytest.mark.parametrize("limit", [0.95, 0.7, 0.35])
def test_without_a_budget_blocks_go_as_far_as_the_loss_allows(ask, limit: float) -> None:
    question = ask(sparsity="block", max_drop=1.0)
    lost = replace(question, loss=lambda plan: 0.0 if question.pruner.kept[-1] > limit - 1e-9 else 5.0)
    plan, pruning = decide(lost)
    assert pruning is not None and plan.masks
    assert kept_columns(plan) == pytest.approx(kept_columns(adopt(plan, question.pruner.blocks(limit))))
    tried = [round(keep, 3) for keep in question.pruner.kept[:-1]]
    assert len(tried) == len(set(tried)) < 9, "few, and nothing twice"


def test_without_a_budget_the_search_stays_within_reach(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FakePruner.blocks

    def blocks(self: FakePruner, keep: float) -> Pruning:
        if keep < 0.55:
            raise OutOfReachError("the budget cannot be met")
        return whole(self, keep)

    monkeypatch.setattr(FakePruner, "blocks", blocks)
    question = ask(sparsity="block", max_drop=1.0)
    plan, pruning = decide(question)
    assert pruning is not None and plan.masks
    assert kept_columns(plan) == kept_columns(adopt(plan, question.pruner.blocks(0.55)))


@pytest.mark.parametrize(("budget", "words"), [(1.0, "1 point"), (1.00253, "1 point"), (2.5, "2.5 points")])
def test_where_no_block_fits_the_model_stays_dense(ask, budget: float, words: str) -> None:
    plan, pruning = decide(ask(sparsity="block", max_drop=budget, loss=lambda plan: 9.0 if plan.masks else 0.0))
    assert pruning is None and not plan.masks and not plan.weights
    assert all(f"fits {words} of loss" in layer.sparsity.reason for layer in plan.layers)


@pytest.mark.parametrize(
    ("asked", "change", "words"),
    [
        ({"flops": 0.5}, {"pruner": None}, "install torch"),
        ({}, {"pruner": None}, "install torch"),
        ({}, {"loss": None}, "needs --flops or another budget"),
    ],
)
def test_blocks_without_the_means_are_bad_input(
    ask, asked: dict[str, object], change: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        decide(replace(ask(sparsity="block", **asked), **change))
    assert "\n" not in str(raised.value)


def test_int8_is_taken_back_where_it_costs_too_much_and_zeros_come_after(ask) -> None:
    seen: list[tuple[int, int]] = []

    def loss(plan: Plan) -> float:
        int8 = sum(layer.precision.dtype == "int8" for layer in plan.layers)
        seen.append((int8, zeros(plan)))
        return 0.1 * int8 + 0.5 * zeros(plan)

    plan, _ = decide(ask(loss, sparsity="auto", precision="auto", max_drop=1.0))
    assert sum(layer.precision.dtype == "int8" for layer in plan.layers) == 10
    assert not plan.masks
    assert all(name in plan.weight_scales for name in
               (layer.name for layer in plan.layers if layer.precision.dtype == "int8"))  # fmt: skip
    first_pruned = next(place for place, (_, pruned) in enumerate(seen) if pruned)
    assert all(pruned for _, pruned in seen[first_pruned:])


def test_a_default_budget_on_top_of_typed_choices_is_explained(ask) -> None:
    def loss(plan: Plan) -> float:
        return (31.7 if plan.masks else 0.0) + 0.1 * sum(layer.precision.dtype == "int8" for layer in plan.layers)

    plan, _ = decide(ask(loss, sparsity="2:4", precision="auto"))
    reasons = {layer.precision.reason for layer in plan.layers}
    words = "32.7 points of loss (1 more than what was asked for loses by itself)"
    assert f"fp16: int8 here would exceed {words} on held-out images" in reasons


def test_scales_are_those_of_the_weights_that_are_left(ask) -> None:
    plan, _ = decide(ask(sparsity="2:4", precision="int8"))
    for layer in plan.layers:
        if layer.precision.dtype == "int8" and layer.name in plan.masks:
            left = np.abs(plan.weights[layer.name] * plan.masks[layer.name]).max(axis=0)
            np.testing.assert_allclose(plan.weight_scales[layer.name] * 127, left, rtol=2e-3)


@pytest.mark.parametrize("sparsity", ["2:4", "auto"])
def test_what_is_excluded_gets_no_two_four(ask, sparsity: str) -> None:
    plan, _ = decide(ask(sparsity=sparsity, exclude="blocks.0/"))
    assert plan.masks
    for layer in plan.layers:
        if "blocks.0/" in layer.name:
            assert layer.name not in plan.masks
            assert layer.sparsity.reason == "left dense: --exclude blocks.0/ names it"


def test_auto_leaves_a_model_dense_that_cannot_be_differentiated(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakePruner, names: Collection[str]) -> dict[str, float]:
        raise UserError("operator Odd (node o) cannot be differentiated")

    monkeypatch.setattr(FakePruner, "two_four_damages", refuse)
    plan, pruning = decide(ask(sparsity="auto"))
    assert pruning is None and not plan.masks
    assert all("operator Odd" in layer.sparsity.reason for layer in plan.layers if layer.role in INSIDE)


def test_auto_says_that_nothing_is_needed_where_flops_are_met_at_once(ask) -> None:
    plan, _ = decide(ask(sparsity="auto", flops=1.0))
    assert not plan.masks
    assert all("--flops 1 is met without it" in one.sparsity.reason for one in plan.layers if one.role in INSIDE)


@pytest.mark.parametrize("sparsity", ["2:4", "auto"])
def test_a_layer_that_the_pruner_leaves_alone_is_not_called_pruned(
    ask, monkeypatch: pytest.MonkeyPatch, sparsity: str
) -> None:
    whole = FakePruner.two_four

    def without_one(self: FakePruner, names: Collection[str], asked: str) -> Pruning:
        pruning = whole(self, names, asked)
        for name in [name for name in names if name.endswith("blocks.0/mlp/fc1/MatMul")]:
            del pruning.masks[name], pruning.patterns[name]
            pruning.reasons[name] = "left dense: it shares its weight"
        return pruning

    monkeypatch.setattr(FakePruner, "two_four", without_one)
    plan, _ = decide(ask(sparsity=sparsity))
    assert any(layer.sparsity.reason.startswith("left dense: it shares its weight") for layer in plan.layers)
    for layer in plan.layers:
        assert (layer.name in plan.masks) == (not layer.sparsity.reason.startswith("left dense"))


def test_typed_two_four_of_a_model_that_cannot_be_differentiated_says_what_to_do(
    ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakePruner, names: Collection[str], asked: str) -> Pruning:
        raise UserError("operator Odd (node o) cannot be differentiated")

    monkeypatch.setattr(FakePruner, "two_four", refuse)
    with pytest.raises(UserError, match=r"operator Odd .* --recover none"):
        decide(ask(sparsity="2:4"))
