"""Blocks removed in one shot and step by step: budgets are met, nothing comes back, and the same comes out again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from networks import digits_network  # noqa: E402

from lsp_deploy.allocation.lsp import LspAllocator  # noqa: E402
from lsp_deploy.errors import UserError  # noqa: E402
from lsp_deploy.hardware.target import load_target  # noqa: E402
from lsp_deploy.search import block_search  # noqa: E402
from lsp_deploy.search.block_curves import (  # noqa: E402
    additive_curve,
    block_mask_of,
    block_sizes,
    layer_curve,
    removed_blocks,
)
from lsp_deploy.search.block_search import BlockSearch, Found, SearchSettings  # noqa: E402
from lsp_deploy.search.measure import Measure  # noqa: E402
from lsp_deploy.search.network import Network  # noqa: E402
from lsp_deploy.sensitivity.analysis import analyse  # noqa: E402
from lsp_deploy.sensitivity.objectives import make_objective  # noqa: E402

BLOCK = (16, 16)
INSIDE = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Layer:
    """What the curves ask of a layer."""

    def __init__(self, K: int, N: int) -> None:
        self.name, self.role, self.M, self.K, self.N = "fc", "fc1", 3, K, N


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(16, 16), (32, 16), (16, 64)]), st.integers(0, 2**31))
def test_sizes_and_masks_agree_on_ragged_edges(K: int, N: int, block: tuple[int, int], seed: int) -> None:
    layer = Layer(K, N)
    sizes = block_sizes(layer, block)  # type: ignore[arg-type]
    assert len(sizes) == -(-K // block[0]) * -(-N // block[1])
    assert sizes.sum() == K * N and sizes.min() > 0 and sizes.max() <= block[0] * block[1]
    gone = np.random.default_rng(seed).random(len(sizes)) < 0.5
    mask = block_mask_of(layer, block, gone)  # type: ignore[arg-type]
    assert mask.shape == (K, N)
    assert mask.sum() == sizes[~gone].sum()
    for index in range(len(sizes)):
        row, column = divmod(index, -(-N // block[1]))
        part = mask[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
        assert part.size == sizes[index]
        assert (part == ~gone[index]).all()


@given(st.integers(0, 2**31))
def test_an_additive_curve_begins_with_what_is_gone_and_then_rises_least_first(seed: int) -> None:
    generator = np.random.default_rng(seed)
    layer = Layer(64, 40)
    scores = np.where(generator.random(12) < 0.3, 0.0, generator.random(12))
    gone = generator.random(12) < 0.4
    curve = additive_curve(layer, BLOCK, scores, gone)  # type: ignore[arg-type]
    lost = int(gone.sum())
    assert sorted(curve.order.tolist()) == list(range(12))
    assert set(curve.order[:lost].tolist()) == set(np.flatnonzero(gone).tolist())
    assert (curve.delta[: lost + 1] == 0).all()
    steps = np.diff(curve.delta)[lost:]
    np.testing.assert_allclose(steps, np.sort(scores[~gone]), atol=1e-12)
    np.testing.assert_array_equal(curve.sizes, block_sizes(layer, BLOCK)[curve.order])  # type: ignore[arg-type]


def test_removed_blocks_are_the_first_of_the_order() -> None:
    layer = Layer(32, 32)
    curve = layer_curve(layer, BLOCK, np.array([2, 0, 3, 1]), np.arange(5.0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(removed_blocks([curve], {"fc": 2})["fc"], [True, False, True, False])


def make_search(
    folder: Path,
    *,
    network: Network | None = None,
    kind: str = "flops",
    target: str = "a100",
    without: tuple[str, ...] = (),
    samples: int = 40,
    **settings: object,
) -> BlockSearch:
    """Return a search over the embedded model's layers."""
    network = network or digits_network(samples)
    layers = network.current_layers()
    prunable = [layer for layer in layers if layer.role in INSIDE and layer.role not in without]
    return BlockSearch(
        network,
        prunable,
        [layer for layer in layers if layer not in prunable],
        [layer for layer in layers if layer.role in INSIDE],
        analyse(network.model, layers, network.dataset, block=BLOCK, model_sha256="x", cache=folder / "gradients"),
        make_objective("top1", network.model, None, seed=0),
        Measure(kind, load_target(target), {layer.name: "fp16" for layer in layers}, BLOCK),  # type: ignore[arg-type]
        SearchSettings(block=BLOCK, **settings),  # type: ignore[arg-type]
        folder / "steps",
    )


