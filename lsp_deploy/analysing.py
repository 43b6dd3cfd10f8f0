"""The verb `sensitivity`: orders and δ-curves of all linear layers of a model, written to a folder."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsp_deploy import __version__
from lsp_deploy.cache import GRADIENTS, cache_folder
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of, write_bytes, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.sensitivity.results import Sensitivity

__all__ = ["SensitivityRequest", "analyse_model", "sensitivity_table"]

CURVES, DESCRIPTION = "sensitivity.npz", "sensitivity.json"
_SHOWN_PERCENT = (10, 25, 50, 100)
_SMOOTHING = "none: delta is stored raw; LSP's moving average (section 4.1) is applied where slopes are taken"


@dataclass(frozen=True)
class SensitivityRequest:
    """What was asked for; the fields are the flags."""

    block: str
    calibration_data: str
    labels: str | None = None
    label_column: str | None = None
    objective: str | None = None
    preprocess: str | None = None
    samples: int | None = None
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] | None = None
    kappa: float | None = None
    batch: int | None = None
    device: str = "cpu"
    cache: Path | None = None
    jobs: int | None = None


def analyse_model(path: Path, request: SensitivityRequest, output: Path | None) -> dict[str, Any] | None:
    """Analyse the model at `path` and write sensitivity.npz and sensitivity.json.

    Under torchrun the samples are shared among its processes; the first one writes.

    Args:
        path: ONNX file.
        request: what was asked for.
        output: folder; `<model stem>-sensitivity` if None.

    Returns:
        The content of sensitivity.json; None in the other processes of torchrun.

    Raises:
        UserError: PyTorch is not installed, a model, data or flags that cannot be worked with, or a folder that cannot
            be written to.
    """
    if find_spec("torch") is None:
        raise UserError("sensitivity needs PyTorch: pip install 'lsp-deploy[torch]'")
    block = _block(request.block)
    if request.kappa is not None and not (np.isfinite(request.kappa) and request.kappa >= 0):
        raise UserError(f"--kappa must be a number of 0 or more; got {request.kappa:g}")
    folder = _folder(output or Path(f"{path.stem}-sensitivity"))

    # Threads that spin while they wait make a busy machine ten times slower; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lsp_deploy.sensitivity.processes import join_processes

    with join_processes() as team:
        _set_up_torch(request, team.local_size)
        return _analyse(path, request, block, folder, team)


def sensitivity_table(result: Mapping[str, Any]) -> Table:
    """Return a table of the layers, one row each, from the content of sensitivity.json."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lsp_deploy.reporting.pruning_words import objective_unit

    title = (
        f"δ of {result['objective']} over {result['samples']} samples, in {objective_unit(result['objective'])}, when "
        "the least important blocks go (estimated, to second order)"
    )
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, title_justify="left")
    table.add_column("layer", overflow="fold", min_width=20)
    for column in ("K × N", "blocks", *(f"{percent} %" for percent in _SHOWN_PERCENT)):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layer in result["layers"].items():
        shown = [f"{layer['delta_at_percent'][str(percent)]:.3g}" for percent in _SHOWN_PERCENT]
        table.add_row(name, f"{layer['K']} × {layer['N']}", str(layer["blocks"]), *shown)
    return table


def _analyse(
    path: Path, request: SensitivityRequest, block: tuple[int, int], folder: Path, team: Any
) -> dict[str, Any] | None:
    from lsp_deploy.linear_layers import linear_layers
    from lsp_deploy.model import MAX_OPSET, load_model, resolve_shapes
    from lsp_deploy.passes.canonicalize import canonicalize
    from lsp_deploy.passes.to_float32 import ToFloat32Pass
    from lsp_deploy.plugins.operators import refuse_operators
    from lsp_deploy.sensitivity.analysis import analyse
    from lsp_deploy.steps.calibration import open_named, warn_assumed_preprocess

    original = load_model(path)
    refuse_operators(original, path)
    shapes = resolve_shapes(original, request.shapes, batch=1)
    dataset, preprocess_from = open_named(
        original,
        shapes,
        request.calibration_data,
        preprocess=request.preprocess,
        labels=request.labels,
        label_column=request.label_column,
        samples=request.samples,
        seed=request.seed,
    )
    if team.leads:
        warn_assumed_preprocess(dataset, preprocess_from)
    canonical = canonicalize(original.clone(), max_opset=MAX_OPSET)
    ToFloat32Pass()(canonical)
    layers = linear_layers(canonical, shapes)
    if not layers:
        raise UserError(f"{path}: no MatMul, Gemm or patch-embedding Conv with a constant weight was found")
    sha256 = sha256_of(path)
    result = analyse(
        canonical,
        layers,
        dataset,
        block=block,
        model_sha256=sha256,
        cache=request.cache or cache_folder() / GRADIENTS,
        objective=request.objective,
        seed=request.seed,
        kappa=request.kappa,
        batch_size=request.batch,
        device=f"cuda:{team.local_rank}" if request.device == "cuda" else request.device,
        team=team,
    )
    if not team.leads:
        return None
    return _write(folder, path, sha256, result, layers, dataset.name, dataset.identity)


def _write(
    folder: Path,
    path: Path,
    sha256: str,
    result: Sensitivity,
    layers: Sequence[LinearLayer],
    data: str,
    identity: str,
) -> dict[str, Any]:
    arrays: dict[str, Any] = {f"{name}.order": layer.order for name, layer in result.layers.items()}
    arrays |= {f"{name}.delta": layer.delta for name, layer in result.layers.items()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    description = {
        "format": 1,
        "model": path.name,
        "model_sha256": sha256,
        "objective": result.objective,
        "samples": result.samples,
        "block": f"{result.block[0]}x{result.block[1]}",
        "kappa": result.kappa,
        "smoothing": _SMOOTHING,
        "seed": result.seed,
        "data": data,
        "data_identity": identity,
        "delta": "estimated change of the objective (second-order Taylor, Eq. 11) after the first j blocks of order "
        "are removed, j = 0 .. blocks; the objective is the mean over samples of one scalar a sample",
        "order": "row-major block indices over [ceil(K/block_k), ceil(N/block_n)], least important first by the mean "
        "over samples and entries of |W * dW|",
        "tool_version": __version__,
        "layers": {
            layer.name: {
                "role": layer.role,
                "K": layer.K,
                "N": layer.N,
                "blocks": len(result.layers[layer.name].order),
                "weight": layer.weight_root,
                "delta_at_percent": _at_percent(result.layers[layer.name].delta),
            }
            for layer in layers
        },
    }
    # The curves go first: where the description is new, they are.
    write_bytes(folder / CURVES, content.getvalue())
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return description


def _at_percent(delta: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    blocks = len(delta) - 1
    return {str(percent): float(delta[round(blocks * percent / 100)]) for percent in _SHOWN_PERCENT}


def _block(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UserError(f"--block is block_k x block_n, two whole numbers of 1 or more, like 16x16; got {text}")
    return int(found[1]), int(found[2])


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {path}: {error.strerror}; choose another -o") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the output folder {path}: permission denied; choose another -o")
    return path


def _set_up_torch(request: SensitivityRequest, processes: int) -> None:
    import torch

    if request.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    torch.backends.cudnn.allow_tf32 = False  # a patch embedding in 10 bits is not the model that is analysed
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(request.jobs or max(1, cores // processes))
