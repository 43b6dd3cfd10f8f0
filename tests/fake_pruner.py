"""A pruner that finds zeros without looking: for tests of what is decided about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lsp_deploy.allocation.masks import magnitude_score, two_four_mask
from lsp_deploy.allocation.pruning import Pruning
from lsp_deploy.linear_layers import LinearLayer
from lsp_deploy.plan import RecoveryDecision

INSIDE = ("qkv", "proj", "fc1", "fc2")


class FakePruner:
    """Removes whole layers' blocks from the front, or the smaller half; remembers what it was asked."""

    def __init__(self, layers: Sequence[LinearLayer], keep: float | None = None) -> None:
        self.layers, self.asked_keep = layers, keep
        self.kept: list[float] = []

    def two_four(self, names: Collection[str], asked: str) -> Pruning:
        pruning = Pruning(asked, method="fake")
        for layer in self.layers:
            if layer.name in names:
                pruning.masks[layer.name] = two_four_mask(magnitude_score(layer.weight()))
                pruning.patterns[layer.name] = "2:4"
                pruning.weights[layer.name] = layer.weight() * 2
                pruning.recoveries[layer.name] = RecoveryDecision(method="reconstruct", reason="fake")
        return pruning

    def two_four_damages(self, names: Collection[str]) -> dict[str, float]:
        return {name: float(len(names) - place) for place, name in enumerate(names)}  # the last layer does the least

    def blocks(self, keep: float) -> Pruning:
        self.kept.append(keep)
        pruning = Pruning("block", method="fake")
        for layer in self.layers:
            if layer.role in INSIDE:
                mask = np.zeros((layer.K, layer.N), bool)
                mask[:, : max(16, round(keep * layer.N / 16) * 16)] = True
                pruning.masks[layer.name], pruning.patterns[layer.name] = mask, "block"
                pruning.reasons[layer.name] = "the first columns stay"
            else:
                pruning.reasons[layer.name] = "left dense: fake"
        return pruning

    def finish(self) -> None:
        """Nothing is kept."""
