"""Zeros for a network as its recipe asks for them: analysed, allocated, reconstructed, put into words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_deploy import __version__, console
from lsp_deploy.allocation.masks import magnitude_score, two_four_mask
from lsp_deploy.allocation.pruning import Analysis, ChosenPoint, Pruning
from lsp_deploy.allocation.sparsity import excluded
from lsp_deploy.bases.change import change_bases
from lsp_deploy.cache import GRADIENTS, cache_folder, content_key
from lsp_deploy.graph.structure import structure_groups
from lsp_deploy.plan import RecoveryDecision
from lsp_deploy.search.block_search import BlockSearch, Found, SearchSettings
from lsp_deploy.search.duration import in_words
from lsp_deploy.search.gradients import TokenEnergies, removal_damages, token_weights
from lsp_deploy.search.measure import Measure
from lsp_deploy.search.network import Network
from lsp_deploy.sensitivity.analysis import analyse
from lsp_deploy.sensitivity.block_gradients import block_count, weight_groups
from lsp_deploy.sensitivity.feeds import real_samples, tensor_feeds
from lsp_deploy.sensitivity.objectives import default_objective, make_objective

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.bases.order import Arrangement
    from lsp_deploy.data import Dataset
    from lsp_deploy.graph.structure import StructureGroup
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.reconstruction.network import LayerFit
    from lsp_deploy.sensitivity.block_gradients import Objective
    from lsp_deploy.sensitivity.results import Sensitivity

__all__ = ["NetworkPruner", "PruningTask"]

REFITTED_ROLES = frozenset({"qkv", "proj", "fc1", "fc2"})
GRADUAL_FROM = 2.0
"""Predicted damage, in units of the objective, above which `auto` searches gradually.

On DeiT-Tiny, 32×32, steps gained nothing below it and up to 7 points above: docs/benchmarks/2026-11-28-pruning.md.
"""
_CACHE_FORMAT = 1  # of the steps of a search


@dataclass(frozen=True)
class PruningTask:
    """What a pruner works on."""

    model: ir.Model
    """Canonical, float32; it is not changed."""
    model_sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    """Input shapes that FLOPs are counted at."""
    calibration: Dataset
    fixed_batch: bool
    recipe: Recipe
    recover: bool
    """Whether surviving weights are reconstructed."""
    change_bases: bool
    measure: Measure
    budget: float | None
    """In the measure's unit; a fraction of the dense ones for FLOPs; None: as far as the loss allows."""
    device: str = "cpu"


