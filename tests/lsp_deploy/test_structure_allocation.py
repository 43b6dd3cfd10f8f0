"""Blocks of one unit priced together: whole neurons and heads go where that does the least damage."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.allocation.exact import ExactAllocator
from lsp_deploy.allocation.problem import LayerCurve
from lsp_deploy.allocation.structure import dead_units, prefer_structure
from lsp_deploy.graph.structure import StructureGroup, structure_groups
from lsp_deploy.linear_layers import LinearLayer, linear_layers
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize

DIGITS = Path(__file__).parents[2] / "lsp_deploy" / "assets" / "digits_vit.onnx"
BLOCK = (16, 16)
SEEDS = st.integers(0, 2**32 - 1)


@cache
def digits() -> tuple[list[LinearLayer], list[StructureGroup]]:
    model = canonicalize(load_model(DIGITS), max_opset=20)
    layers = linear_layers(model)
    groups = structure_groups(model, layers, BLOCK)
    return [layer for layer in layers if layer.block is not None], groups


def blocks_of(layer: LinearLayer) -> int:
    return -(-layer.K // BLOCK[0]) * -(-layer.N // BLOCK[1])


def random_scores(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores as they are in networks: a factor of the unit times one of the block, both over decades."""
    layers, groups = digits()
    rng = np.random.default_rng(seed)
    scores = {layer.name: np.exp(rng.normal(0, 0.7, blocks_of(layer))) for layer in layers}
    for group in groups:
        factor = np.exp(rng.normal(0, 1))
        for parts in (group.blocks, group.free):
            for name, indices in parts.items():
                scores[name][indices] *= factor
    costs = {layer.name: np.full(blocks_of(layer), 2.0 * layer.M * BLOCK[0] * BLOCK[1]) for layer in layers}
    return scores, costs


def test_a_unit_is_priced_as_its_cheaper_side() -> None:
    """The sides do 6 and 3, and Σ min(score, λ) over all six blocks is 3 at λ = 0.5."""
    scores = {"v": np.array([2.0, 4.0, 1.0, 2.0, 9.0]), "proj": np.array([1.0, 2.0])}
    costs = {"v": np.ones(5), "proj": np.ones(2)}
    group = StructureGroup(
        "head", (0,), {"v": np.array([0, 1]), "proj": np.array([0, 1])}, {"v": np.array([2, 3])}, frozenset({"proj"})
    )
    removals = prefer_structure(scores, costs, [group])
    assert removals["v"][0].tolist() == [0, 1, 2, 3, 4]
    assert removals["v"][1].tolist() == [0, 0.5, 1, 1.5, 2, 11]
    assert removals["proj"][1].tolist() == [0, 0.5, 1]
    assert [one.unit for one in dead_units({"v": np.zeros(5, bool), "proj": np.ones(2, bool)}, [group])] == ["head"]
    assert not dead_units({"v": np.array([1, 0, 1, 1, 1], bool), "proj": np.array([1, 0], bool)}, [group])


def test_a_unit_with_one_side_gone_goes_for_nothing() -> None:
    scores = {"fc1": np.array([3.0, 5.0]), "fc2": np.array([2.0, 7.0])}
    group = StructureGroup("neuron", (0,), {"fc1": np.array([0]), "fc2": np.array([0])}, readers=frozenset({"fc2"}))
    removals = prefer_structure(
        scores, {name: np.ones(2) for name in scores}, [group], gone={"fc2": np.array([True, False])}
    )
    assert removals["fc1"][1].tolist() == [0, 0, 5]
    assert removals["fc2"][1].tolist() == [0, 0, 7]


def test_a_side_that_is_not_pruned_cannot_be_the_one_that_dies() -> None:
    scores = {"fc1": np.array([3.0, 5.0])}
    group = StructureGroup("neuron", (0,), {"fc1": np.array([1]), "fc2": np.array([0])}, readers=frozenset({"fc2"}))
    removals = prefer_structure(scores, {"fc1": np.ones(2)}, [group])
    assert removals["fc1"][1].tolist() == [0, 3, 8]


@settings(max_examples=20)
@given(SEEDS)
def test_without_preference_nothing_changes(seed: int) -> None:
    scores, costs = random_scores(seed)
    for name, (order, damage) in prefer_structure(scores, costs, digits()[1], 0.0).items():
        assert order.tolist() == np.argsort(scores[name], kind="stable").tolist()
        assert np.array_equal(damage, np.concatenate([[0.0], np.cumsum(scores[name][order])]))


@settings(max_examples=20)
@given(SEEDS, st.floats(0, 1))
def test_a_unit_does_the_damage_of_the_whole(seed: int, preference: float) -> None:
    scores, costs = random_scores(seed)
    groups = digits()[1]
    after = {}
    for name, (order, damage) in prefer_structure(scores, costs, groups, preference).items():
        assert sorted(order.tolist()) == list(range(len(scores[name])))
        steps = np.diff(damage)
        assert (np.diff(steps) >= -1e-9 * damage[-1]).all(), "not convex"
        after[name] = np.zeros(len(order))
        after[name][order] = steps
        assert (after[name] <= scores[name] * (1 + 1e-9) + 1e-9).all()
    for group in groups:
        sides = [
            sum(scores[n][i].sum() for n, i in group.blocks.items() if (n in group.readers) is at)
            for at in (False, True)
        ]
        parts = [*group.blocks.items(), *group.free.items()]
        total = sum(scores[name][indices].sum() for name, indices in parts)
        whole = sum(after[name][indices].sum() for name, indices in parts)
        assert whole == pytest.approx((1 - preference) * total + preference * min(sides))


@settings(max_examples=20)
@given(SEEDS, st.floats(0.4, 0.95))
def test_more_whole_units_die_at_equal_cost(seed: int, budget: float) -> None:
    assert dead_at(seed, budget, 0.0) <= dead_at(seed, budget, 1.0)


def test_the_stronger_the_preference_the_more_dies() -> None:
    dead = [dead_at(0, 0.7, preference) for preference in (0.0, 0.5, 1.0)]
    assert dead[0] < dead[1] < dead[2]


def dead_at(seed: int, budget: float, preference: float) -> int:
    """Return how many blocks the dead units have, which leave the graph."""
    layers, groups = digits()
    scores, costs = random_scores(seed)
    removals = prefer_structure(scores, costs, groups, preference)
    sizes = np.full(max(map(blocks_of, layers)), BLOCK[0] * BLOCK[1])
    curves = [
        LayerCurve(
            layer.name, layer.role, layer.M, layer.K, layer.N, BLOCK, *removals[layer.name], sizes[: blocks_of(layer)]
        )
        for layer in layers
    ]
    allocator = ExactAllocator(curves)
    allocation = allocator.allocate(budget * allocator.dense_cost)
    gone = {}
    for curve in curves:
        gone[curve.name] = np.zeros(curve.blocks, bool)
        gone[curve.name][curve.order[: allocation.removed[curve.name]]] = True
    dead = dead_units(gone, groups)
    return sum(len(blocks) for group in dead for part in (group.blocks, group.free) for blocks in part.values())


@pytest.mark.parametrize(
    ("scores", "costs", "preference"),
    [([-1.0], [1.0], 1), ([1.0], [0.0], 1), ([1.0], [1.0], -1), ([1.0, 2.0], [1.0], 1)],
)
def test_what_is_no_damage_or_cost_is_refused(scores: list[float], costs: list[float], preference: float) -> None:
    with pytest.raises(ValueError, match=r"0 or more|above 0|shape|0 to 1"):
        prefer_structure({"a": np.array(scores)}, {"a": np.array(costs)}, [], preference)
