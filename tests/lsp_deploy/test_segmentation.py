"""A segmentation ViT, whose outputs are classes for every pixel: nothing takes it for a classifier of images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from exports import export_segmentation_vit
from graphs import assert_same_outputs, move_weights, operators, random_feeds, run

from lsp_deploy.linear_layers import linear_layers, replace_weight
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.remove_dead_structure import RemoveDeadStructurePass

BLOCK = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture(params=[("torchscript", 17), ("dynamo", 20)], ids=lambda param: param[0])
def path(request: pytest.FixtureRequest) -> Path:
    exporter, opset = request.param
    return export_segmentation_vit(exporter=exporter, opset=opset)


def test_canonical_form(path: Path) -> None:
    before = load_model(path)
    move_weights(before)
    after = canonicalize(before.clone(), max_opset=20)
    assert_same_outputs(before, after, batch=3)
    counts = operators(after)
    assert (counts["LayerNormalization"], counts["Gelu"], counts["Resize"]) == (5, 2, 1)


def test_linear_layers(path: Path) -> None:
    layers = linear_layers(load_model(path))
    assert Counter(layer.role for layer in layers if layer.block in (0, 1)) == dict.fromkeys(BLOCK, 2)
    assert layers[0].role == "patch"
    classes = layers[-1]
    assert (classes.role, classes.K, classes.N, classes.M) == ("head", 192, 6, 16)


def test_gradients_run_on_the_same_outputs_as_onnxruntime(path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from lsp_deploy.autodiff.module import OnnxModule

    model = canonicalize(load_model(path), max_opset=20)
    feeds = random_feeds(model)
    (expected,) = run(model, feeds)
    module = OnnxModule(model)
    module.requires_grad_(True)
    output = module({name: torch.from_numpy(array) for name, array in feeds.items()})["logits"]
    assert output.shape == expected.shape == (2, 6, 64, 64)
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-4 * np.abs(expected).max())
    torch.nn.functional.cross_entropy(output, output.argmax(1)).backward()
    weights = [module.weights[layer.weight_root] for layer in linear_layers(model)]
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


def test_dead_structure(path: Path) -> None:
    model = load_model(path)
    move_weights(model)
    canonicalize(model, max_opset=20)
    for layer in linear_layers(model):
        if layer.role == "proj":
            weight = layer.weight().copy()
            weight[: 64 if layer.block == 0 else None] = 0
            replace_weight(layer, weight)
    before = model.clone()
    removal = RemoveDeadStructurePass()
    removal(model)
    assert_same_outputs(before, model, batch=3)
    assert [layer.after for layer in removal.found.removed] == [(192, 384), (128, 192), (0, 0), (0, 0)]
