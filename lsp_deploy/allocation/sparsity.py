"""Which zeros each layer may get, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.masks import activation_score, two_four_mask
from lsp_deploy.allocation.precision import COMPRESSIBLE_ROLES
from lsp_deploy.plan import SparsityDecision
from lsp_deploy.sensitivity.quantization import output_sqnr_db

if TYPE_CHECKING:
    from lsp_deploy.hardware.cpu_timings import LayerTimes
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.sensitivity.activations import ActivationStatistics

__all__ = ["METHOD", "MaskedLayer", "cannot_have_two_four", "dense", "does_not_pay", "excluded", "two_four_layer"]

METHOD = "activation"  # |W|·‖x‖


@dataclass(frozen=True)
class MaskedLayer:
    """A mask for one layer and what it does to the layer's output."""

    mask: NDArray[np.bool_]
    sqnr_db: float
    """Of the pruned layer's output against the dense one's, on sampled rows, dB."""

    @property
    def zeros(self) -> float:
        """Fraction of entries that the mask makes zero."""
        return float(1 - self.mask.mean())


def excluded(layer: LinearLayer, exclude: str | None) -> str | None:
    """Return that the pattern of --exclude names a layer, or None."""
    if exclude is not None and re.search(exclude, layer.name):
        return f"left dense: --exclude {exclude} names it"
    return None


def cannot_have_two_four(layer: LinearLayer, exclude: str | None = None) -> str | None:
    """Return why a layer is not pruned to 2:4 whatever it would gain, or None.

    Args:
        layer: the layer.
        exclude: pattern of names that are not pruned.
    """
    if (reason := excluded(layer, exclude)) is not None:
        return reason
    if layer.role not in COMPRESSIBLE_ROLES:
        names = {"patch": "the patch embedding", "head": "the head"}
        return f"left dense: {names.get(layer.role, 'a layer outside attention and MLP')} is not pruned to 2:4"
    if layer.K % 4:
        return f"left dense: K = {layer.K} is not a multiple of 4"
    return None


def does_not_pay(layer: LinearLayer, target: Target, pattern: str, times: LayerTimes | None = None) -> str | None:
    """Return why zeros of this pattern gain nothing for this layer on this target, or None where they pay.

    Args:
        layer: the layer.
        target: what it runs on.
        pattern: 2:4 or block.
        times: what the layer takes on this machine, where that is the target; block zeros pay by these alone.
    """
    pays = target.pays
    if pattern == "block" and times is not None:
        return None if times.gain_from_zeros() > 0 else "zero blocks make this layer no faster (measured)"
    if pattern == "block":
        return None  # decided when what survives and the element types are known (gpu_execution)
    min_k, min_n = pays.sparse24_min_k, pays.sparse24_min_n
    if min_k is None or min_n is None:
        return f"2:4 gains nothing on {target.name} ({pays.source})"
    if min_k > layer.K or min_n > layer.N:
        return f"2:4 pays on {target.name} from K = {min_k} and N = {min_n}; this layer is {layer.K} × {layer.N}"
    return None


def two_four_layer(weight: NDArray[np.float32], statistics: ActivationStatistics) -> MaskedLayer:
    """Prune W [K, N] to 2:4 along K by |W|·‖x‖."""
    return _masked(weight, statistics, two_four_mask(activation_score(weight, statistics.channel_norm)))


def dense(asked: str, reason: str) -> SparsityDecision:
    """Return the decision to leave a layer dense."""
    return SparsityDecision(asked=asked, pattern="dense", zeros=0.0, method=None, reason=reason)


def _masked(weight: NDArray[np.float32], statistics: ActivationStatistics, mask: NDArray[np.bool_]) -> MaskedLayer:
    pruned = statistics.rows @ (weight * mask)
    return MaskedLayer(mask, output_sqnr_db(statistics.rows, weight, pruned))
