"""The sensitivity analysis of a model: orders and δ-curves of all linear layers from one pass over the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lsp_deploy import console
from lsp_deploy.autodiff.module import OnnxModule
from lsp_deploy.cache import content_key, drop_old_entries
from lsp_deploy.errors import UserError
from lsp_deploy.model import input_shapes
from lsp_deploy.sensitivity.block_gradients import (
    Observer,
    block_count,
    block_gradients,
    collect_block_gradients,
    weight_groups,
)
from lsp_deploy.sensitivity.feeds import tensor_feeds
from lsp_deploy.sensitivity.gradient_files import GradientFiles
from lsp_deploy.sensitivity.layer_rows import Layout, find_layouts, samples_are_separate
from lsp_deploy.sensitivity.objectives import default_objective, make_objective
from lsp_deploy.sensitivity.processes import Team
from lsp_deploy.sensitivity.results import BlockGradients, LayerSensitivity, Sensitivity

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.data import Dataset
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["analyse", "default_kappa", "plan_batches"]

# Of the files in the cache: a change of what they hold changes the number, and nothing old is read.
_FORMAT = 1
_RIDGE_SHARE = 0.01
_MOST_SAMPLES = {"cpu": 8, "cuda": 64}  # a larger batch is no faster
_ACTIVATION_BYTES = {"cpu": 1.5e9, "cuda": 16e9}


def analyse(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    dataset: Dataset,
    *,
    block: tuple[int, int],
    model_sha256: str,
    cache: Path,
    objective: str | None = None,
    seed: int = 0,
    kappa: float | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    team: Team | None = None,
    observe: Observer | None = None,
) -> Sensitivity:
    """Analyse all layers in one pass over the data, forward and backward once a sample.

    Layers that share one weight get the same result: the gradients of its uses are added up, sample by sample.

    Args:
        model: canonical, computing in float32.
        layers: its linear layers.
        dataset: every sample is used.
        block: (block_k, block_n) on W [K, N], any positive sizes; ragged edges form smaller blocks.
        model_sha256: of the user's file; with the weights and the dataset's identity it names the results in the cache.
        cache: folder where A is kept, [samples, blocks] float32 a layer. A second analysis of the same reads it, and
            one that was interrupted goes on; κ is not part of it.
        objective: one of `OBJECTIVES`; `default_objective` if None.
        seed: of what `pseudo` and `output` draw.
        kappa: κ of the empirical Fisher; `default_kappa` if None.
        batch_size: samples a pass; from the activations' size if None. A graph of a fixed batch has its own.
        device: torch device.
        team: the processes among which the samples are shared. The first one gets the result; in the others `layers`
            is empty.
        observe: also shown the gradients at every layer's output, of the samples that are not in the cache.

    Raises:
        UserError: an operator that cannot be differentiated, an objective that the model or the data do not allow, a
            gradient that is not finite, or a cache that cannot be written to.
    """
    team = team or Team()
    name = objective or default_objective(model, dataset.labels)
    if objective is None and dataset.labels is not None and name != "loss" and team.leads:
        console.warn(f"labels are not used: the model has no class scores [batch, classes]; the objective is {name}")
    differentiated = make_objective(name, model, dataset.labels, seed=seed)
    drawn = seed if name in ("pseudo", "output") else None
    folder = cache / _key(model_sha256, dataset.identity, block, name, drawn, layers)
    if team.leads:
        drop_old_entries(cache, folder)
    blocks = [block_count(group[0], block) for group in weight_groups(layers)]
    whole = GradientFiles(folder / f"0-{len(dataset)}", len(dataset), blocks) if team.leads else None
    if not team.agree(whole is not None and whole.complete):
        module = OnnxModule(model)
        module.to(device)
        size, layouts = plan_batches(module, model, layers, dataset, batch_size, device)
        samples = team.share(len(dataset), size)
        files = collect_block_gradients(
            module,
            layers,
            dataset,
            differentiated,
            block=block,
            batch_size=size,
            folder=folder / f"{samples.start}-{samples.stop}",
            samples=samples,
            fixed_batch=_fixed_batch(model) is not None,
            layouts=layouts,
            device=device,
            show_progress=team.leads,
            observe=observe,
        )
        whole = _gather(team, files, folder, len(dataset), size, blocks)
    elif whole is not None:
        console.say(f"the gradients of these {len(dataset)} samples are in {folder}")
    gathered = {} if whole is None else block_gradients(whole, layers, block)
    kappa = kappa if kappa is not None else default_kappa(gathered)
    return Sensitivity(
        layers={
            layer.name: LayerSensitivity(layer.name, layer.K, layer.N, block, gathered[layer.name], kappa)
            for layer in layers
            if gathered
        },
        block=block,
        objective=name,
        samples=len(dataset),
        kappa=kappa,
        seed=seed,
    )


def default_kappa(gathered: Mapping[str, BlockGradients]) -> float:
    """Return κ: a hundredth of Σ_b mean_n A[n, b]² / Σ_b ‖W_b‖² over all layers, each weight counted once.

    The ridge κ‖ΔW‖² is then one percent of the blocks' own second-order terms, summed over the model: enough to order
    what the samples leave undecided, too little to decide anything else.
    """
    distinct = list({id(one): one for one in gathered.values()}.values())
    weights = sum(float(one.square_norms.sum()) for one in distinct)
    return _RIDGE_SHARE * sum(float(one.fisher.sum()) for one in distinct) / weights if weights else 0.0


def _key(
    model: str, data: str, block: tuple[int, int], objective: str, seed: int | None, layers: Sequence[LinearLayer]
) -> str:
    # The file's hash does not cover weights that lie outside it, or that were given another basis.
    weights = hashlib.sha256()
    for layer in layers:
        weights.update(np.ascontiguousarray(layer.weight()).data)
    names = [layer.name for layer in layers]
    return content_key(
        format=_FORMAT,
        model=model,
        data=data,
        block=block,
        objective=objective,
        seed=seed,
        layers=names,
        weights=weights.hexdigest(),
    )


def plan_batches(
    module: OnnxModule,
    model: ir.Model,
    layers: Sequence[LinearLayer],
    dataset: Dataset,
    asked: int | None,
    device: str,
) -> tuple[int, dict[str, Layout]]:
    """Return how many samples go into a batch of a pass over the data, and how each layer's rows hold them.

    A graph of a fixed batch has its own size. Where rows or outputs mix the samples of a batch it is 1, and the user is
    told.

    Args:
        module: the model in torch.
        model: the same.
        layers: its linear layers.
        dataset: of which two samples are tried.
        asked: samples a batch; as many as the activations' size allows if None.
        device: torch device.

    Raises:
        UserError: samples are mixed and the batch is fixed above 1.
    """
    fixed = _fixed_batch(model)
    if fixed == 1 or (fixed is None and (len(dataset) == 1 or asked == 1)):
        return 1, {}
    probe = np.arange(fixed or 2) % len(dataset)
    feeds = tensor_feeds(dataset, probe, device)
    layouts = find_layouts(module, layers, feeds)
    mixed = [f"the rows of {name} cannot be told apart by sample" for name in layouts if layouts[name] == "mixed"]
    if not samples_are_separate(module, feeds, fixed_batch=fixed is not None):
        mixed.append("the model's outputs compare the samples of a batch")
    if mixed and fixed is not None:
        raise UserError(
            f"{mixed[0]}, and it takes {fixed} of them at a time; export it with a dynamic batch or a batch of 1"
        )
    if mixed:
        console.warn(f"{mixed[0]}: samples are taken one at a time")
        return 1, {}
    kind = "cpu" if torch.device(device).type == "cpu" else "cuda"
    affordable = int(_ACTIVATION_BYTES[kind] * len(probe) / _activation_bytes(module, feeds))
    return fixed or asked or min(max(affordable, 1), _MOST_SAMPLES[kind]), layouts


@torch.no_grad()
def _activation_bytes(module: OnnxModule, feeds: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of all results in the graph: no less than what the backward pass holds on to."""
    total = 0

    def count(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += y.numel() * y.element_size()
        return y

    module.hooks_by_node = dict.fromkeys(module.node_names, count)
    module(feeds)
    module.hooks_by_node = {}
    return max(total, 1)


def _fixed_batch(model: ir.Model) -> int | None:
    shape = next(iter(input_shapes(model).values()), ())
    return shape[0] if shape and isinstance(shape[0], int) else None


def _gather(
    team: Team, own: GradientFiles, folder: Path, samples: int, batch_size: int, blocks: list[int]
) -> GradientFiles | None:
    """Bring the shares of all processes together in the files of the first one, in the order of the samples."""
    if team.size == 1:
        return own
    shares = [team.share(samples, batch_size, rank) for rank in range(team.size)]
    if len(shares[0]) == samples:
        return own if team.leads else None
    whole = GradientFiles(folder / f"0-{samples}", samples, blocks) if team.leads else None
    for tensor, size in enumerate(blocks):
        rows = max(1, (64 << 20) // (4 * size))
        for rank, share in enumerate(shares):
            for start in range(0, len(share), rows):
                count = min(rows, len(share) - start)
                if rank == team.rank:
                    part = own.contributions(tensor)[start : start + count]
                    sums = own.taylor[tensor] if start == 0 else np.zeros(size)
                    if whole is not None:
                        whole.append(tensor, part, sums)
                    else:
                        team.send(part)
                        team.send(sums)
                elif whole is not None:
                    received = team.receive((count, size), np.float32, rank)
                    whole.append(tensor, received, team.receive((size,), np.float64, rank))
    if whole is not None:
        whole.save(samples)
        whole.close()
    team.agree(True)  # all of it is safe by then
    own.remove()
    return whole
