"""The passes one after the other on whole models: DeiT-Tiny with real weights, and small exports of other families."""

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_clip, export_family, export_huggingface_vit
from onnx_ir.passes.common import CheckerPass
from pass_models import layer, plan, run

from lsp_deploy.data import open_dataset
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model, resolve_shapes
from lsp_deploy.passes.apply_masks import ApplyMasksPass
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.split_qkv import SplitQkvPass
from lsp_deploy.passes.to_float32 import ToFloat32Pass
from lsp_deploy.passes.validate_target import TargetRules, refusals

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LSP_DEPLOY_DATA", ROOT.parent / "shared" / "data"))
DEIT = DATA / "models" / "deit_tiny_patch16_224.onnx"
IMAGES = DATA / "imagenet-sample" / "images.tar"
A100 = TargetRules("a100", 22, frozenset({"fp32", "fp16", "bf16", "int8"}), tensorrt=True, compute_capability="8.0")
QUANTIZED = ("qkv", "proj", "fc1", "fc2")


def maximum_plan(model, feeds):
    """Return a plan that makes all block linears int8, with the largest value seen as range, and prunes fc1 to 2:4."""
    layers = [found for found in linear_layers(model) if found.role in QUANTIZED]
    probe = model.clone()
    values = {value.name: value for node in probe.graph for value in node.outputs}
    probe.graph.outputs.extend(values[name] for name in dict.fromkeys(found.x.name for found in layers))
    seen = run(probe, optimize=True, **feeds)
    scales = {found.name: float(held(np.abs(seen[found.x.name]).max() / 127)) for found in layers}
    weights = {found.name: found.weight() for found in layers}
    return plan(
        *(layer(found.name, found.K, found.N, "int8", scales[found.name], found.role) for found in layers),
        masks={found.name: two_of_four(weights[found.name]) for found in layers if found.role == "fc1"},
        weight_scales={name: held(np.abs(weight).max(axis=0) / 127) for name, weight in weights.items()},
    )


def held(scale):
    """Return scales that float16 holds exactly."""
    return np.maximum(scale, 1e-5).astype(np.float16).astype(np.float32)


def two_of_four(weight):
    k, n = weight.shape
    groups = np.abs(weight[: k // 4 * 4]).reshape(-1, 4, n)
    kept = groups >= np.sort(groups, axis=1)[:, 2:3]
    return np.concatenate([kept.reshape(-1, n), np.ones((k % 4, n), bool)])


def carried_out(model, made, dtype):
    compressed = model.clone()
    ApplyMasksPass(made)(compressed)
    InsertQdqPass(made)(compressed)
    CastComputeTypePass(dtype)(compressed)
    SplitQkvPass()(compressed)
    CheckerPass(full_check=True)(compressed)
    return compressed


def cosine(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_deit_tiny_int8_linear_only():
    if not DEIT.exists() or not IMAGES.exists():
        pytest.skip(f"needs {DEIT} and {IMAGES}; name the data folder in LSP_DEPLOY_DATA")
    model = canonicalize(load_model(DEIT), max_opset=A100.max_opset, needed_opset=19)
    images = open_dataset(
        IMAGES, shapes={"pixel_values": (1, 3, 224, 224)}, dtypes={}, preprocess=None, labels=None, samples=8
    )
    feeds = images.feeds(range(8))
    made = maximum_plan(model, feeds).branch()
    made.masks.clear()
    assert len(made.layers) == 48
    compressed = carried_out(model, made, "fp16")
    assert refusals(compressed, A100) == []
    int8 = [value for value in compressed.graph.initializers.values() if value.name.rpartition("/weight_q")[1]]
    assert {value.dtype for value in int8} == {ir.DataType.INT8}
    assert sum(value.const_value.size for value in int8) == sum(found.K * found.N for found in made.layers)
    assert len(ir.to_proto(compressed).SerializeToString()) <= 0.28 * DEIT.stat().st_size
    expected = run(model, optimize=True, **feeds)["logits"]
    ToFloat32Pass()(compressed)
    logits = run(compressed, optimize=True, **feeds)["logits"]
    assert cosine(logits, expected) > 0.99


EXPORTS = {
    "deit": lambda: export_family("deit_tiny_distilled_patch16_224"),
    "swin from dynamo": lambda: export_family("swin_tiny_patch4_window7_224", exporter="dynamo", opset=18),
    "beit": lambda: export_family("beit_base_patch16_224"),
    "levit": lambda: export_family("levit_128s"),
    "eva02": lambda: export_family("eva02_tiny_patch14_224"),
    "convnext": lambda: export_family("convnext_atto"),
    "huggingface": export_huggingface_vit,
    "clip": export_clip,
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp16") for name in EXPORTS), ("beit", "bf16"), ("clip", "bf16")])
def test_every_step_on_other_families(name, dtype):
    model = canonicalize(load_model(EXPORTS[name]()), max_opset=A100.max_opset, needed_opset=19)
    inputs = {value.name: value.dtype for value in model.graph.inputs}
    generator = np.random.default_rng(0)
    feeds = {
        key: generator.standard_normal(shape).astype(np.float32)
        if inputs[key] == ir.DataType.FLOAT
        else np.ones(shape, inputs[key].numpy())
        for key, shape in resolve_shapes(model, None, batch=2).items()
    }
    made = maximum_plan(model, feeds)
    compressed = carried_out(model, made, dtype)
    assert refusals(compressed, A100) == []
    assert {value.name: value.dtype for value in compressed.graph.inputs} == inputs
    float32 = model.clone()
    ApplyMasksPass(made)(float32)
    InsertQdqPass(made)(float32)
    expected = run(float32, optimize=True, **feeds)
    ToFloat32Pass()(compressed)
    for output, value in run(compressed, optimize=True, **feeds).items():
        assert cosine(value, expected[output]) > 0.99, output
