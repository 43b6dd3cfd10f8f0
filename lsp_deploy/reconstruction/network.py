"""Reconstruction of a whole network, layer by layer, on what its already compressed part gives.

Two runs of the graph go side by side over the calibration samples, the dense one and the pruned one, and stop at every
layer: the pruned run has the layer's input, the dense one what its output should bring about. Each layer is solved
once, its new weights take effect, and both runs go on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.errors import UserError
from lsp_deploy.reconstruction.moments import Moments
from lsp_deploy.reconstruction.parameters import LayerParameters
from lsp_deploy.reconstruction.ridge import solve_ridge
from lsp_deploy.reconstruction.targets import FitTarget, fit_target
from lsp_deploy.reconstruction.two_four import two_four_support
from lsp_deploy.sensitivity.layer_rows import Layout, sample_rows

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import Execution, OnnxModule
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["Batch", "FitSettings", "LayerFit", "reconstruct"]


_RIDGE_FACTORS = (1.0, 0.1, 0.3, 3.0, 10.0)  # of equal error the first one counts
TRIED_COLUMNS = 64
TRIED_RIDGES = len(_RIDGE_FACTORS)


@dataclass(frozen=True)
class FitSettings:
    """How strongly the solves hold on to the weights before them, where held-out samples do not say otherwise."""

    ridge_of_branch_ends: float = 2.0
    """Of layers that end in a residual Add and fit the dense stream, in mean input energies."""
    ridge_of_others: float = 0.5
    """Of layers that fit the dense layer's own output."""
    token_mix: float = 0.5
    """Share of the gradient's token weights; the rest weighs all tokens alike."""


@dataclass(frozen=True)
class Batch:
    """Calibration samples ready to run; a model of a fixed batch has copies of the last sample at the end."""

    feeds: Mapping[str, torch.Tensor]
    fitted: NDArray[np.bool_]
    """[samples]: whether a sample is fitted to."""
    held_out: NDArray[np.bool_]
    """[samples]: whether it judges the fit. Copies are neither."""


@dataclass
class LayerFit:
    """What became of one layer."""

    theta: torch.Tensor
    """[K (+ 1), N] float64, the bias in the last row."""
    mask: NDArray[np.bool_]
    fits: Literal["layer output", "residual stream"]
    ridge: float
    error_before: float
    """Relative squared error of what is fitted, on the samples that judge, with the masked weights of before."""
    error_after: float
    held_out: bool
    """Whether samples judge that are held out from the fit; those fitted to do where there are too few."""
    accepted: bool
    """Whether the solve lowered it; if not, the masked weights of before stay."""


@dataclass
class _Lane:
    """One batch's two runs."""

    batch: Batch
    dense: Execution
    pruned: Execution
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.batch.fitted)


def reconstruct(
    dense: OnnxModule,
    pruned: OnnxModule,
    layers: Sequence[LinearLayer],
    batches: Sequence[Batch],
    *,
    masks: Mapping[str, NDArray[np.bool_]],
    two_four: Collection[str] = (),
    token_weights: Mapping[str, NDArray[np.float64]] | None = None,
    settings: FitSettings | None = None,
    layouts: Mapping[str, Layout] | None = None,
    description: str = "reconstructing",
) -> dict[str, LayerFit]:
    """Solve for the weights of `layers` in `pruned`, in the order of the graph, and put them there.

    Args:
        dense: the network as it was.
        pruned: the same graph; its weights are what each solve is pulled to, masked or not.
        layers: those to solve, in graph order; layers in between keep the weights that `pruned` has.
        batches: the calibration samples.
        masks: bool [K, N] by layer name; a layer without one keeps all its weights.
        two_four: names of layers whose 2:4 mask is chosen on the way (SparseGPT).
        token_weights: [tokens] by layer name, from the gradients at its output; without them all tokens weigh alike.
        settings: ridges.
        layouts: how the rows of a layer hold the samples; one after the other where it is not said.
        description: for the progress line.

    Returns:
        By layer name.

    Raises:
        UserError: activations that are not finite.
    """
    settings = settings or FitSettings()
    fits: dict[str, LayerFit] = {}
    with torch.no_grad(), console.progress(description, len(layers)) as advance:
        targets = _targets(layers, dense, pruned, batches[0])
        keep = _read_out_of_order(layers, targets)
        lanes = [_Lane(batch, dense.start(batch.feeds, keep), pruned.start(batch.feeds)) for batch in batches]
        for layer in layers:
            target = targets[layer.name]
            parameters = LayerParameters(layer, pruned)
            weights = None if token_weights is None else token_weights.get(layer.name)
            fitted, held_out = _moments(
                layer,
                parameters,
                target,
                lanes,
                weights,
                settings.token_mix,
                (layouts or {}).get(layer.name, "samples first"),
            )
            ridge = settings.ridge_of_branch_ends if target.residual_node else settings.ridge_of_others
            fit = _fit(parameters, target, fitted, held_out, masks.get(layer.name), layer.name in two_four, ridge)
            parameters.write(fit.theta)
            fits[layer.name] = fit
            advance(1)
    return fits


