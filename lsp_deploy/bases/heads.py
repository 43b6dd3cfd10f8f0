"""Attention heads whose channels are the principal ones of what the head computes.

Scores need q kᵀ only, and the output v proj only: for any invertible R, (q R)(k R⁻ᵀ)ᵀ and (v R)(R⁻¹ proj) are the
same. In the metric of the inputs, the singular value decomposition of the product gives the R that concentrates it in
as few channels as can be, and shares the singular values evenly between the two factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from lsp_deploy.bases.order import Arrangement, arranged

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.search.network import Network

__all__ = ["Attention", "concentrate_qk", "concentrate_v", "find_attentions"]

_SMALLEST = 1e-4  # of the mean input energy: directions that carry less are taken to carry that


@dataclass(frozen=True)
class Attention:
    """Where q, k, v and proj of one attention are; columns in the order of the heads."""

    q: tuple[LinearLayer, slice]
    k: tuple[LinearLayer, slice]
    v: tuple[LinearLayer, slice]
    proj: LinearLayer
    heads: int

    @property
    def name(self) -> str:
        """For notes."""
        return self.proj.name


def find_attentions(network: Network) -> list[Attention]:
    """Return the attentions whose layout is one of those that exporters write; that it is has still to be tried.

    One layer gives q, k and v side by side, each of them head by head; or three layers do, v being the one that does
    not feed the softmax.
    """
    found = []
    for proj in (layer for layer in network.layers if layer.role == "proj"):
        sources = [layer for layer in network.layers if layer.role == "qkv" and layer.block == proj.block]
        if any(layer.name in network.not_writable for layer in (*sources, proj)) or not sources:
            continue
        heads = _heads(sources[0].node, proj.node)
        width = proj.K
        if heads is None or width % heads:
            continue
        if len(sources) == 1 and 3 * width == sources[0].N:
            q, k, v = ((sources[0], slice(part * width, (part + 1) * width)) for part in range(3))
            found.append(Attention(q, k, v, proj, heads))
        elif len(sources) == 3 and all(width == layer.N for layer in sources):
            scored = [layer for layer in sources if _feeds_softmax(layer.y)]
            values = [layer for layer in sources if layer not in scored]
            if len(scored) == 2 and len(values) == 1:
                whole = slice(0, width)
                found.append(Attention((scored[0], whole), (scored[1], whole), (values[0], whole), proj, heads))
    return found


def concentrate_qk(network: Network, attention: Attention, moments: dict[str, torch.Tensor]) -> None:
    """Give q and k of every head the basis of the principal directions of their product, in the dense network.

    Args:
        network: the network.
        attention: its layers.
        moments: of the inputs of the layers, with a column of ones, by layer name.
    """
    (q_layer, q_columns), (k_layer, k_columns) = attention.q, attention.k
    for q_at, k_at in zip(_by_head(q_columns, attention.heads), _by_head(k_columns, attention.heads), strict=True):
        q, k = network.dense_theta(q_layer.name), network.dense_theta(k_layer.name)
        q_root, q_inverse = _roots(moments[q_layer.name], len(q))
        k_root, k_inverse = _roots(moments[k_layer.name], len(k))
        left, values, right = _thin_svd(q_root @ q[:, q_at], k_root @ k[:, k_at])
        network.set_dense_theta(q_layer.name, _with_columns(q, q_at, q_inverse @ left * values.sqrt()))
        k = network.dense_theta(k_layer.name)  # the same tensor where q, k and v come from one layer
        network.set_dense_theta(k_layer.name, _with_columns(k, k_at, k_inverse @ right * values.sqrt()))


def concentrate_v(
    network: Network, attention: Attention, moments: dict[str, torch.Tensor], arrangement: Arrangement
) -> None:
    """Give v of every head and the rows of proj the basis of the principal directions of their product.

    Args:
        network: the network, whose dense weights change.
        attention: its layers.
        moments: of the inputs of the layers, with a column of ones, by layer name.
        arrangement: of the channels of a head, which are rows of proj.
    """
    layer, columns = attention.v
    rows_of = _by_head(slice(0, attention.proj.K), attention.heads)
    for at, rows in zip(_by_head(columns, attention.heads), rows_of, strict=True):
        v, proj = network.dense_theta(layer.name), network.dense_theta(attention.proj.name)
        root, inverse = _roots(moments[layer.name], len(v))
        left, values, right = _thin_svd(root @ v[:, at], proj[rows].T)
        order = arranged(values, arrangement)
        network.set_dense_theta(layer.name, _with_columns(v, at, (inverse @ left * values.sqrt())[:, order]))
        proj[rows] = (right * values.sqrt()).T[order]
        network.set_dense_theta(attention.proj.name, proj)


def _thin_svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose left @ right.T, of rank D, into u · diag(s) · w.T: u [m, D], s [D], w [n, D]."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    u, s, wt = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, s, q_right @ wt.T


def _roots(moment: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of an input moment and its inverse, [size, size]; without a bias the ones are left out."""
    moment = moment[:size, :size] / moment[-1, -1]
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0) + _SMALLEST * values.clamp_min(0).mean()
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def _with_columns(theta: torch.Tensor, at: slice, columns: torch.Tensor) -> torch.Tensor:
    theta = theta.clone()
    theta[:, at] = columns
    return theta


def _by_head(columns: slice, heads: int) -> Sequence[slice]:
    width = (columns.stop - columns.start) // heads
    return [slice(columns.start + head * width, columns.start + (head + 1) * width) for head in range(heads)]


def _heads(first: ir.Node, last: ir.Node) -> int | None:
    """Return the second dimension of the softmax between two nodes: the number of heads."""
    graph = first.graph
    assert graph is not None
    between = False
    for node in graph:
        between = between or node is first
        if node is last:
            return None
        if between and node.op_type == "Softmax":
            shape = node.outputs[0].shape
            heads = shape[1] if shape is not None and len(shape) == 4 else None
            return heads if isinstance(heads, int) else None
    return None


def _feeds_softmax(value: ir.Value) -> bool:
    """Whether a value reaches a Softmax before it meets another linear layer's MatMul with constants."""
    waiting, seen = [value], {value}
    while waiting:
        for node in waiting.pop().consumers():
            if node.op_type == "Softmax":
                return True
            constant = len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].const_value is not None
            if node.op_type in ("MatMul", "Gemm", "Conv") and constant:
                continue
            fresh = [output for output in node.outputs if output not in seen]
            seen.update(fresh)
            waiting += fresh
    return False
