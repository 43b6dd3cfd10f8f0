"""The LinearLayer view on real exports: nothing is missed, nothing is mistaken."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from exports import FAMILIES, create_timm, export_clip, export_family, export_huggingface_vit, export_timm

from lsp_deploy.linear_layers import LinearLayer, attention_flops, linear_layers, replace_weight
from lsp_deploy.model import load_model, model_bytes

DATA = Path(os.environ.get("LSP_DEPLOY_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
DEIT = DATA / "models" / "deit_tiny_patch16_224.onnx"

# By family: qkv, proj, fc1, fc2, patch, head, other; and the number of blocks.
ROLES = {
    "deit_tiny_distilled_patch16_224": ((2, 2, 2, 2, 1, 2, 0), 2),
    "vit_tiny_patch16_224": ((2, 2, 2, 2, 1, 1, 0), 2),
    # Patch merging is the other one.
    "swin_tiny_patch4_window7_224": ((4, 4, 4, 4, 1, 1, 1), 4),
    "beit_base_patch16_224": ((2, 2, 2, 2, 1, 1, 0), 2),
    # Two blocks on patches, whose attention scores are mixed between heads, and two on the class token alone.
    "cait_xxs24_224": ((2 + 2 * 3, 4, 4, 4, 1, 1, 4), 4),
    # A convolutional stem; the attention that shrinks the image has two layers for queries, keys and values.
    "levit_128s": ((3 + 2 * 2, 5, 5, 5, 0, 2, 0), 5),
    # Pointwise convolutions between the transformers.
    "mobilevit_xxs": ((9, 9, 9, 9, 0, 1, 21), 9),
    # SwiGLU from one layer.
    "eva02_tiny_patch14_224": ((2, 2, 2, 2, 1, 1, 0), 2),
    # No attention; three layers that shrink the image.
    "convnext_atto": ((0, 0, 5, 5, 1, 1, 3), 5),
}


def check_roles(layers: list[LinearLayer], expected: tuple[int, ...], blocks: int) -> None:
    counts = Counter(layer.role for layer in layers)
    assert tuple(counts[role] for role in ("qkv", "proj", "fc1", "fc2", "patch", "head", "other")) == expected
    inside = [layer for layer in layers if layer.role in ("qkv", "proj", "fc1", "fc2")]
    assert {layer.block for layer in inside} == set(range(blocks))
    assert all(layer.block is None for layer in layers if layer not in inside)
    assert [layer.block for layer in inside] == sorted(layer.block or 0 for layer in inside)


def linear_modules(module: Any) -> list[Any]:
    """Return the Linear modules and the Convs that are linear layers over patches."""
    from torch import nn

    def is_patchwise(part: Any) -> bool:
        return isinstance(part, nn.Conv2d) and part.kernel_size == part.stride and part.groups == 1

    return [part for part in module.modules() if isinstance(part, nn.Linear) or is_patchwise(part)]


def check_weights(layers: list[LinearLayer], module: Any, rtol: float = 1e-6) -> None:
    """Every layer holds the weight of one module, and every module is found."""
    weights = [part.weight.detach().float().numpy() for part in linear_modules(module)]
    matrices = [weight.reshape(weight.shape[0], -1).T for weight in weights]
    assert len(layers) == len(matrices)
    for layer in layers:
        weight = layer.weight()
        found = [
            index
            for index, matrix in enumerate(matrices)
            if matrix.shape == weight.shape and np.allclose(weight, matrix, rtol=rtol, atol=1e-6)
        ]
        assert found, layer.name
        del matrices[found[0]]


def run(content: bytes, **feeds: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    layers = linear_layers(load_model(export_family(family)))
    check_roles(layers, *ROLES[family])
    module = create_timm(family, **FAMILIES[family])
    if family == "mobilevit_xxs":
        # The exporter folds batch normalization into the convolutions' weights.
        assert len(layers) == len(linear_modules(module))
    else:
        check_weights(layers, module)


@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_families_from_dynamo(family: str) -> None:
    layers = linear_layers(load_model(export_family(family, exporter="dynamo", opset=20)))
    check_roles(layers, *ROLES[family])
    check_weights(layers, create_timm(family, **FAMILIES[family]))


@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_decomposed_layer_norm_of_opset_13(family: str) -> None:
    layers = linear_layers(load_model(export_family(family, opset=13, fused_attention=False)))
    check_roles(layers, *ROLES[family])
    assert all(layer.residual is not None for layer in layers if layer.role in ("proj", "fc2"))


def test_half_precision() -> None:
    name = "vit_tiny_patch16_224"
    layers = linear_layers(load_model(export_family(name, dtype="fp16")))
    check_roles(layers, *ROLES[name])
    check_weights(layers, create_timm(name, **FAMILIES[name]).half(), rtol=1e-3)


def test_fixed_batch_and_fixed_shapes() -> None:
    name = "swin_tiny_patch4_window7_224"
    layers = linear_layers(load_model(export_family(name, dynamic=False)))
    check_roles(layers, *ROLES[name])


def test_surroundings_in_a_vision_transformer() -> None:
    layers = linear_layers(load_model(export_family("vit_tiny_patch16_224")), {"pixel_values": (3, 3, 64, 64)})
    patch, *inside, head = layers
    assert [layer.role for layer in inside] == ["qkv", "proj", "fc1", "fc2"] * 2
    assert [layer.block for layer in inside] == [0] * 4 + [1] * 4
    assert (patch.M, patch.K, patch.N) == (3 * 16, 768, 192)
    assert (head.M, head.K, head.N) == (3, 192, 10)
    assert {layer.M for layer in inside} == {3 * 17}
    assert all(layer.bias is not None for layer in layers)
    assert all((layer.activation_kind == "gelu") == (layer.role == "fc1") for layer in layers)
    assert all((layer.residual is not None) == (layer.role in ("proj", "fc2")) for layer in layers)
    assert len({layer.residual for layer in layers if layer.residual}) == 4


def test_surroundings_in_shifted_windows() -> None:
    layers = linear_layers(load_model(export_family("swin_tiny_patch4_window7_224")))
    assert all((layer.residual is not None) == (layer.role in ("proj", "fc2")) for layer in layers)
    # 28 × 28 patches in windows of 7 × 7, then 14 × 14 merged ones.
    assert [layer.M for layer in layers if layer.role == "qkv"] == [784, 784, 196, 196]


def test_attention_flops_of_a_vision_transformer() -> None:
    model = load_model(export_family("vit_tiny_patch16_224"))
    products = 2 * 2  # two blocks, two products each: all heads together 2·T·T·D FLOPs
    assert attention_flops(model, {"pixel_values": (3, 3, 64, 64)}) == 3 * products * 2 * 17 * 17 * 192


def test_without_a_head_the_last_layer_is_fc2() -> None:
    options = FAMILIES["vit_tiny_patch16_224"] | {"num_classes": 0}
    layers = linear_layers(load_model(export_timm("vit_tiny_patch16_224", **options)))
    check_roles(layers, (2, 2, 2, 2, 1, 0, 0), 2)


def test_hugging_face() -> None:
    layers = linear_layers(load_model(export_huggingface_vit()))
    check_roles(layers, (6, 2, 2, 2, 1, 1, 0), 2)
    assert all((layer.residual is not None) == (layer.role in ("proj", "fc2")) for layer in layers)
    assert all((layer.activation_kind == "gelu") == (layer.role == "fc1") for layer in layers)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_clip(exporter: str) -> None:
    model = load_model(export_clip(exporter=exporter, opset=18))
    layers = linear_layers(model, {"pixel_values": (2, 3, 64, 64), "input_ids": (2, 16)})
    # The similarity of the towers is no attention: both projections are heads.
    check_roles(layers, (12, 4, 4, 4, 1, 2, 0), 4)
    assert all((layer.residual is not None) == (layer.role in ("proj", "fc2")) for layer in layers)
    assert {layer.activation_kind for layer in layers if layer.role == "fc1"} == {"quick_gelu"}
    assert [layer.M for layer in layers if layer.role == "fc1"] == [34, 34, 32, 32]


@pytest.mark.parametrize("family", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_replacing_all_weights(family: str) -> None:
    model = load_model(export_family(family))
    size = FAMILIES[family]["image_size"]
    x = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)
    before = run(model_bytes(model), pixel_values=x)
    layers = linear_layers(model)
    original = [layer.weight() for layer in layers]
    for layer in layers:
        replace_weight(layer, layer.weight() * 0.5)
    np.testing.assert_array_equal(layers[0].weight(), original[0] * 0.5)
    assert not np.allclose(run(model_bytes(model), pixel_values=x), before, rtol=1e-2)
    for layer, weight in zip(layers, original, strict=True):
        replace_weight(layer, weight)
    np.testing.assert_allclose(run(model_bytes(model), pixel_values=x), before, rtol=1e-4, atol=1e-5)
    size_before = len(model_bytes(load_model(export_family(family))))
    assert abs(len(model_bytes(model)) - size_before) < 0.01 * size_before


@pytest.mark.skipif(not DEIT.exists(), reason=f"needs {DEIT}; name the data folder in LSP_DEPLOY_DATA")
def test_trained_deit_tiny() -> None:
    model = load_model(DEIT)
    layers = linear_layers(model, {"pixel_values": (8, 3, 224, 224)})
    check_roles(layers, (12, 12, 12, 12, 1, 1, 0), 12)
    assert sum(layer.role not in ("patch", "head") for layer in layers) == 48
    assert {layer.M for layer in layers} == {8 * 197, 8 * 196, 8}
    assert all(layer.bias is not None for layer in layers)
    assert all((layer.activation_kind == "gelu") == (layer.role == "fc1") for layer in layers)
    assert all((layer.residual is not None) == (layer.role in ("proj", "fc2")) for layer in layers)
    assert sum(layer.flops for layer in layers) == 8 * 2_149_702_656
    assert attention_flops(model, {"pixel_values": (8, 3, 224, 224)}) == 8 * 12 * 2 * 2 * 197 * 197 * 192
