"""The network that is pruned: its graph in torch twice, as it was and as it becomes, and its calibration samples."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy.autodiff.module import OnnxModule
from lsp_deploy.linear_layers import LinearLayer, linear_layers
from lsp_deploy.passes.own_constants import OwnConstantsPass
from lsp_deploy.reconstruction.network import Batch, FitSettings, LayerFit, reconstruct
from lsp_deploy.reconstruction.parameters import LayerParameters, why_not_writable
from lsp_deploy.search.duration import reconstruction_seconds
from lsp_deploy.sensitivity.analysis import plan_batches

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.data import Dataset

__all__ = ["Network"]

_HELD_OUT_EVERY = 5  # of the calibration samples, to judge the solves by
_MOST_BYTES = 3 << 30  # of activations that reconstruction keeps for all samples


class Network:
    """Reads and changes the weights of one network by layer name.

    Layers whose weights cannot be changed on their own (shared, or computed in the graph) have no parameters here.
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Mapping[str, Sequence[int]],
        dataset: Dataset,
        *,
        batch_size: int | None = None,
        fixed_batch: bool = False,
        device: str = "cpu",
    ) -> None:
        """Take the canonical float32 model; it is not changed.

        Args:
            model: the network.
            shapes: its input shapes, batch included.
            dataset: the calibration samples.
            batch_size: samples a run; as many as activations allow if None, the model's own where that is fixed.
            fixed_batch: whether it is.
            device: torch device.
        """
        self.model = model.clone()
        OwnConstantsPass({str(layer.weight_value.name) for layer in linear_layers(self.model, shapes)})(self.model)
        self.layers = linear_layers(self.model, shapes)
        self.dataset = dataset
        self.fixed_batch, self.device = fixed_batch, device
        self.dense, self.pruned = OnnxModule(self.model).to(device), OnnxModule(self.model).to(device)
        self.batch_size, self.layouts = plan_batches(self.dense, self.model, self.layers, dataset, batch_size, device)
        for module in (self.dense, self.pruned):
            module.requires_grad_(False)
        self.not_writable = {
            layer.name: reason for layer in self.layers if (reason := why_not_writable(layer, self.pruned)) is not None
        }
        self._traced_batch = next(iter(shapes.values()))[0]  # the batch that the layers' M is counted at
        self._samples = min(len(dataset), max(8, _MOST_BYTES // max(1, self._bytes_of_a_sample())))
        self._batches: list[Batch] | None = None
        self.pass_seconds = 0.0
        """Wall-clock seconds of the last pass forward and backward over the samples; 0 before the first."""
        self._original = {name: _digest(weight) for name, weight in self.dense.weights.items()}

    def reconstruction_seconds(self, names: Collection[str], two_four: Collection[str] = ()) -> float:
        """Return how long reconstruction of the named layers is going to take, estimated; see `search.duration`."""
        return reconstruction_seconds(
            [layer for layer in self.layers if layer.name in names],
            two_four,
            samples=self._samples,
            batch=self._traced_batch,
            pass_seconds=self.pass_seconds * self._samples / len(self.dataset),
            device=self.device,
        )

    @property
    def reconstruction_samples(self) -> int:
        """How many of the calibration samples reconstruction works on: as many as memory allows."""
        return self._samples

    def layer(self, name: str) -> LinearLayer:
        """Return a layer by name."""
        return next(layer for layer in self.layers if layer.name == name)

    def theta(self, name: str) -> torch.Tensor:
        """Return a layer's weights in the pruned network: [K (+ 1), N] float64, the bias in the last row."""
        return LayerParameters(self.layer(name), self.pruned).read()

    def set_theta(self, name: str, theta: torch.Tensor) -> None:
        """Set a layer's weights in the pruned network."""
        LayerParameters(self.layer(name), self.pruned).write(theta)

    def dense_theta(self, name: str) -> torch.Tensor:
        """Return a layer's weights in the dense network, as `theta` does."""
        return LayerParameters(self.layer(name), self.dense).read()

    def set_dense_theta(self, name: str, theta: torch.Tensor) -> None:
        """Set a layer's weights in the dense network: what it computes must stay the same."""
        LayerParameters(self.layer(name), self.dense).write(theta)

    def constant(self, node: ir.Node, index: int) -> torch.Tensor:
        """Return a constant operand of a node in the dense network, float64."""
        value = node.inputs[index]
        assert value is not None
        return self.dense.weights[str(value.name)].detach().double()

    def set_constant(self, node: ir.Node, index: int, tensor: torch.Tensor) -> None:
        """Set a constant operand of a node in the dense network."""
        value = node.inputs[index]
        assert value is not None
        self.dense.weights[str(value.name)].data.copy_(tensor)

    def changed_constants(self) -> dict[str, NDArray[np.float32]]:
        """Return the constants of the dense network that are no longer the model's, by `node:input`.

        Weights and biases of linear layers are not among them.
        """
        of_layers = {str(layer.weight_value.name) for layer in self.layers}
        of_layers |= {str(layer.bias.name) for layer in self.layers if layer.bias is not None}
        changed = {
            name: weight.detach().cpu().numpy()
            for name, weight in self.dense.weights.items()
            if name not in of_layers and _digest(weight) != self._original[name]
        }
        return {
            f"{use.node.name}:{use.idx}": array
            for name, array in changed.items()
            for use in self.model.graph.initializers[name].uses()
        }

    def is_changed(self, name: str) -> bool:
        """Whether a layer's weight or bias in the pruned network is no longer the model's."""
        layer = self.layer(name)
        tensors = [layer.weight_value, *([layer.bias] if layer.bias is not None else [])]
        return any(
            _digest(self.pruned.weights[str(value.name)]) != self._original[str(value.name)]
            for value in tensors
            if str(value.name) in self._original
        )

    def current_layers(self) -> list[LinearLayer]:
        """Return the layers with the pruned network's present weights in their graph."""
        self.pruned.write_back(self.model)
        return self.layers

    def reset(self) -> None:
        """Give the pruned network the dense weights again."""
        for name, weight in self.pruned.weights.items():
            weight.data.copy_(self.dense.weights[name])

    def mask(self, masks: Mapping[str, NDArray[np.bool_]]) -> None:
        """Set the pruned network's weights to zero where the masks (bool [K, N], by layer name) are False."""
        for name, mask in masks.items():
            theta = self.theta(name)
            theta[: len(mask)] *= torch.from_numpy(mask).to(theta.device)
            self.set_theta(name, theta)

    def reconstruct(
        self,
        masks: Mapping[str, NDArray[np.bool_]],
        names: Collection[str],
        *,
        two_four: Collection[str] = (),
        token_weights: Mapping[str, NDArray[np.float64]] | None = None,
        settings: FitSettings | None = None,
        description: str = "reconstructing",
    ) -> dict[str, LayerFit]:
        """Solve the named layers of the pruned network anew, in graph order; see `reconstruction.network`."""
        chosen = [layer for layer in self.layers if layer.name in names and layer.name not in self.not_writable]
        return reconstruct(
            self.dense,
            self.pruned,
            chosen,
            self.batches,
            masks=masks,
            two_four=two_four,
            token_weights=token_weights,
            settings=settings,
            layouts=self.layouts,
            description=description,
        )

    @property
    def batches(self) -> list[Batch]:
        """The calibration samples that reconstruction works on: all, or as many as memory allows, evenly spread."""
        if self._batches is None:
            chosen = np.linspace(0, len(self.dataset) - 1, self._samples).round().astype(np.int64)
            samples = self.dataset.subset(chosen)
            held_out = np.arange(len(samples)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2
            self._batches, done = [], 0
            for feeds in samples.batches(self.batch_size):
                count = len(next(iter(feeds.values())))
                padding = self.batch_size - count if self.fixed_batch else 0
                real = np.arange(count + padding) < count
                judges = np.concatenate([held_out[done : done + count], np.zeros(padding, bool)])
                tensors = {
                    name: torch.from_numpy(np.concatenate([value, *[value[-1:]] * padding])).to(self.device)
                    for name, value in feeds.items()
                }
                self._batches.append(Batch(tensors, real & ~judges, judges))
                done += count
        return self._batches

    def _bytes_of_a_sample(self) -> int:
        """Estimate what is alive at a cut of both runs: a few tensors of the widest layer."""
        widest = max(layer.M * max(layer.K, layer.N) for layer in self.layers)
        return 4 * 6 * widest // self._traced_batch


def _digest(weight: torch.Tensor) -> bytes:
    """Return what tells whether a weight has changed, without a copy of it."""
    return hashlib.blake2b(weight.detach().cpu().numpy().data, digest_size=16).digest()