@pytest.fixture
def no_recovery(tmp_path: Path) -> BlockSearch:
    return make_search(tmp_path, recover=False)


def left(search: BlockSearch, gone: Mapping[str, np.ndarray]) -> float:
    """Return the fraction of all linear FLOPs that remains, counted on the masks."""
    masks = search.masks(gone)
    layers = [*search.prunable, *search.others]
    dense = sum(layer.M * layer.K * layer.N for layer in layers)
    return sum(layer.M * masks.get(layer.name, np.ones((layer.K, layer.N))).sum() for layer in layers) / dense


def biggest_block(search: BlockSearch) -> float:
    layers = [*search.prunable, *search.others]
    return max(layer.M for layer in layers) * 256 / sum(layer.M * layer.K * layer.N for layer in layers)


def assert_weights_are_zero_where_gone(search: BlockSearch, found: Found) -> None:
    masks = search.masks(found.gone)
    for layer in search.prunable:
        theta = search.network.theta(layer.name)[: layer.K].numpy()
        if layer.name in masks:
            assert (theta[~masks[layer.name]] == 0).all()
            assert (theta[masks[layer.name]] != 0).mean() > 0.99


@pytest.mark.parametrize("keep", [0.97, 0.8, 0.6, 0.35])
def test_one_shot_meets_its_budget_up_to_a_block(no_recovery: BlockSearch, keep: float) -> None:
    found = no_recovery.one_shot(keep)
    assert keep - biggest_block(no_recovery) <= left(no_recovery, found.gone) <= keep + 1e-12
    assert found.allocation.cost <= keep * no_recovery.dense_cost * (1 + 1e-12)
    assert found.search == "one-shot" and found.fits == {}
    assert_weights_are_zero_where_gone(no_recovery, found)


def test_predicted_damage_rises_as_less_is_left(no_recovery: BlockSearch) -> None:
    damages = [no_recovery.predicted_damage(keep) for keep in (1.0, 0.9, 0.7, 0.5, 0.3)]
    assert damages[0] == 0
    assert all(low < high for low, high in itertools.pairwise(damages))


def test_one_shot_removes_the_least_damaging_blocks(no_recovery: BlockSearch) -> None:
    found = no_recovery.one_shot(0.7)
    for layer in no_recovery.prunable:
        scores, gone = no_recovery._dense_scores[layer.name], found.gone[layer.name]
        if gone.any() and not gone.all():
            assert scores[gone].max() <= scores[~gone].min()


@pytest.mark.parametrize("allocator", ["exact", "lsp"])
@pytest.mark.parametrize("recover", [False, True])
def test_gradual_meets_every_budget_and_brings_no_block_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocator: str, recover: bool
) -> None:
    search = make_search(tmp_path, allocator=allocator, recover=recover, samples=24)
    saved: list[tuple[float, dict[str, np.ndarray]]] = []
    monkeypatch.setattr(
        search._checkpoints,
        "save",
        lambda budget, state: saved.append((budget, {name: gone.copy() for name, gone in state.gone.items()})),
    )
    found = search.gradual(0.78)
    assert [budget for budget, _ in saved] == pytest.approx([0.95, 0.9, 0.85, 0.8, 0.78])
    # Where a smoothed curve is not convex, one slope takes many blocks at once.
    slack = biggest_block(search) if allocator == "exact" else 0.1
    before = 1.0
    for budget, gone in saved:
        now = left(search, gone)
        assert min(before, budget) - slack <= now <= budget + 1e-9
        before = now
    for (_, before), (_, after) in itertools.pairwise(saved):
        assert all((after[name] >= before[name]).all() for name in after)
    assert found.search == "gradual"
    assert (found.fits != {}) == recover
    assert_weights_are_zero_where_gone(search, found)


