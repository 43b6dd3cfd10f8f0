"""All bases of a network changed, one kind after the other, each only where the network still computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from lsp_deploy.bases.heads import concentrate_qk, concentrate_v, find_attentions
from lsp_deploy.bases.neurons import find_mlps, order_neurons
from lsp_deploy.bases.order import Arrangement
from lsp_deploy.bases.profile import profile_activations
from lsp_deploy.bases.rotation import rotate_stream, why_not_rotatable
from lsp_deploy.bases.streams import find_streams
from lsp_deploy.sensitivity.feeds import tensor_feeds

if TYPE_CHECKING:
    from lsp_deploy.search.network import Network
    from lsp_deploy.sensitivity.block_gradients import Objective

__all__ = ["change_bases"]

_SAMPLES = 2  # that outputs are compared on
_TOLERANCE = 2e-4  # of the largest output: float32 rounding in a deep network stays well below

_Change = Callable[[], None]


def change_bases(network: Network, objective: Objective, arrangement: Arrangement) -> list[str]:
    """Give the dense network the bases in which zeros cost least; its outputs stay the same, which is checked.

    Attention heads first, then the neurons of MLPs, then the residual stream. A change after which the outputs differ
    is taken back. The pruned network starts from the changed one.

    Args:
        network: the network.
        objective: what is differentiated, to score neurons.
        arrangement: sorted for blocks, interleaved for 2:4.

    Returns:
        What was changed and what not, in words for the report.
    """
    attentions, mlps = find_attentions(network), find_mlps(network)
    streams, reasons = find_streams(network.model.graph, network.layers)
    refused = [why_not_rotatable(network, stream) for stream in streams]
    reasons += [reason for reason in refused if reason is not None]
    streams = [stream for stream, reason in zip(streams, refused, strict=True) if reason is None]
    profile = profile_activations(
        network,
        objective,
        inputs=[layer for one in attentions for layer, _ in (one.q, one.k, one.v)],
        channels=[mlp.second for mlp in mlps],
        norms=[norm for stream in streams for norm in stream.norms],
    )
    trial = _Trial(network)
    kinds: list[tuple[str, list[_Change]]] = [
        ("q and k of {} attention{}", [partial(concentrate_qk, network, one, profile.inputs) for one in attentions]),
        (
            "v and proj of {} attention{}",
            [partial(concentrate_v, network, one, profile.inputs, arrangement) for one in attentions],
        ),
        (
            "the neurons of {} MLP{}",
            [
                partial(order_neurons, network, mlp, profile.channels[mlp.second.name], arrangement)
                for mlp in mlps
                if mlp.second.name in profile.channels
            ],
        ),
        (
            "{} residual stream{}",
            [partial(rotate_stream, network, stream, profile.normalized, arrangement) for stream in streams],
        ),
    ]
    notes = []
    for words, changes in kinds:
        done = trial.apply(changes)
        if done:
            notes.append(_counted(words, done))
        if done < len(changes):
            reasons.append(f"{_counted(words, len(changes) - done)}: the outputs would not have stayed the same")
    network.reset()
    changed = f"bases changed, outputs the same: {', '.join(notes)}" if notes else "no basis could be changed"
    return [changed, *(f"basis kept: {reason}" for reason in reasons)]


def _counted(words: str, number: int) -> str:
    return words.format(number, "" if number == 1 else "s")


class _Trial:
    """Makes changes and takes them back where the network's outputs change with them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        size = network.batch_size if network.fixed_batch else _SAMPLES
        self.feeds = tensor_feeds(network.dataset, np.arange(size) % len(network.dataset), network.device)
        self.expected = self._outputs()

    def apply(self, changes: Sequence[_Change]) -> int:
        """Make all changes, or those of them after which the outputs are the same; returns how many."""
        if not changes or self._keep(changes):
            return len(changes)
        return sum(self._keep([change]) for change in changes) if len(changes) > 1 else 0

    def _keep(self, changes: Sequence[_Change]) -> bool:
        before = {name: weight.detach().clone() for name, weight in self.network.dense.weights.items()}
        same = self._are_exact(changes)
        if not same:
            for name, weight in self.network.dense.weights.items():
                weight.data.copy_(before[name])
        return same

    def _are_exact(self, changes: Sequence[_Change]) -> bool:
        """Make the changes; returns whether the outputs are still the same."""
        try:
            for change in changes:
                change()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not finite, or without convergence
            return False
        outputs = self._outputs()
        return all(
            bool(torch.isfinite(outputs[name]).all())
            and float((outputs[name] - value).abs().max()) <= _TOLERANCE * float(value.abs().max())
            for name, value in self.expected.items()
        )

    @torch.no_grad()
    def _outputs(self) -> dict[str, torch.Tensor]:
        outputs = self.network.dense(self.feeds)
        return {name: value for name, value in outputs.items() if value.is_floating_point()}
