"""The ways of pruning that pruning_accuracy.py compares.

Each leaves its weights in the pruned network and returns, by layer name, the fraction of the weight that is left.
Blocks go by one of `METHODS` (and of the ablations' additions to them), two of four weights by one of `TWO_FOUR`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.exact import ExactAllocator
from lsp_deploy.allocation.masks import block_sums, magnitude_score, two_four_mask
from lsp_deploy.allocation.precision import COMPRESSIBLE_ROLES
from lsp_deploy.allocation.problem import LayerCurve
from lsp_deploy.allocation.sparsity import cannot_have_two_four, two_four_layer
from lsp_deploy.data import Dataset
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.linear_layers import LinearLayer
from lsp_deploy.search.block_curves import additive_curve, block_sizes, layer_curve, removed_blocks
from lsp_deploy.search.block_search import BlockSearch, SearchSettings
from lsp_deploy.search.network import Network
from lsp_deploy.search.pruner import NetworkPruner
from lsp_deploy.sensitivity.activations import collect_activations
from lsp_deploy.sensitivity.results import LayerSensitivity

__all__ = ["ABLATIONS", "METHODS", "TWO_FOUR", "Ablation", "Left", "Method", "Prune", "TwoFour", "prune_two_four"]

Left = Mapping[str, float]
Prune = Callable[[float], Left]


@dataclass(frozen=True)
class Method:
    """One row of the tables on blocks."""

    words: str
    prepare: Callable[[BlockSearch, Path], Prune]
    """Takes an analysed network and a folder for checkpoints, and gives what prunes to a fraction of the FLOPs."""
    bases: bool = False
    """Whether the network's bases are changed beforehand."""


@dataclass(frozen=True)
class TwoFour:
    """One row of the table on 2:4."""

    words: str
    score: Literal["magnitude", "activation", "sparsegpt"]
    bases: bool = False


def _uniform(score: Callable[[LinearLayer, BlockSearch], NDArray[np.float64]]) -> Callable[[BlockSearch, Path], Prune]:
    """Return a method that takes the same share of blocks from each layer of attention and MLP, the lowest first.

    Args:
        score: gives the importance of a layer's blocks, [blocks].
    """

    def prepare(search: BlockSearch, _: Path) -> Prune:
        block = search.settings.block
        layers = [layer for layer in search.prunable if layer.role in COMPRESSIBLE_ROLES]
        curves = [
            layer_curve(layer, block, order, np.zeros(len(order) + 1))
            for layer in layers
            for order in [np.argsort(score(layer, search), kind="stable").astype(np.int64)]
        ]
        costs = [search.measure.of_blocks(layer, curve.sizes) for layer, curve in zip(layers, curves, strict=True)]
        fixed = search.dense_cost - sum(float(cost[0]) for cost in costs)

        def prune(keep: float) -> Left:
            removed = _equal_shares(costs, keep * search.dense_cost - fixed)
            names = [curve.name for curve in curves]
            return _remove(search, curves, dict(zip(names, removed, strict=True)))

        return prune

    return prepare


