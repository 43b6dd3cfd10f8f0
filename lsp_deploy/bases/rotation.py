"""The residual stream in the basis of its principal directions, as far as LayerNorm allows.

LayerNorm without its gain and offset is blind to every rotation that keeps the vector of ones: both the mean that it
subtracts and the norm that it divides by stay. The gain and offset go into the layers that read it first. SliceGPT
(Ashkboos et al., 2024) rotates for RMSNorm; here the mean stays where it was, and no operator changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lsp_deploy.bases.order import Arrangement, arranged
from lsp_deploy.bases.streams import Stream

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.search.network import Network

__all__ = ["rotate_stream", "rotation", "why_not_rotatable"]


def why_not_rotatable(network: Network, stream: Stream) -> str | None:
    """Return why a stream keeps its basis, or None."""
    layers = [layer for layer, _ in (*stream.readers, *stream.writers)]
    shared = [layer.name for layer in layers if layer.name in network.not_writable]
    if shared:
        return f"{shared[0]}: {network.not_writable[shared[0]]}"
    for layer, norm in stream.readers:
        if norm is not None and layer.bias is None and bool(network.constant(norm, 2).any()):
            return f"{layer.name} has no bias to take the offset of {norm.name}"
    return None


def rotate_stream(
    network: Network, stream: Stream, normalized: dict[str, torch.Tensor], arrangement: Arrangement
) -> None:
    """Rotate a stream of the dense network.

    Args:
        network: the network.
        stream: what touches it; `why_not_rotatable` has nothing against it.
        normalized: second moments by LayerNormalization node, before gain and offset.
        arrangement: of the channels, which are rows of the layers that read them.
    """
    moments = [normalized[str(norm.name)] for norm in stream.norms if str(norm.name) in normalized]
    R = rotation(torch.stack([one / one.trace() for one in moments]).sum(dim=0), arrangement)
    for layer, norm in stream.readers:
        if norm is not None:
            _fold_norm(network, layer.name, layer.K, norm)
    for norm in stream.norms:
        network.set_constant(norm, 1, torch.ones_like(network.constant(norm, 1)))
        network.set_constant(norm, 2, torch.zeros_like(network.constant(norm, 2)))
    for layer, scale in stream.writers:
        if scale is not None:
            index = next(
                i for i, value in enumerate(scale.inputs) if value is not None and value.const_value is not None
            )
            factor = network.constant(scale, index)
            network.set_dense_theta(layer.name, network.dense_theta(layer.name) * factor.reshape(-1))
            network.set_constant(scale, index, torch.ones_like(factor))
        network.set_dense_theta(layer.name, network.dense_theta(layer.name) @ R)
    for layer, _ in stream.readers:
        theta = network.dense_theta(layer.name)
        theta[: layer.K] = R.T @ theta[: layer.K]
        network.set_dense_theta(layer.name, theta)
    for constant in stream.constants:
        value = network.constant(constant.node, constant.index)
        rotated = (value.movedim(constant.axis, -1) @ R).movedim(-1, constant.axis)
        network.set_constant(constant.node, constant.index, rotated)


def rotation(moment: torch.Tensor, arrangement: Arrangement) -> torch.Tensor:
    """Return an orthogonal R [d, d] with 1ᵀR = 1ᵀ whose columns are near the principal directions of `moment`.

    In the basis of 1/√d and the principal directions V orthogonal to it, a Householder reflection maps the first unit
    vector onto 1/√d. It moves every other coordinate by about one d-th of what the large ones hold.
    """
    d = len(moment)
    one = torch.full((d, 1), d**-0.5, dtype=moment.dtype, device=moment.device)
    plane = torch.eye(d, dtype=moment.dtype, device=moment.device) - one @ one.T
    # 1/√d gets the lowest eigenvalue: it is the first, the others are the principal directions of the plane.
    _, vectors = torch.linalg.eigh(plane @ moment @ plane - one @ one.T * moment.trace())
    basis = torch.cat([one, vectors[:, 1:]], dim=1)
    axis = one.clone()
    axis[0] -= 1
    axis = axis / axis.norm()
    R: torch.Tensor = basis - 2 * (basis @ axis) @ axis.T
    return R[:, arranged((R * (moment @ R)).sum(dim=0), arrangement)]


def _fold_norm(network: Network, name: str, K: int, norm: ir.Node) -> None:
    """Take (x̂ γ + β) W + b to x̂ (diag(γ) W) + (b + β W)."""
    gain, offset = (network.constant(norm, index).reshape(-1) for index in (1, 2))
    theta = network.dense_theta(name)
    if len(theta) > K:
        theta[K] += offset @ theta[:K]
    theta[:K] *= gain[:, None]
    network.set_dense_theta(name, theta)