class NetworkPruner:
    """Answers `Pruner`'s questions with gradients of the graph; everything expensive is done once."""

    def __init__(self, task: PruningTask) -> None:
        """Take the task; nothing is run yet."""
        self.task = task
        self.notes: list[str] = []
        self._networks: dict[str, Network] = {}
        self._energies = TokenEnergies()

    def two_four(self, names: Collection[str], asked: str) -> Pruning:
        """Prune the named layers to 2:4: SparseGPT's masks, chosen layer by layer with the reconstruction."""
        network = self._network("interleaved")
        network.reset()
        weights = self._two_four_token_weights
        solved = {layer.name for layer in network.layers if layer.role in REFITTED_ROLES} | set(names)
        seconds = network.reconstruction_seconds(solved, names)
        if seconds > 30:
            console.say(f"2:4 in {len(names)} layers: about {in_words(seconds)} from here (estimated)")
        fits = network.reconstruct(
            {},
            solved,
            two_four=set(names),
            token_weights=weights,
            description=f"2:4 in {len(names)} layers",
        )
        pruning = self._pruning(network, fits, asked, "sparsegpt")
        for name in names:
            if name in fits:
                pruning.masks[name], pruning.patterns[name] = fits[name].mask, "2:4"
            else:
                pruning.reasons[name] = f"left dense: {network.not_writable[name]}"
        return pruning

    def two_four_damages(self, names: Collection[str]) -> dict[str, float]:
        """Predict what 2:4 in each of the named layers alone does to the objective, before recovery.

        The masks are those of magnitude: SparseGPT's depend on the layers before.
        """
        network = self._network("interleaved")
        network.reset()
        masks = {
            layer.name: two_four_mask(magnitude_score(layer.weight()))
            for layer in network.current_layers()
            if layer.name in names
        }
        return removal_damages(network, self._objective(network), masks)

    @property
    def asked_keep(self) -> float | None:
        """The fraction of the dense measure that the recipe's budget leaves; None without a budget."""
        budget = self.task.budget
        if budget is None or self.task.measure.kind == "flops":
            return budget
        return min(1.0, budget / self.block_search.dense_cost)

    def blocks(self, keep: float) -> Pruning:
        """Prune blocks until the fraction `keep` of the measure is left.

        Raises:
            OutOfReachError: so little cannot be left.
        """
        search = self.block_search
        damage = search.predicted_damage(keep)  # says at once where the budget is out of reach
        how = self._how(keep)
        search.say_beforehand(keep, how)
        found = search.one_shot(keep) if how == "one-shot" else search.gradual(keep)
        network = search.network
        pruning = self._pruning(network, found.fits, "block", f"{self.task.recipe.allocator}, {found.search}")
        for layer, mask in search.masks(found.gone).items():
            for name in self._sharing[layer]:
                pruning.masks[name], pruning.patterns[name] = mask, "block"
        pruning.reasons = self._reasons(found)
        sensitivity = self._sensitivity
        pruning.analysis = Analysis(
            objective=sensitivity.objective,
            samples=sensitivity.samples,
            kappa=sensitivity.kappa,
            allocator=self.task.recipe.allocator,
            search=found.search,
            measure=self.task.measure.kind,
            keep=keep,
            predicted_damage=damage,
            curves={
                name: ChosenPoint(self._curve_to(name, gone), int(gone.sum())) for name, gone in found.gone.items()
            },
        )
        return pruning

    def finish(self) -> None:
        """Forget what only an interrupted run would need."""
        if "block_search" in self.__dict__:
            self.block_search.forget()

    @cached_property
    def block_search(self) -> BlockSearch:
        """The search over blocks, its network analysed."""
        task, recipe = self.task, self.task.recipe
        network = self._network("sorted")
        sensitivity = self._sensitivity
        prunable = [layer for layer in self._one_per_weight if not self.why_dense(layer)]
        covered = {name for layer in prunable for name in self._sharing[layer.name]}
        return BlockSearch(
            network,
            prunable,
            [layer for layer in network.layers if layer.name not in covered],
            [layer for layer in network.layers if layer.role in REFITTED_ROLES],
            sensitivity,
            self._objective(network),
            task.measure,
            SearchSettings(
                block=recipe.block_shape,
                allocator=recipe.allocator,
                power_weight=recipe.power_weight,
                min_density=recipe.min_density,
                recover=task.recover,
                groups=self._groups(network, prunable) if recipe.prefer_structure else (),
            ),
            cache_folder() / "search" / self._search_key(),
            self._energies.weights() if self._energies.are_of_all(len(task.calibration)) else None,
        )

    def why_dense(self, layer: LinearLayer) -> str | None:
        """Return why a layer keeps all its blocks, or None."""
        if (reason := excluded(layer, self.task.recipe.exclude)) is not None:
            return reason
        if block_count(layer, self.task.recipe.block_shape) < 2:
            return f"left dense: {layer.K} × {layer.N} is a single block"
        return None

    def _groups(self, network: Network, prunable: Collection[LinearLayer]) -> list[StructureGroup]:
        """Return the units of layers that may all be pruned."""
        names = {layer.name for layer in prunable}
        groups = structure_groups(network.model, network.layers, self.task.recipe.block_shape, self.task.shapes)
        whole = [group for group in groups if {*group.blocks, *group.free} <= names]
        self.notes.append(f"whole units preferred: {len(whole)} groups of neurons and heads can leave the graph")
        return whole

    def _network(self, arrangement: Arrangement) -> Network:
        if arrangement not in self._networks:
            task = self.task
            network = Network(
                task.model, task.shapes, task.calibration, fixed_batch=task.fixed_batch, device=task.device
            )
            if task.change_bases:
                self.notes += change_bases(network, self._own_objective, arrangement)
            used, given = network.reconstruction_samples, len(task.calibration)
            if task.recover and used < given:
                self.notes.append(f"weights were reconstructed on {used} of {given} samples: more take too much memory")
            self._networks[arrangement] = network
        return self._networks[arrangement]

    @property
    def _objective_name(self) -> str:
        return self.task.recipe.objective or default_objective(self.task.model, self.task.calibration.labels)

    @property
    def _own_objective(self) -> Objective:
        """The objective of the dense network itself."""
        task = self.task
        return make_objective(self._objective_name, task.model, task.calibration.labels, seed=task.recipe.seed)

    def _objective(self, network: Network) -> Objective:
        """Return the objective of the pruned network, against the dense one's answers."""

        @torch.no_grad()
        def dense(indices: NDArray[np.int64]) -> Mapping[str, torch.Tensor]:
            size = network.batch_size if network.fixed_batch else len(indices)
            outputs = network.dense(tensor_feeds(network.dataset, indices, network.device, fill_to=size))
            return real_samples(outputs, len(indices), size)

        return make_objective(
            self._objective_name,
            self.task.model,
            self.task.calibration.labels,
            seed=self.task.recipe.seed,
            reference=dense,
        )

    @cached_property
    def _sensitivity(self) -> Sensitivity:
        task, network = self.task, self._network("sorted")
        network.reset()
        return analyse(
            network.model,
            network.current_layers(),
            task.calibration,
            block=task.recipe.block_shape,
            model_sha256=task.model_sha256,
            cache=cache_folder() / GRADIENTS,
            objective=self._objective_name,
            seed=task.recipe.seed,
            batch_size=None if task.fixed_batch else network.batch_size,
            device=task.device,
            observe=self._energies.add if task.recover else None,
        )

    @cached_property
    def _two_four_token_weights(self) -> dict[str, NDArray[np.float64]]:
        network = self._network("interleaved")
        return token_weights(network, self._objective(network))

    @cached_property
    def _one_per_weight(self) -> list[LinearLayer]:
        groups = weight_groups(self._network("sorted").layers)
        return [replace(group[0], M=sum(layer.M for layer in group)) for group in groups]

    @cached_property
    def _sharing(self) -> dict[str, list[str]]:
        groups = weight_groups(self._network("sorted").layers)
        return {group[0].name: [layer.name for layer in group] for group in groups}

    def _how(self, keep: float) -> Literal["one-shot", "gradual"]:
        asked = self.task.recipe.search
        if asked != "auto":
            return "one-shot" if asked == "one-shot" else "gradual"
        if not self.task.recover:
            return "one-shot"
        return "gradual" if self.block_search.predicted_damage(keep) > GRADUAL_FROM else "one-shot"

    def _curve_to(self, name: str, gone: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the dense network's δ-curve that goes through what was removed: those blocks first, then the rest."""
        layer = self._sensitivity.layers[name]
        rank = np.empty(len(gone), np.int64)
        rank[layer.order] = np.arange(len(gone))
        return layer.curve(np.lexsort((rank, ~gone)))

    def _reasons(self, found: Found) -> dict[str, str]:
        reasons = {}
        for layer in self._one_per_weight:
            for name in self._sharing[layer.name]:
                reasons[name] = self.why_dense(layer) or found.allocation.reasons[layer.name]
        return reasons

    def _pruning(self, network: Network, fits: Mapping[str, LayerFit], asked: str, method: str) -> Pruning:
        """Return what every pruning has: the weights that changed and what reconstruction did."""
        pruning = Pruning(asked=asked, method=method, notes=list(self.notes))
        for layer in network.layers:
            if layer.name in network.not_writable or not network.is_changed(layer.name):
                continue
            theta = network.theta(layer.name).float().cpu().numpy()
            pruning.weights[layer.name] = np.ascontiguousarray(theta[: layer.K])
            if len(theta) > layer.K:
                pruning.biases[layer.name] = np.ascontiguousarray(theta[layer.K])
        pruning.constants = network.changed_constants()
        pruning.recoveries = {name: _recovery(fit) for name, fit in fits.items()}
        return pruning

    def _search_key(self) -> str:
        task, recipe = self.task, self.task.recipe
        return content_key(
            format=_CACHE_FORMAT,
            version=__version__,
            model=task.model_sha256,
            data=task.calibration.identity,
            bases=task.change_bases,
            recover=task.recover,
            objective=self._objective_name,
            seed=recipe.seed,
            block=recipe.block_shape,
            allocator=recipe.allocator,
            power_weight=recipe.power_weight,
            min_density=recipe.min_density,
            exclude=recipe.exclude,
            prefer_structure=recipe.prefer_structure,
            measure=task.measure.kind,
            target=task.measure.target.sha256,
            dtypes=dict(task.measure.dtypes),
            shapes={name: list(shape) for name, shape in task.shapes.items()},
            always=task.measure.always,
            dense_only=sorted(task.measure.dense_only),
            times=task.measure.times_key,
        )


def _recovery(fit: LayerFit) -> RecoveryDecision:
    before, after = float(f"{fit.error_before:.4g}"), float(f"{fit.error_after:.4g}")
    where = "the dense residual stream" if fit.fits == "residual stream" else "the dense layer's output"
    judges = "samples held out from the fit" if fit.held_out else "the samples fitted to, too few to hold any out"
    if fit.accepted:
        reason = f"refitted to {where}: squared error {before:.3g} → {after:.3g} of it, on {judges}"
    else:
        reason = f"refitting would raise the error from {before:.3g} to {after:.3g}, on {judges}"
    return RecoveryDecision(
        method="reconstruct" if fit.accepted else "none",
        fits=fit.fits if fit.accepted else None,
        ridge=fit.ridge if fit.accepted else None,
        error_before=before,
        error_after=after,
        reason=reason,
    )
