"""Neurons of an MLP, in the order of their importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lsp_deploy.bases.order import Arrangement, arranged

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.search.network import Network

__all__ = ["Mlp", "find_mlps", "order_neurons"]


@dataclass(frozen=True)
class Mlp:
    """Two layers with an activation between them."""

    first: LinearLayer
    second: LinearLayer

    @property
    def name(self) -> str:
        """For notes."""
        return self.first.name


def find_mlps(network: Network) -> list[Mlp]:
    """Return the pairs of fc1 and fc2 of one width whose weights can be changed."""
    found = []
    for second in (layer for layer in network.layers if layer.role == "fc2"):
        firsts = [layer for layer in network.layers if layer.role == "fc1" and layer.block == second.block]
        pair = (*firsts, second)
        if len(firsts) == 1 and firsts[0].N == second.K and not any(one.name in network.not_writable for one in pair):
            found.append(Mlp(firsts[0], second))
    return found


def order_neurons(network: Network, mlp: Mlp, importance: torch.Tensor, arrangement: Arrangement) -> None:
    """Reorder the columns of fc1, its bias, and the rows of fc2, in the dense network.

    Args:
        network: the network.
        mlp: the two layers.
        importance: [neurons].
        arrangement: what the order is for.
    """
    order = arranged(importance, arrangement)
    network.set_dense_theta(mlp.first.name, network.dense_theta(mlp.first.name)[:, order])
    theta = network.dense_theta(mlp.second.name)
    theta[: mlp.second.K] = theta[order]
    network.set_dense_theta(mlp.second.name, theta)
