"""What the embedded model for digits computes on its own calibration images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lsp_deploy.data import open_dataset
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.sensitivity.activations import ActivationStatistics, collect_activations
from lsp_deploy.steps.preparation import PreparedModel

ASSETS = Path(__file__).parents[1] / "lsp_deploy" / "assets"


def digits_statistics(prepared: PreparedModel) -> Mapping[str, ActivationStatistics]:
    shapes = prepared.shapes.opt
    data = open_dataset(str(ASSETS / "calibration.npz"), shapes=shapes, dtypes={}, preprocess=None, samples=16)
    inputs = sorted({str(layer.x.name) for layer in prepared.layers})
    with OnnxRuntimeEngine.from_model(prepared.canonical, threads=1, extra_outputs=inputs) as engine:
        return collect_activations(engine, prepared.layers, data, batch_size=8)