def _fit(
    parameters: LayerParameters,
    target: FitTarget,
    fitted: Moments,
    held_out: Moments,
    mask: NDArray[np.bool_] | None,
    two_four: bool,
    ridge: float,
) -> LayerFit:
    prior = parameters.read()
    K = parameters.K
    if two_four:
        mask = _two_four_mask(fitted, prior, ridge)
    elif mask is None:
        mask = np.ones((K, parameters.N), bool)
    kept = torch.from_numpy(mask).to(prior.device)
    before = prior.clone()
    before[:K] *= kept
    judge = held_out if held_out.yy else fitted
    if held_out.yy:
        ridge = _best_ridge(fitted, held_out, prior, mask, ridge)
    theta = solve_ridge(fitted, prior, mask, ridge)
    error_before, error_after = judge.error(before), judge.error(theta)
    accepted = error_after <= error_before
    if accepted and held_out.yy:
        theta = solve_ridge(fitted.plus(held_out), prior, mask, ridge)
    fits: Literal["layer output", "residual stream"] = "residual stream" if target.residual_node else "layer output"
    return LayerFit(
        theta if accepted else before, mask, fits, ridge, error_before, error_after, bool(held_out.yy), accepted
    )


def _best_ridge(
    fitted: Moments, held_out: Moments, prior: torch.Tensor, mask: NDArray[np.bool_], ridge: float
) -> float:
    """Return the strength, of some around `ridge`, whose solution has the least error on the held-out samples.

    It is tried on some columns, evenly spread: a solve for every column of a 2:4 mask takes long.
    """
    columns = np.unique(np.linspace(0, mask.shape[1] - 1, min(mask.shape[1], TRIED_COLUMNS)).round().astype(np.int64))
    some_fitted, some_held_out = fitted.columns(columns), held_out.columns(columns)
    some_prior, some_mask = prior[:, columns], mask[:, columns]

    def error(factor: float) -> float:
        return some_held_out.error(solve_ridge(some_fitted, some_prior, some_mask, ridge * factor))

    return ridge * min(_RIDGE_FACTORS, key=error)


def _two_four_mask(moments: Moments, prior: torch.Tensor, ridge: float) -> NDArray[np.bool_]:
    """Choose a 2:4 mask around the weights that fit best without one."""
    full = np.ones((len(prior) - moments.bias, prior.shape[1]), bool)
    best = solve_ridge(moments, prior, full, ridge)
    K = len(full)
    hessian = moments.xx[:K, :K].clone()
    hessian.diagonal().add_(ridge * moments.input_energy)
    return two_four_support(best[:K], hessian)


def _moments(
    layer: LinearLayer,
    parameters: LayerParameters,
    target: FitTarget,
    lanes: Sequence[_Lane],
    token_weights: NDArray[np.float64] | None,
    mix: float,
    layout: Layout,
) -> tuple[Moments, Moments]:
    """Bring all lanes to `layer` and sum over their tokens: those to fit, and those that judge."""
    device = str(parameters.read().device)
    both = [Moments(layer.K, layer.N, bias=parameters.has_bias, device=device) for _ in range(2)]
    for lane in lanes:
        lane.pruned.advance(str(layer.node.name), after=False)
        if target.dense_value not in lane.dense.values:
            lane.dense.advance(target.dense_node, after=True)
        found = target.wanted(lane.pruned, lane.dense.values[target.dense_value])
        assert found is not None, f"the way from {layer.name} to its residual Add was invertible a moment ago"
        x = lane.pruned.values[str(layer.x.name)]
        rows_of = [sample_rows(layer, x, value, lane.size, layout) for value in found]
        x, wanted, matters = rows_of[0][0].float(), rows_of[0][1].float(), rows_of[1][1].float()
        weight = matters.mean(dim=2)
        # In front of a layer that is gone no token has a gradient: all weigh alike.
        if token_weights is not None and len(token_weights) == weight.shape[1] and token_weights.any():
            relative = torch.from_numpy(token_weights / token_weights.mean()).to(weight)
            weight = weight * (1 - mix + mix * relative)
        for moments, chosen in zip(both, (lane.batch.fitted, lane.batch.held_out), strict=True):
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
            if len(rows):
                moments.add(x[rows].flatten(0, 1), wanted[rows].flatten(0, 1), weight[rows].flatten())
    if not all(bool(torch.isfinite(one.xy).all()) for one in both):
        raise UserError(f"what {layer.name} reads or gives is NaN or infinite; check the model and its inputs")
    return both[0], both[1]


def _targets(
    layers: Sequence[LinearLayer], dense: OnnxModule, pruned: OnnxModule, batch: Batch
) -> dict[str, FitTarget]:
    """Return the residual stream where the way there can be undone, else the layer's own output, by layer name."""
    targets = {layer.name: fit_target(layer, residual=True) for layer in layers}
    doubtful = [layer for layer in layers if targets[layer.name].branch != targets[layer.name].output]
    before, whole = pruned.start(batch.feeds), dense.start(batch.feeds, _read_out_of_order(layers, targets))
    for layer in doubtful:
        target = targets[layer.name]
        if target.residual_node is None:
            continue
        before.advance(str(layer.node.name), after=False)
        if target.dense_value not in whole.values:
            whole.advance(target.dense_node, after=True)
        if target.wanted(before, whole.values[target.dense_value]) is None:
            targets[layer.name] = fit_target(layer, residual=False)
    return targets


def _read_out_of_order(layers: Sequence[LinearLayer], targets: Mapping[str, FitTarget]) -> list[str]:
    """Return the dense values that are computed before an earlier layer's target is: branches that run in parallel."""
    if not layers:
        return []
    graph = layers[0].node.graph
    assert graph is not None
    position = {str(node.name): index for index, node in enumerate(graph)}
    keep, furthest = [], -1
    for layer in layers:
        target = targets[layer.name]
        if position[target.dense_node] <= furthest:
            keep.append(target.dense_value)
        furthest = max(furthest, position[target.dense_node])
    return keep