def test_a_search_that_goes_on_ends_where_one_without_interruption_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_search(tmp_path / "whole", samples=24)
    expected = whole.gradual(0.8)
    search = make_search(tmp_path / "cut", samples=24)
    real, calls = block_search.network_gradients, []

    def third_time_interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(block_search, "network_gradients", third_time_interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.gradual(0.8)
    capsys.readouterr()
    again = make_search(tmp_path / "cut", samples=24)
    found = again.gradual(0.8)
    assert "the search goes on at 85.0%" in "".join(capsys.readouterr())
    assert len(calls) == 4  # two before, the interrupted one, one after; the first step needs none
    for name, gone in expected.gone.items():
        np.testing.assert_array_equal(found.gone[name], gone)
        assert torch.equal(again.network.theta(name), whole.network.theta(name))
    finished = make_search(tmp_path / "cut", samples=24)
    at_the_end = finished.gradual(0.8)  # all steps are there; the last is taken again, for its reasons
    assert len(calls) == 5
    assert at_the_end.allocation == found.allocation == expected.allocation
    for name, gone in expected.gone.items():
        np.testing.assert_array_equal(at_the_end.gone[name], gone)
        assert torch.equal(finished.network.theta(name), whole.network.theta(name))
    finished.forget()
    assert not (tmp_path / "cut" / "steps").exists()


def test_the_same_search_gives_the_same(tmp_path: Path) -> None:
    found, thetas = [], []
    for place in ("a", "b"):
        search = make_search(tmp_path / place, samples=24)
        found.append(search.one_shot(0.6))
        thetas.append({layer.name: search.network.theta(layer.name) for layer in search.refitted})
    for name in found[0].gone:
        np.testing.assert_array_equal(found[0].gone[name], found[1].gone[name])
        assert torch.equal(thetas[0][name], thetas[1][name])


def test_one_budget_after_another_is_as_if_it_were_the_first(tmp_path: Path) -> None:
    search = make_search(tmp_path / "a", samples=24)
    search.one_shot(0.5)
    search.gradual(0.9)
    after = search.one_shot(0.8)
    fresh = make_search(tmp_path / "b", samples=24)
    expected = fresh.one_shot(0.8)
    for name, gone in expected.gone.items():
        np.testing.assert_array_equal(after.gone[name], gone)
        assert torch.equal(search.network.theta(name), fresh.network.theta(name))


@pytest.mark.parametrize("allocator", ["exact", "lsp"])
def test_no_layer_keeps_less_than_its_minimum(tmp_path: Path, allocator: str) -> None:
    search = make_search(tmp_path, recover=False, allocator=allocator, min_density=0.4)
    densities = {name: 1 - gone.mean() for name, gone in search.one_shot(0.5).gone.items()}
    assert min(densities.values()) >= 0.4
    free = make_search(tmp_path, recover=False, allocator=allocator)
    assert min(1 - gone.mean() for gone in free.one_shot(0.5).gone.values()) < 0.4


@pytest.mark.parametrize("allocator", ["exact", "lsp"])
def test_what_cannot_be_reached_is_one_line(tmp_path: Path, allocator: str) -> None:
    search = make_search(tmp_path, recover=False, allocator=allocator, min_density=0.9)
    with pytest.raises(UserError, match="cannot be reached") as raised:
        search.one_shot(0.5)
    assert "\n" not in str(raised.value)


def test_layers_that_are_not_prunable_count_in_the_budget_and_stay(tmp_path: Path) -> None:
    search = make_search(tmp_path, recover=False, without=("qkv", "proj"))
    found = search.one_shot(0.6)
    assert all("mlp" in name for name in found.gone)
    assert 0.6 - biggest_block(search) <= left(search, found.gone) <= 0.6 + 1e-12
    for layer in search.others:
        assert not search.network.is_changed(layer.name)


@pytest.mark.parametrize(("kind", "keep"), [("parameters", 0.6), ("bytes", 0.6), ("energy_uj", 0.6), ("flops", 0.6)])
def test_every_measure_is_met(tmp_path: Path, kind: str, keep: float) -> None:
    search = make_search(tmp_path, recover=False, kind=kind)
    found = search.one_shot(keep)
    measure = search.measure
    cost = sum(measure.of_dense(layer) for layer in search.others)
    for layer in search.prunable:
        sizes = block_sizes(layer, BLOCK)
        order = np.argsort(~found.gone[layer.name], kind="stable")
        cost += measure.of_blocks(layer, sizes[order])[found.gone[layer.name].sum()]
    assert 0.9 * keep <= cost / search.dense_cost <= keep + 1e-9


def test_the_power_term_changes_what_lsp_removes(tmp_path: Path) -> None:
    with_power, without = (
        make_search(tmp_path, recover=False, allocator="lsp", power_weight=weight).one_shot(0.6)
        for weight in (1.0, 0.0)
    )
    assert any((with_power.gone[name] != without.gone[name]).any() for name in without.gone)


def test_lsp_is_what_the_published_allocator_gives_on_the_measured_curves(tmp_path: Path) -> None:
    search = make_search(tmp_path, recover=False, allocator="lsp", target="cpu")
    found = search.one_shot(0.7)
    layers = search.sensitivity.layers
    curves = [
        layer_curve(layer, BLOCK, layers[layer.name].order, layers[layer.name].delta) for layer in search.prunable
    ]
    fixed = sum(2.0 * layer.M * layer.K * layer.N for layer in search.others)
    allocation = LspAllocator(curves, tile_m=64, fixed_flops=fixed).allocate(0.7)
    assert allocation.removed == found.allocation.removed
    for name, count in allocation.removed.items():
        expected = np.zeros(len(found.gone[name]), bool)
        expected[layers[name].order[:count]] = True
        np.testing.assert_array_equal(found.gone[name], expected)


def test_recovery_loses_less(tmp_path: Path) -> None:
    search = make_search(tmp_path, samples=80)
    divergences = []
    for recover in (False, True):
        again = make_search(tmp_path, network=search.network, recover=recover)
        again.one_shot(0.5)
        divergences.append(divergence(search.network))
    assert divergences[1] < 0.8 * divergences[0]


def test_steps_lose_less_than_one_shot_where_much_goes(tmp_path: Path) -> None:
    search = make_search(tmp_path, samples=80)
    search.one_shot(0.25)
    once = divergence(search.network)
    search.gradual(0.25)
    assert divergence(search.network) < once


def divergence(network: Network) -> float:
    """Return the mean KL divergence of the pruned network's answers from the dense one's."""
    feeds = {
        name: torch.from_numpy(value) for name, value in network.dataset.feeds(range(len(network.dataset))).items()
    }
    with torch.no_grad():
        answers = [module(feeds)["logits"].log_softmax(1) for module in (network.pruned, network.dense)]
    return float(torch.nn.functional.kl_div(*answers, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(("search", "steps"), [("one-shot", "one-shot search"), ("gradual", "7 steps")])
def test_a_long_search_is_announced(no_recovery: BlockSearch, capsys, search: str, steps: str) -> None:
    no_recovery.network.pass_seconds = 60
    no_recovery.say_beforehand(0.65, search)
    said = "".join(capsys.readouterr())
    assert steps in said and "estimated" in said


def test_a_short_one_is_not(no_recovery: BlockSearch, capsys) -> None:
    no_recovery.network.pass_seconds = 0.1
    no_recovery.say_beforehand(0.65, "gradual")
    assert "".join(capsys.readouterr()) == ""
