"""The canonical form of real exports: the same outputs, LayerNorm and GELU as single nodes, direct weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from exports import FAMILIES, export_clip, export_family, export_huggingface_vit
from graphs import assert_same_outputs, move_weights, operators

from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize

# LayerNorms and GELUs of each family at its small size.
NORMS = {
    "deit_tiny_distilled_patch16_224": (5, 2),
    "vit_tiny_patch16_224": (5, 2),
    "swin_tiny_patch4_window7_224": (11, 4),
    "beit_base_patch16_224": (5, 2),
    "cait_xxs24_224": (9, 4),
    "levit_128s": (0, 0),
    "mobilevit_xxs": (21, 0),
    "eva02_tiny_patch14_224": (5, 0),
    "convnext_atto": (10, 5),
}

VIT, DEIT, SWIN = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"


def check(path: Path, *, norms: tuple[int, int], max_opset: int = 20, relative: float = 1e-5) -> ir.Model:
    """Check outputs, structure and that a second time changes nothing."""
    before = load_model(path)
    move_weights(before)
    after = canonicalize(before.clone(), max_opset=max_opset)
    assert_same_outputs(before, after, relative=relative, batch=3)
    counts = operators(after)
    assert (counts["LayerNormalization"], counts["Gelu"]) == norms
    assert not {"Identity", "Constant", "Erf", "Dropout", "Sqrt"} & set(counts)
    weights = [node.inputs[1] for node in after.graph if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert any(weight.is_initializer() for weight in weights)
    assert not any(computed_from_constants(weight) for weight in weights)
    assert after.opset_imports[""] <= max_opset
    content = ir.to_proto(after).SerializeToString(deterministic=True)
    again = canonicalize(after.clone(), max_opset=max_opset)
    assert ir.to_proto(again).SerializeToString(deterministic=True) == content
    return after


def computed_from_constants(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and all(operand is None or operand.const_value is not None for operand in node.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_torchscript(family: str) -> None:
    check(export_family(family), norms=NORMS[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_torchscript_at_opset_13(family: str) -> None:
    """LayerNorm is decomposed, attention is written out."""
    check(export_family(family, opset=13, fused_attention=False), norms=NORMS[family])


@pytest.mark.parametrize("opset", [16, 20])
def test_torchscript_at_opset(opset: int) -> None:
    after = check(export_family(VIT, opset=opset), norms=NORMS[VIT])
    assert after.opset_imports[""] == 20


@pytest.mark.parametrize("family", [VIT, SWIN])
def test_fixed_batch_leaves_no_shape_computations(family: str) -> None:
    path = export_family(family, opset=13, fused_attention=False, dynamic=False)
    before, after = load_model(path), canonicalize(load_model(path), max_opset=20)
    assert_same_outputs(before, after)
    assert not {"Shape", "ConstantOfShape", "Where", "Expand", "Unsqueeze"} & set(operators(after))


@pytest.mark.parametrize(("family", "shapes"), [(VIT, 1), (SWIN, 0), ("mobilevit_xxs", 0), ("levit_128s", 0)])
def test_dynamic_batch_leaves_the_class_token_alone_to_compute_a_shape(family: str, shapes: int) -> None:
    after = canonicalize(load_model(export_family(family, opset=13, fused_attention=False)), max_opset=20)
    assert operators(after)["Shape"] == shapes
    assert all(node.inputs[1].is_initializer() for node in after.graph if node.op_type == "Reshape")
    sizes = [list(value.shape) for node in after.graph for value in node.outputs]
    assert all(sum(not isinstance(size, int) for size in shape) <= 1 for shape in sizes)


@pytest.mark.parametrize(("family", "opset"), [(VIT, 20), (SWIN, 20), ("eva02_tiny_patch14_224", 20), (DEIT, 18)])
def test_dynamo(family: str, opset: int) -> None:
    check(export_family(family, exporter="dynamo", opset=opset), norms=NORMS[family])


def test_dynamo_of_a_newer_opset_is_lowered() -> None:
    after = check(export_family(VIT, exporter="dynamo", opset=21), norms=NORMS[VIT])
    assert after.opset_imports[""] == 20


@pytest.mark.parametrize("opset", [16, 17])
def test_half_precision(opset: int) -> None:
    after = check(export_family(DEIT, opset=opset, dtype="fp16"), norms=NORMS[DEIT], relative=1e-2)
    assert operators(after)["Cast"] == 0


def test_huggingface_vit() -> None:
    check(export_huggingface_vit(), norms=(5, 2))


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 18), ("dynamo", 18)])
def test_clip_keeps_quick_gelu(exporter: str, opset: int) -> None:
    before = load_model(export_clip(exporter=exporter, opset=opset))
    after = canonicalize(before.clone(), max_opset=20)
    assert_same_outputs(before, after)
    assert operators(after)["LayerNormalization"] == 11
    assert operators(after)["Sigmoid"] == 4
    assert after.opset_imports[""] == 18
