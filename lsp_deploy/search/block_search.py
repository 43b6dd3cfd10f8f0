"""Blocks removed from a network, in one shot or gradually, until a budget is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.allocation.exact import ExactAllocator
from lsp_deploy.allocation.lsp import LspAllocator
from lsp_deploy.allocation.pruning import OutOfReachError
from lsp_deploy.allocation.structure import prefer_structure
from lsp_deploy.hardware.cost_model import block_matmul_energy_uj
from lsp_deploy.search.block_curves import additive_curve, block_mask_of, block_sizes, layer_curve, removed_blocks
from lsp_deploy.search.checkpoints import Checkpoints, SearchState
from lsp_deploy.search.duration import in_words
from lsp_deploy.search.gradients import mean_magnitude, network_gradients, token_weights
from lsp_deploy.sensitivity.results import LayerSensitivity

if TYPE_CHECKING:
    from lsp_deploy.allocation.problem import Allocation, LayerCurve
    from lsp_deploy.graph.structure import StructureGroup
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.reconstruction.network import LayerFit
    from lsp_deploy.search.gradients import NetworkGradients
    from lsp_deploy.search.measure import Measure
    from lsp_deploy.search.network import Network
    from lsp_deploy.sensitivity.block_gradients import Objective
    from lsp_deploy.sensitivity.results import Sensitivity

__all__ = ["BlockSearch", "Found", "SearchSettings"]

STEP = 0.05  # of the measure, a gradual step


@dataclass(frozen=True)
class SearchSettings:
    """How blocks are searched for."""

    block: tuple[int, int]
    allocator: Literal["exact", "lsp"] = "exact"
    power_weight: float = 1.0
    min_density: float = 0.0
    recover: bool = True
    groups: Sequence[StructureGroup] = ()
    """Units that leave the graph as a whole, where those are preferred."""


@dataclass
class Found:
    """What a search ended with; the weights are in the pruned network."""

    gone: dict[str, NDArray[np.bool_]]
    """By layer name: bool [blocks], True where the block is gone."""
    allocation: Allocation
    search: Literal["one-shot", "gradual"]
    fits: dict[str, LayerFit] = field(default_factory=dict)


class BlockSearch:
    """Removes blocks of some layers of one network; the dense network is analysed once, for any number of budgets."""

    def __init__(
        self,
        network: Network,
        prunable: Sequence[LinearLayer],
        others: Sequence[LinearLayer],
        refitted: Sequence[LinearLayer],
        sensitivity: Sensitivity,
        objective: Objective,
        measure: Measure,
        settings: SearchSettings,
        checkpoints: Path,
        token_weights: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        """Take what the search depends on.

        Args:
            network: with its bases as they are to be.
            prunable: layers that may lose blocks; one for each weight, its M that of all its uses.
            others: the layers that keep theirs.
            refitted: layers that reconstruction solves, pruned or not.
            sensitivity: of the dense network.
            objective: what is differentiated in gradual steps: against the dense network's answers.
            measure: what the budget counts.
            settings: how.
            checkpoints: folder where gradual steps are kept until the search has ended.
            token_weights: of the dense network, where the analysis has gathered them on its way.
        """
        self.network, self.refitted = network, list(refitted)
        self.prunable, self.others = list(prunable), list(others)
        self.sensitivity, self.objective, self.measure, self.settings = sensitivity, objective, measure, settings
        self._checkpoints = Checkpoints(checkpoints)
        self._known_token_weights = token_weights

    @cached_property
    def dense_cost(self) -> float:
        """The measure of the whole dense network."""
        measure = self.measure
        return measure.always + sum(measure.of_dense(layer) for layer in (*self.prunable, *self.others))

    def predicted_damage(self, keep: float) -> float:
        """Return what one shot at this budget is expected to do to the objective, without recovery (an estimate).

        Raises:
            OutOfReachError: so little cannot be left.
        """
        return self._allocate(self._dense_curves(), keep).damage

    def one_shot(self, keep: float) -> Found:
        """Remove blocks once until the fraction `keep` of the measure is left, and reconstruct.

        Raises:
            OutOfReachError: so little cannot be left.
        """
        curves = self._dense_curves()
        allocation = self._allocate(curves, keep)
        gone = removed_blocks(curves, allocation.removed)
        return Found(
            gone, allocation, "one-shot", self._apply_to_dense(gone, self._dense_token_weights, "reconstructing")
        )

    def gradual(self, keep: float) -> Found:
        """Remove blocks in steps, each scored on the network as the last one left it.

        Every step applies its mask to the dense weights and reconstructs them, so that errors do not add up over the
        steps. A search that was interrupted goes on behind its last step.

        Raises:
            OutOfReachError: so little cannot be left.
        """
        budgets = [*(1 - STEP * step for step in range(1, round(1 / STEP)) if 1 - STEP * step > keep + 1e-9), keep]
        # The last step is always taken: its allocation is what the reasons come from.
        done, state = self._checkpoints.latest(budgets[:-1], self._untouched())
        if done:
            self._apply_to_dense(state.gone, state.token_weights, f"back at {budgets[done - 1]:.1%}")
        else:
            self.network.reset()
        for step, budget in enumerate(budgets[done:], done):
            curves = self._renewed_curves(state) if step else self._first_curves(state)
            allocation = self._allocate(curves, budget, gone=state.gone)
            for name, gone in removed_blocks(curves, allocation.removed).items():
                state.gone[name] |= gone
            fits = self._apply_to_dense(state.gone, state.token_weights, f"step to {budget:.1%}")
            self._checkpoints.save(budget, state)
        return Found(state.gone, allocation, "gradual", fits)

    def _first_curves(self, state: SearchState) -> list[LayerCurve]:
        """Return the dense network's curves: the analysis has them."""
        state.token_weights = dict(self._dense_token_weights)
        return self._dense_curves()

    def _renewed_curves(self, state: SearchState) -> list[LayerCurve]:
        """Differentiate the network as it stands; its scores and token weights go into `state`."""
        gradients = network_gradients(
            self.network, self.objective, self.settings.block, contributions=self.settings.allocator == "lsp"
        )
        state.token_weights = dict(gradients.token_weights)
        state.scores = _averaged(state.scores, gradients.scores)
        if self.settings.allocator == "exact":
            return self._curves_of(state)
        block, kappa = self.settings.block, self.sensitivity.kappa
        return [_lsp_curve(one, gradients, state.gone[one.name], block, kappa) for one in self.prunable]

    def forget(self) -> None:
        """Remove the checkpoints: the search has ended."""
        self._checkpoints.remove()

    def masks(self, gone: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
        """Return the masks, bool [K, N], of the layers that lost blocks."""
        return {
            layer.name: block_mask_of(layer, self.settings.block, gone[layer.name])
            for layer in self.prunable
            if gone[layer.name].any()
        }

    @cached_property
    def _dense_token_weights(self) -> dict[str, NDArray[np.float64]]:
        if not self.settings.recover:
            return {}
        if self._known_token_weights is not None:
            return dict(self._known_token_weights)
        self.network.reset()
        return token_weights(self.network, self.objective)

    @cached_property
    def _dense_scores(self) -> dict[str, NDArray[np.float64]]:
        return {
            layer.name: mean_magnitude(self.sensitivity.layers[layer.name].gradients.contributions)
            for layer in self.prunable
        }

    def _dense_curves(self) -> list[LayerCurve]:
        block = self.settings.block
        if self.settings.allocator == "lsp":
            layers = self.sensitivity.layers
            return [layer_curve(one, block, layers[one.name].order, layers[one.name].delta) for one in self.prunable]
        return self._curves_of(self._untouched())

    def _curves_of(self, state: SearchState) -> list[LayerCurve]:
        block = self.settings.block
        if self.settings.groups:
            costs = {one.name: (2 * one.M * block_sizes(one, block)).astype(np.float64) for one in self.prunable}
            found = prefer_structure(state.scores, costs, self.settings.groups, gone=state.gone)
            return [layer_curve(one, block, *found[one.name]) for one in self.prunable]
        return [additive_curve(one, block, state.scores[one.name], state.gone[one.name]) for one in self.prunable]

    def _allocate(
        self, curves: Sequence[LayerCurve], keep: float, gone: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> Allocation:
        settings, measure = self.settings, self.measure
        layers = {layer.name: layer for layer in self.prunable}
        try:
            if settings.allocator == "lsp":
                fixed = measure.always + sum(measure.of_dense(layer) for layer in self.others)
                tile_m, p_m = self._power_terms
                return LspAllocator(
                    curves,
                    tile_m=tile_m,
                    p_m=p_m,
                    power_weight=settings.power_weight,
                    min_density=settings.min_density,
                    fixed_flops=fixed,
                    removed={name: int(flags.sum()) for name, flags in (gone or {}).items()},
                ).allocate(keep)
            return ExactAllocator(
                curves,
                costs={curve.name: measure.of_blocks(layers[curve.name], curve.sizes) for curve in curves},
                fixed_cost=measure.always + sum(measure.of_dense(layer) for layer in self.others),
                min_density=settings.min_density,
                unit=measure.unit,
            ).allocate(keep * self.dense_cost)
        except ValueError as error:
            raise OutOfReachError(f"the budget cannot be met: {error}; ask for more, or prune more layers") from error

    @cached_property
    def _power_terms(self) -> tuple[int, dict[str, float] | float]:
        """Return B_m and p_m of Eq. 7; on a CPU, which has no figures, they cancel."""
        target = self.measure.target
        if not target.peak:
            return 64, 1.0
        return target.kernels.tile_m, {
            layer.name: block_matmul_energy_uj(target, self.measure.dtypes[layer.name], self.settings.block)
            for layer in self.prunable
        }

    def _untouched(self) -> SearchState:
        gone = {name: np.zeros(len(scores), bool) for name, scores in self._dense_scores.items()}
        return SearchState(gone, dict(self._dense_scores), {})

    def _apply_to_dense(
        self, gone: Mapping[str, NDArray[np.bool_]], weights: Mapping[str, NDArray[np.float64]], description: str
    ) -> dict[str, LayerFit]:
        """Give the pruned network the dense weights without the blocks that are gone, reconstructed."""
        self.network.reset()
        masks = self.masks(gone)
        if not self.settings.recover:
            self.network.mask(masks)
            return {}
        fits = self.network.reconstruct(
            masks,
            {layer.name for layer in self.refitted} | masks.keys(),
            token_weights=weights,
            description=description,
        )
        self.network.mask({name: mask for name, mask in masks.items() if name not in fits})
        return fits

    def say_beforehand(self, keep: float, search: str) -> None:
        """Tell the user how long the search is going to take, where that is long: an estimate."""
        steps = int(np.ceil((1 - keep) / STEP - 1e-9)) if search == "gradual" else 1
        each = self.network.pass_seconds
        if self.settings.recover:
            each += self.network.reconstruction_seconds({layer.name for layer in (*self.refitted, *self.prunable)})
        if steps * each > 30:
            what = f"gradual search in {steps} steps" if search == "gradual" else "one-shot search"
            console.say(f"{what}: about {in_words(steps * each)} from here (estimated)")


def _averaged(
    before: Mapping[str, NDArray[np.float64]], now: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of the scores of two steps, each in shares of its total over all layers."""
    totals = [sum(float(one[name].sum()) for name in before) or 1.0 for one in (before, now)]
    return {name: 0.5 * before[name] / totals[0] + 0.5 * now[name] / totals[1] for name in before}


def _lsp_curve(
    layer: LinearLayer,
    gradients: NetworkGradients,
    gone: NDArray[np.bool_],
    block: tuple[int, int],
    kappa: float,
) -> LayerCurve:
    """Return the δ-curve of a layer as it stands; blocks that are gone come first and do nothing."""
    sensitivity = LayerSensitivity(layer.name, layer.K, layer.N, block, gradients.blocks[layer.name], kappa)
    order = np.lexsort((np.arange(len(gone)), gradients.blocks[layer.name].taylor, ~gone)).astype(np.int64)
    return layer_curve(layer, block, order, sensitivity.curve(order))
