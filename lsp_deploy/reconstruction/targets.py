"""What a layer's new weights are fitted to: the dense layer's output, or what the dense residual stream lacks.

A layer that ends in a residual Add can do more than repeat its dense output: fitted to dense stream - pruned shortcut,
it also makes up for what earlier layers lost.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lsp_deploy.autodiff.module import Execution
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["FitTarget", "fit_target"]

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class FitTarget:
    """Where in the graph a layer's target is read."""

    output_node: str
    """The node that gives the layer's output, bias included."""
    output: str
    """That output's value."""
    residual_node: str | None
    """The residual Add, where the dense stream after it is what is fitted."""
    residual_output: str = ""
    branch: str = ""
    """The operand of the Add that comes from the layer."""
    shortcut: str = ""
    """The other one."""

    @property
    def dense_node(self) -> str:
        """The node after which the dense run holds what is fitted."""
        return self.residual_node or self.output_node

    @property
    def dense_value(self) -> str:
        """The value that the dense run is read at."""
        return self.residual_output if self.residual_node else self.output

    def wanted(self, pruned: Execution, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what the layer should give, shaped like its output, and which entries of it matter (1, or 0).

        Args:
            pruned: the run of the pruned network, stopped before the layer; it does not move.
            dense: the dense run's `dense_value`.

        Returns:
            None where the way from the layer to the Add cannot be undone, through a normalization, say.
        """
        if self.residual_node is None:
            return dense, torch.ones_like(dense)
        if self.branch == self.output and self.shortcut in pruned.values:
            wanted = dense - pruned.values[self.shortcut]
            return wanted, torch.ones_like(wanted)
        return self._through_branch(pruned, dense)

    def _through_branch(self, pruned: Execution, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Undo what lies between the layer and the Add: reordering, cropping, a scale for each channel.

        Such a way is an affine map f whose Jacobian J has orthogonal columns, so y = Jᵀ(t - f(0)) / diag(JᵀJ) solves
        f(y) = t; that it does is checked.
        """
        ahead = copy.copy(pruned)
        ahead.values = dict(pruned.values)
        ahead.advance(self.output_node, after=True)
        like = ahead.values[self.output]

        def way(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            run = copy.copy(ahead)
            run.values = {**ahead.values, self.output: y}
            run.advance(str(self.residual_node), after=False)
            return run.values[self.branch], run.values[self.shortcut]

        with torch.enable_grad():
            leaf = torch.zeros_like(like).requires_grad_()
            at_zero, shortcut = way(leaf)
            target = (dense - shortcut).expand_as(at_zero) - at_zero.detach()
            ones = way(torch.ones_like(like))[0] - at_zero.detach()
            (back,) = torch.autograd.grad(at_zero, leaf, target, retain_graph=True)
            (squared,) = torch.autograd.grad(at_zero, leaf, ones)
        matters = (squared > 1e-12).to(like.dtype)
        wanted = back / torch.where(squared > 1e-12, squared, 1.0)
        missed = way(wanted)[0] - at_zero.detach() - target
        if not float(missed.norm()) <= _TOLERANCE * float(target.norm()) + 1e-12:
            return None
        return wanted, matters


def fit_target(layer: LinearLayer, *, residual: bool) -> FitTarget:
    """Return what `layer` is fitted to; with `residual` the stream after its residual Add, where it has one."""
    ends_with_bias = layer.bias_node is not None and layer.bias_node is not layer.node
    output = layer.bias_node.outputs[0] if ends_with_bias and layer.bias_node is not None else layer.y
    producer = output.producer()
    assert producer is not None
    add = layer.residual if residual else None
    if add is None:
        return FitTarget(str(producer.name), str(output.name), None)
    reached = {output}
    waiting = [output]
    while waiting:
        for node in waiting.pop().consumers():
            if node is not add:
                waiting += [value for value in node.outputs if value not in reached]
                reached.update(node.outputs)
    operands = [value for value in add.inputs if value is not None]
    inner = next(value for value in operands if value in reached)
    outer = next(value for value in operands if value is not inner)
    return FitTarget(
        output_node=str(producer.name),
        output=str(output.name),
        residual_node=str(add.name),
        residual_output=str(add.outputs[0].name),
        branch=str(inner.name),
        shortcut=str(outer.name),
    )