def _equal_shares(costs: Sequence[NDArray[np.float64]], budget: float) -> list[int]:
    """Return how many blocks each layer loses: the smallest share, the same for all, that meets the budget."""

    def removed(share: float) -> list[int]:
        return [min(int(np.ceil(share * (len(cost) - 1) - 1e-9)), len(cost) - 2) for cost in costs]

    def cost(share: float) -> float:
        return sum(float(one[count]) for one, count in zip(costs, removed(share), strict=True))

    low, high = 0.0, 1.0
    if cost(high) > budget:
        raise UserError(
            "the budget cannot be reached by uniform pruning of attention and MLP; ask for a larger --flops"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return removed(high)


def _mean_magnitude(layer: LinearLayer, search: BlockSearch) -> NDArray[np.float64]:
    block = search.settings.block
    weight = np.abs(search.network.theta(layer.name)[: layer.K].float().cpu().numpy())
    return block_sums(weight, block).reshape(-1) / block_sizes(layer, block)


def _taylor(layer: LinearLayer, search: BlockSearch) -> NDArray[np.float64]:
    return search.sensitivity.layers[layer.name].gradients.taylor


def _searched(
    allocator: Literal["exact", "lsp"], *, recover: bool = False, gradual: bool = False, power_weight: float = 1.0
) -> Callable[[BlockSearch, Path], Prune]:
    """Return a method that is a search of the product."""

    def prepare(search: BlockSearch, checkpoints: Path) -> Prune:
        own = BlockSearch(
            search.network,
            search.prunable,
            search.others,
            search.refitted,
            search.sensitivity,
            search.objective,
            search.measure,
            SearchSettings(search.settings.block, allocator=allocator, power_weight=power_weight, recover=recover),
            checkpoints,
        )

        def prune(keep: float) -> Left:
            return _left(own, (own.gradual(keep) if gradual else own.one_shot(keep)).gone)

        return prune

    return prepare


def _damage(
    curve: Callable[[LinearLayer, LayerSensitivity], LayerCurve],
) -> Callable[[BlockSearch, Path], Prune]:
    """Return a method that is exact allocation on another damage, without recovery."""

    def prepare(search: BlockSearch, _: Path) -> Prune:
        curves = [curve(layer, search.sensitivity.layers[layer.name]) for layer in search.prunable]
        costs = {
            one.name: search.measure.of_blocks(layer, one.sizes)
            for layer, one in zip(search.prunable, curves, strict=True)
        }
        fixed = search.dense_cost - sum(float(cost[0]) for cost in costs.values())
        allocator = ExactAllocator(curves, costs=costs, fixed_cost=fixed)

        def prune(keep: float) -> Left:
            return _remove(search, curves, allocator.allocate(keep * search.dense_cost).removed)

        return prune

    return prepare


def _fisher_curve(layer: LinearLayer, sensitivity: LayerSensitivity) -> LayerCurve:
    scores = sensitivity.gradients.fisher
    return additive_curve(layer, sensitivity.block, scores, np.zeros(len(scores), bool))


def _delta_curve(first_order: bool) -> Callable[[LinearLayer, LayerSensitivity], LayerCurve]:
    def curve(layer: LinearLayer, sensitivity: LayerSensitivity) -> LayerCurve:
        delta = sensitivity.curve(first_order=first_order)
        return layer_curve(layer, sensitivity.block, sensitivity.order, delta)

    return curve


def _remove(search: BlockSearch, curves: Sequence[LayerCurve], removed: Mapping[str, int]) -> Left:
    """Mask the dense weights without the first blocks of each order."""
    gone = {layer.name: np.zeros(len(block_sizes(layer, search.settings.block)), bool) for layer in search.prunable}
    gone |= removed_blocks(curves, removed)
    search.network.reset()
    search.network.mask(search.masks(gone))
    return _left(search, gone)


def _left(search: BlockSearch, gone: Mapping[str, NDArray[np.bool_]]) -> Left:
    return {
        layer.name: 1 - int(block_sizes(layer, search.settings.block)[gone[layer.name]].sum()) / (layer.K * layer.N)
        for layer in search.prunable
    }


METHODS: dict[str, Method] = {
    "magnitude": Method("uniform, mean of abs. weights", _uniform(_mean_magnitude)),
    "taylor": Method("uniform, Taylor score", _uniform(_taylor)),
    "lsp": Method("LSP as published, one-shot", _searched("lsp")),
    "exact": Method("exact, one-shot", _searched("exact")),
    "lsp-recover": Method("LSP + reconstruction, one-shot", _searched("lsp", recover=True)),
    "exact-recover": Method("exact + reconstruction, one-shot", _searched("exact", recover=True)),
    "lsp-bases-recover": Method("LSP + bases + reconstruction, one-shot", _searched("lsp", recover=True), bases=True),
    "exact-bases-recover": Method(
        "exact + bases + reconstruction, one-shot", _searched("exact", recover=True), bases=True
    ),
    "gradual": Method(
        "exact + bases + reconstruction, gradual", _searched("exact", recover=True, gradual=True), bases=True
    ),
    # Of the ablations.
    "lsp-no-power": Method("LSP without the power term, one-shot", _searched("lsp", power_weight=0.0)),
    "fisher": Method("exact, additive mean A² (Fisher), one-shot", _damage(_fisher_curve)),
    "delta": Method("exact, δ of Eq. 11 on its hull, one-shot", _damage(_delta_curve(first_order=True))),
    "second-order": Method(
        "exact, δ without its first-order term, on its hull, one-shot", _damage(_delta_curve(first_order=False))
    ),
}


@dataclass(frozen=True)
class Ablation:
    """What is compared unless flags say otherwise."""

    methods: tuple[str, ...]
    blocks: tuple[str, ...]
    flops: tuple[float, ...]


_FLOPS = (0.95, 0.9, 0.8, 0.65, 0.5)
ABLATIONS: dict[str, Ablation] = {
    "none": Ablation(tuple(METHODS)[:9], ("16x16", "32x32"), _FLOPS),
    "damage": Ablation(("exact", "fisher", "delta", "second-order"), ("16x16", "32x32"), _FLOPS),
    "power": Ablation(("lsp", "lsp-no-power"), ("32x32", "32x64"), _FLOPS),
    "blocks": Ablation(
        ("lsp", "exact", "exact-bases-recover"),
        ("16x16", "32x16", "16x32", "32x32", "64x32", "32x64", "64x64"),
        (0.8, 0.5),
    ),
}

TWO_FOUR: dict[str, TwoFour] = {
    "two-four-magnitude": TwoFour("2:4, abs. weights", "magnitude"),
    "two-four-activation": TwoFour("2:4, abs. weights × norm of the input channel", "activation"),
    "two-four-recover": TwoFour("2:4, SparseGPT + reconstruction", "sparsegpt"),
    "two-four-bases-recover": TwoFour("2:4, SparseGPT + bases + reconstruction", "sparsegpt", bases=True),
}


def prune_two_four(method: TwoFour, pruner: NetworkPruner, calibration: Dataset, threads: int) -> tuple[Network, Left]:
    """Prune every layer that can have it to 2:4; returns the network that was pruned and what is left of it."""
    # The pruner's answer is a set of arrays for a plan; the network that it prunes is quicker to measure.
    network = pruner._network("interleaved")
    network.reset()
    names = [layer.name for layer in network.current_layers() if cannot_have_two_four(layer) is None]
    if method.score == "sparsegpt":
        pruner.two_four(names, "2:4")
    else:
        network.mask(_two_four_masks(method, network, names, calibration, threads))
    return network, dict.fromkeys(names, 0.5)


def _two_four_masks(
    method: TwoFour, network: Network, names: Sequence[str], calibration: Dataset, threads: int
) -> dict[str, NDArray[np.bool_]]:
    layers = [layer for layer in network.layers if layer.name in names]
    if method.score == "magnitude":
        return {layer.name: two_four_mask(magnitude_score(layer.weight())) for layer in layers}
    inputs = sorted({str(layer.x.name) for layer in layers})
    with OnnxRuntimeEngine.from_model(network.model.clone(), threads=threads, extra_outputs=inputs) as engine:
        statistics = collect_activations(engine, layers, calibration, batch_size=8)
    return {layer.name: two_four_layer(layer.weight(), statistics[str(layer.x.name)]).mask for layer in layers}
