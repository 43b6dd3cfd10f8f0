"""All matrix layers of real exports by one kernel: our operator, or ONNX Runtime's QGemm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exports import export_clip, export_family, export_huggingface_vit, export_timm
from pass_models import layer, plan, run

from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model, resolve_shapes
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.insert_block_sparse import InsertBlockSparsePass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.passes.qgemm_form import QgemmFormPass

EXPORTS = {
    "deit": lambda: export_family("deit_tiny_distilled_patch16_224"),
    "deit of fixed batch": lambda: export_family("deit_tiny_distilled_patch16_224", dynamic=False),
    "swin from dynamo": lambda: export_family("swin_tiny_patch4_window7_224", exporter="dynamo", opset=18),
    "pvt, whose q and kv read one tensor": lambda: export_timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
    "cait": lambda: export_family("cait_xxs24_224"),
    "levit": lambda: export_family("levit_128s"),
    "eva02": lambda: export_family("eva02_tiny_patch14_224"),
    "huggingface": export_huggingface_vit,
    "clip": export_clip,
}


@pytest.fixture(params=EXPORTS)
def model(request: pytest.FixtureRequest) -> ir.Model:
    return canonicalize(load_model(EXPORTS[request.param]()), max_opset=23, needed_opset=21)


def feeds_of(model):
    generator = np.random.default_rng(0)
    dtypes = {value.name: value.dtype for value in model.graph.inputs}
    return {
        name: generator.standard_normal(shape).astype(np.float32)
        if dtypes[name] == ir.DataType.FLOAT
        else np.ones(shape, dtypes[name].numpy())
        for name, shape in resolve_shapes(model, None, batch=2).items()
    }


def products(model):
    return [found for found in linear_layers(model) if found.node.op_type != "Conv"]


def test_every_layer_as_our_operator(model):
    feeds, layers = feeds_of(model), products(model)
    expected = run(model, **feeds)
    made = plan(*(layer(found.name, found.K, found.N) for found in layers))
    for each in made.layers:
        each.execution.kernel = "block_sparse"
    InsertBlockSparsePass(made)(model)
    assert sum(node.op_type == "BlockSparseLinear" for node in model.graph) == len(layers)
    LowerOperatorsPass("matmul")(model)
    for name, actual in run(model, **feeds).items():
        np.testing.assert_allclose(actual, expected[name], rtol=1e-4, atol=1e-5 * np.abs(expected[name]).max())


def test_every_layer_as_a_qgemm_in_a_session_with_default_options(model, tmp_path: Path):
    feeds, layers = feeds_of(model), products(model)
    names = list(dict.fromkeys(str(found.x.name) for found in layers))
    probe = model.clone()
    values = {value.name: value for node in probe.graph for value in node.outputs}
    probe.graph.outputs.extend(values[name] for name in names if name in values)
    seen = run(probe, **feeds)
    scales = {found.name: float(np.abs(seen[str(found.x.name)]).max() / 127) for found in layers}
    made = plan(
        *(layer(found.name, found.K, found.N, "int8", scales[found.name]) for found in layers),
        weight_scales={found.name: np.maximum(np.abs(found.weight()).max(axis=0) / 127, 1e-6) for found in layers},
    )
    for each in made.layers:
        each.execution.kernel = "qgemm"
    general = model.clone()
    InsertQdqPass(made)(general)
    expected = run(general, **feeds)
    QgemmFormPass(made)(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kernels = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
    assert kernels["QGemm"] == len(layers)
    for name, actual in zip(expected, session.run(None, feeds), strict=True):
        wanted = expected[name]
        assert np.square(actual - wanted).sum() < 1e-3 * np.square(wanted).sum()
