"""Dead neurons, heads and layers leave real exports, and the outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from exports import export_clip, export_family, export_huggingface_vit
from graphs import assert_same_outputs, move_weights, operators

from lsp_deploy.linear_layers import LinearLayer, linear_layers, replace_weight
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.remove_dead_structure import DeadStructure, RemoveDeadStructurePass

VIT, SWIN, EVA = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"

FUSED: dict[str, Callable[[], Path]] = {
    "vit": lambda: export_family(VIT),
    "vit of opset 13": lambda: export_family(VIT, opset=13, fused_attention=False),
    "vit of a fixed batch": lambda: export_family(VIT, opset=13, fused_attention=False, dynamic=False),
    "vit by dynamo": lambda: export_family(VIT, exporter="dynamo", opset=20),
    "deit": lambda: export_family("deit_tiny_distilled_patch16_224"),
    "beit": lambda: export_family("beit_base_patch16_224"),
    "swin": lambda: export_family(SWIN),
    "swin by dynamo": lambda: export_family(SWIN, exporter="dynamo", opset=20),
    "eva": lambda: export_family(EVA),
}
SEPARATE: dict[str, Callable[[], Path]] = {
    "huggingface vit": export_huggingface_vit,
    "huggingface vit by dynamo": lambda: export_huggingface_vit(exporter="dynamo", opset=18),
    "clip": export_clip,
}


@cache
def canonical(path: Path, max_opset: int) -> ir.Model:
    model = load_model(path)
    move_weights(model)
    return canonicalize(model, max_opset=max_opset)


def prepared(path: Path, zero: Callable[[LinearLayer, Any], bool], max_opset: int = 20) -> ir.Model:
    """Return the canonical model with the zeros that `zero` writes into W [K, N], where it returns true."""
    model = canonical(path, max_opset).clone()
    for layer in linear_layers(model):
        weight = layer.weight().copy()
        if zero(layer, weight):
            replace_weight(layer, weight)
    return model


def removed(model: ir.Model) -> DeadStructure:
    """Remove; check outputs, the shapes that are left, and that a second time changes nothing."""
    before = model.clone()
    removal = RemoveDeadStructurePass()
    removal(model)
    assert_same_outputs(before, model, batch=3)
    left = {layer.name: (layer.K, layer.N) for layer in linear_layers(model)}
    for layer in removal.found.removed:
        assert left.get(layer.name, (0, 0)) == layer.after
    assert not RemoveDeadStructurePass()(model).modified
    assert set(operators(model)) <= set(operators(before))
    return removal.found


def dead_neurons(layer: LinearLayer, weight: Any) -> bool:
    """Kill 32 neurons before the activation and 16 behind it, in the first block."""
    if layer.block != 0 or layer.role not in ("fc1", "fc2"):
        return False
    if layer.role == "fc1":
        weight[:, 16:48] = 0
    else:
        weight[64:80] = 0
    return True


@pytest.mark.parametrize(
    ("name", "max_opset"),
    # Opset 17 writes GELU in elementary operators.
    [("vit", 17), ("swin", 17), *((name, 20) for name in (*FUSED, *SEPARATE) if name != "eva")],
)
def test_dead_neurons(name: str, max_opset: int) -> None:
    found = removed(prepared((FUSED | SEPARATE)[name](), dead_neurons, max_opset))
    fc1, fc2 = (layer for layer in found.removed if layer.after != (0, 0))
    assert (fc1.before[1] - fc1.after[1], fc2.before[0] - fc2.after[0]) == (48, 48)


def test_gated_neurons_need_both_columns_zero() -> None:
    found = removed(prepared(FUSED["eva"](), dead_neurons))
    assert [layer.after for layer in found.removed] == [(192, 1024 - 32), (512 - 16, 192)]


@pytest.mark.parametrize("name", FUSED)
def test_second_of_three_heads(name: str) -> None:
    """Nothing is in its values in the first block, and nothing reads it in the second."""

    def zero(layer: LinearLayer, weight: Any) -> bool:
        width = weight.shape[0] // 3
        if layer.block == 0 and layer.role == "qkv":
            weight[:, -2 * width : -width] = 0
        elif layer.block == 1 and layer.role == "proj":
            weight[width : 2 * width] = 0
        else:
            return False
        return True

    found = removed(prepared(FUSED[name](), zero))
    assert len(found.removed) == 4
    for qkv, proj in zip(found.removed[::2], found.removed[1::2], strict=True):
        assert qkv.after == (qkv.before[0], 2 * qkv.before[1] // 3)
        assert proj.after == (2 * proj.before[0] // 3, proj.before[1])


@pytest.mark.parametrize("name", SEPARATE)
def test_second_of_two_heads(name: str) -> None:
    def zero(layer: LinearLayer, weight: Any) -> bool:
        if layer.block != 1 or layer.role != "proj":
            return False
        weight[32:] = 0
        return True

    found = removed(prepared(SEPARATE[name](), zero))
    assert [layer.after for layer in found.removed] == [(64, 32)] * 3 + [(32, 64)]


@pytest.mark.parametrize("name", ["vit", "swin", "eva"])
def test_queries_and_keys_of_a_head(name: str) -> None:
    """Uniform attention is not dead."""

    def zero(layer: LinearLayer, weight: Any) -> bool:
        width = weight.shape[0] // 3
        if layer.role == "qkv" and layer.block == 0:
            weight[:, width : 2 * width] = weight[:, 4 * width : 5 * width] = 0
            return True
        return False

    found = removed(prepared(FUSED[name](), zero))
    assert not found.removed
    assert [(kept.zero_columns, kept.reason) for kept in found.kept] == [
        (64 if "swin" in name else 128, "no whole head is dead")
    ]


@pytest.mark.parametrize("name", [*FUSED, *SEPARATE])
@pytest.mark.parametrize("roles", [{0: "qkv", 1: "fc1"}, {0: "fc2", 1: "proj"}])
def test_whole_branches(name: str, roles: dict[int, str]) -> None:
    def zero(layer: LinearLayer, weight: Any) -> bool:
        if layer.block is None or layer.role != roles.get(layer.block):
            return False
        weight[:] = 0
        return True

    found = removed(prepared((FUSED | SEPARATE)[name](), zero))
    assert len(found.removed) == (4 if name in FUSED else 6)
    assert {layer.after for layer in found.removed} == {(0, 0)}


def test_levit_whose_normalizations_are_over_the_batch() -> None:
    def zero(layer: LinearLayer, weight: Any) -> bool:
        if layer.block == 0 and layer.role == "fc1":
            weight[:, :32] = 0
        elif layer.block == 1 and layer.role == "fc2":
            weight[:] = 0
        else:
            return False
        return True

    found = removed(prepared(export_family("levit_128s"), zero))
    assert [layer.after for layer in found.removed] == [(128, 224), (224, 128), (0, 0), (0, 0)]


def test_convnext_whose_layers_are_convolutions() -> None:
    found = removed(prepared(export_family("convnext_atto"), dead_neurons))
    assert [layer.after for layer in found.removed] == [(40, 112), (112, 40)]


def test_heads_that_are_mixed_stay() -> None:
    def zero(layer: LinearLayer, weight: Any) -> bool:
        if layer.block == 0 and layer.role == "proj":
            weight[:48] = 0
            return True
        return False

    found = removed(prepared(export_family("cait_xxs24_224"), zero))
    assert not found.removed
    assert [kept.zero_rows for kept in found.kept] == [48]
