"""Whether damage adds up over layers, as LSP's allocation takes it to (Eq. 3 to 5): measured on the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.autodiff.module import OnnxModule
from lsp_deploy.errors import UserError
from lsp_deploy.graph.class_scores import class_output
from lsp_deploy.sensitivity.block_gradients import weight_groups
from lsp_deploy.sensitivity.feeds import tensor_feeds
from lsp_deploy.sensitivity.objectives import make_objective

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.data import Dataset
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.sensitivity.block_gradients import Objective
    from lsp_deploy.sensitivity.results import LayerSensitivity, Sensitivity

__all__ = ["Additivity", "measure_additivity"]


@dataclass(frozen=True)
class Additivity:
    """What removing the same fraction of every layer's blocks does, least important first; means over samples."""

    fraction: float
    """Of each layer's blocks."""
    estimated: float
    """Sum over layers of δ: the estimate of the objective's change."""
    single_layers: float
    """Sum over layers of the objective's change measured with that layer alone pruned."""
    together: float
    """The objective's change measured with all layers pruned."""
    distortion_single_layers: float
    """Sum over layers of the squared distortion ‖f(x; W) - f(x; W̃)‖² of the outputs, each layer pruned alone."""
    distortion_together: float
    """The squared distortion with all layers pruned."""


@torch.no_grad()
def measure_additivity(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    dataset: Dataset,
    sensitivity: Sensitivity,
    *,
    fractions: Sequence[float],
    batch_size: int = 8,
    device: str = "cpu",
) -> list[Additivity]:
    """Prune each layer alone, then all together, and compare with each other and with the δ-curves.

    Costs (weights + 1) forward passes a fraction, and one of the dense model.

    Args:
        model: canonical, as it was analysed.
        layers: its linear layers.
        dataset: what is measured on; with labels for `loss`.
        sensitivity: the analysis, of the objective `loss`, `top1` or `output`. For `output` the objective's change is
            half the squared distortion of all outputs, which is what its δ estimates.
        fractions: of each layer's blocks, above 0 to 1.
        batch_size: samples a pass.
        device: torch device.

    Returns:
        One for each fraction.

    Raises:
        UserError: the objective is not one of these, or is `top1` of a model without class scores [batch, classes].
    """
    module = OnnxModule(model).to(device)
    batches = [
        tensor_feeds(dataset, range(start, min(start + batch_size, len(dataset))), device)
        for start in range(0, len(dataset), batch_size)
    ]
    dense = [module(feeds) for feeds in batches]
    objective = _objective(model, sensitivity.objective, dense, dataset.labels)
    base = 0.0 if objective is None else _mean(objective, dense)
    groups = weight_groups(layers)

    def change() -> tuple[float, float]:
        outputs = [module(feeds) for feeds in batches]
        distortion = sum(_distortion(one, other) for one, other in zip(dense, outputs, strict=True)) / len(dataset)
        return (distortion / 2 if objective is None else _mean(objective, outputs) - base), distortion

    result = []
    with console.progress("additivity", len(fractions) * len(groups)) as advance:
        for fraction in fractions:
            singles, estimated = [], 0.0
            kept = [module.weights[group[0].weight_root].clone() for group in groups]
            for group, weight in zip(groups, kept, strict=True):
                curve = sensitivity.layers[group[0].name]
                estimated += float(curve.delta[_removed(curve, fraction)])
                _prune(module, group[0], curve, fraction)
                singles.append(change())
                module.weights[group[0].weight_root].copy_(weight)
                advance(1)
            for group in groups:
                _prune(module, group[0], sensitivity.layers[group[0].name], fraction)
            together, distortion = change()
            for group, weight in zip(groups, kept, strict=True):
                module.weights[group[0].weight_root].copy_(weight)
            single, distortion_single = (sum(values) for values in zip(*singles, strict=True))
            result.append(Additivity(fraction, estimated, single, together, distortion_single, distortion))
    return result


def _objective(
    model: ir.Model, name: str, dense: Sequence[Mapping[str, torch.Tensor]], labels: NDArray[np.int64] | None
) -> Objective | None:
    """Return the objective with the dense model's classes as labels where it is `top1`; None for `output`."""
    if name == "output":
        return None
    if name == "loss":
        return make_objective("loss", model, labels)
    scores = class_output(model)
    if name != "top1" or scores is None:
        raise UserError(f"additivity is measured for loss, top1 of class scores and output, not for {name}")
    return make_objective("loss", model, torch.cat([outputs[scores] for outputs in dense]).argmax(1).cpu().numpy())


def _mean(objective: Objective, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    total, done = 0.0, 0
    for outputs in batches:
        size = len(next(iter(outputs.values())))
        total += float(objective(outputs, np.arange(done, done + size)))
        done += size
    return total / done


def _distortion(dense: Mapping[str, torch.Tensor], pruned: Mapping[str, torch.Tensor]) -> float:
    return sum(
        float((dense[name] - pruned[name]).double().square().sum()) for name in dense if dense[name].is_floating_point()
    )


def _removed(curve: LayerSensitivity, fraction: float) -> int:
    return round(fraction * len(curve.order))


def _prune(module: OnnxModule, layer: LinearLayer, curve: LayerSensitivity, fraction: float) -> None:
    """Set the least important blocks of a weight to zero, in the module."""
    block_k, block_n = curve.block
    columns = -(-layer.N // block_n)
    matrix = _matrix(layer, module.weights[layer.weight_root].data)
    for index in curve.order[: _removed(curve, fraction)].tolist():
        row, column = divmod(index, columns)
        matrix[row * block_k : (row + 1) * block_k, column * block_n : (column + 1) * block_n] = 0


def _matrix(layer: LinearLayer, parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter as W [K, N], without a copy."""
    if layer.node.op_type == "Conv" or layer.node.attributes.get_int("transB", False):
        return parameter.view(layer.N, layer.K).T
    return parameter.view(layer.K, layer.N)
