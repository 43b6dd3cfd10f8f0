"""Additivity over layers: exact where it must be, and measured where it is an assumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lsp_deploy.data import open_dataset
from lsp_deploy.errors import UserError
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model, resolve_shapes

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from graphs import graph  # noqa: E402

from lsp_deploy.sensitivity.additivity import measure_additivity  # noqa: E402
from lsp_deploy.sensitivity.analysis import analyse  # noqa: E402

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"


def prepared(model, data: str, samples: int):
    shapes = resolve_shapes(model, None, batch=1)
    dataset = open_dataset(data, shapes=shapes, dtypes={}, preprocess=None, samples=samples)
    return linear_layers(model, shapes), dataset


def test_parallel_layers_of_a_linear_model_are_additive_and_the_estimate_is_exact(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    nodes = "y = MatMul(x, W) z = MatMul(x, V)"
    weights = {"W": random.standard_normal((8, 6)), "V": random.standard_normal((8, 9))}
    model = graph(
        nodes,
        x="float[n, 8] x",
        y="float[n, 6] y, float[n, 9] z",
        weights={name: value.astype(np.float32) for name, value in weights.items()},
    )
    for node, name in zip(model.graph, ("first", "second"), strict=True):
        node.name = name
    layers, dataset = prepared(model, "random", 3000)
    sensitivity = analyse(model, layers, dataset, block=(4, 3), model_sha256="", cache=tmp_path, kappa=0.0)
    assert sensitivity.objective == "output"
    (whole,) = measure_additivity(model, layers, dataset, sensitivity, fractions=[1.0], batch_size=500)
    assert whole.together == pytest.approx(whole.single_layers, rel=1e-5)
    assert whole.distortion_together == pytest.approx(2 * whole.together, rel=1e-9)
    # δ is an estimate from one random projection a sample.
    assert whole.estimated == pytest.approx(whole.together, rel=0.15)


def test_on_a_real_model_small_damage_is_nearly_additive(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = load_model(ASSETS / "digits_vit.onnx")
    layers, dataset = prepared(model, str(ASSETS / "calibration.npz"), 60)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    sensitivity = analyse(model, layers, dataset, block=(8, 8), model_sha256="", cache=tmp_path, objective="top1")
    small, large = measure_additivity(model, layers, dataset, sensitivity, fractions=[0.02, 0.6], batch_size=60)
    assert 0.3 < small.distortion_together / small.distortion_single_layers < 3
    assert large.distortion_together > small.distortion_together > 0
    assert large.together > small.together
    for name, value in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), value)


def test_an_objective_that_is_drawn_is_refused(tmp_path: Path) -> None:
    model = load_model(ASSETS / "digits_vit.onnx")
    layers, dataset = prepared(model, "random", 2)
    sensitivity = analyse(model, layers, dataset, block=(8, 8), model_sha256="", cache=tmp_path, objective="pseudo")
    with pytest.raises(UserError, match="not for pseudo"):
        measure_additivity(model, layers, dataset, sensitivity, fractions=[0.1])
