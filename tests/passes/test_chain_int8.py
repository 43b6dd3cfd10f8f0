"""Int8 between operators: where it is written, and that only roundings differ."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pass_models import graph, layer, node_of, plan, run

from lsp_deploy.passes.chain_int8 import ChainInt8Pass
from lsp_deploy.passes.insert_block_sparse import InsertBlockSparsePass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plugins.block_sparse.operator import from_node

RNG = np.random.default_rng(0)
K, N = 24, 40
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
WEIGHTS = {
    "w": RNG.standard_normal((K, N)).astype(np.float32),
    "v": RNG.standard_normal((N, K)).astype(np.float32),
    "u": RNG.standard_normal((N, K)).astype(np.float32),
}
MLP = "m = MatMul(x, w)  a = Gelu(m)  n = MatMul(a, v)  y = Add(n, x)"
TWO = "m = MatMul(x, w)  a = Gelu(m)  n = MatMul(a, v)  k = MatMul(a, u)  y = Sub(n, k)"


def inserted(nodes, outputs="float[batch, 5, 24] y", offset=2.0, change=lambda decided: None):
    """Return a model whose MatMuls are int8 operators; `change` changes their plan first."""
    named = {name: array for name, array in WEIGHTS.items() if f" {name})" in nodes}
    model = graph(f"g (float[batch, 5, 24] x) => ({outputs}) {{ {nodes} }}", opset=20, **named)
    made = plan()
    for node in model.graph:
        if node.op_type == "MatMul":
            weight = node.inputs[1].const_value.numpy()
            first = node.inputs[0].name == "x"
            each = layer(node.name, *weight.shape, "int8", 0.03 if first else 0.04)
            each.precision.activation_offset = 0.0 if first else offset
            each.execution.kernel = "block_sparse"
            made.layers.append(each)
            made.weight_scales[node.name] = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    change(made)
    InsertBlockSparsePass(made)(model)
    return model


def standard_outputs(model):
    copy = model.clone()
    LowerOperatorsPass("matmul")(copy)
    return run(copy, x=X)


@pytest.mark.parametrize("nodes", [MLP, TWO])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_the_writer_quantizes_for_its_readers(nodes, offset):
    model = inserted(nodes, offset=offset)
    before = standard_outputs(model)
    assert ChainInt8Pass()(model).modified
    writer = from_node(node_of(model, "m"))
    assert writer.out_type == ir.DataType.INT8
    assert (writer.out_scale, writer.out_offset) == (np.float32(0.04), offset)
    assert node_of(model, "m").outputs[0].dtype == ir.DataType.INT8
    assert from_node(node_of(model, "n")).x_scale == np.float32(0.04)
    after = standard_outputs(model)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-5, atol=1e-5)
    assert not ChainInt8Pass()(model).modified


def _as_float(decided):
    decided.layer("n").precision.dtype = "fp32"


def _engine(decided):
    decided.layer("n").execution.kernel = "engine"


def _another_scale(decided):
    decided.layer("n").precision.activation_scale = 0.05


def _another_offset(decided):
    decided.layer("n").precision.activation_offset = 1.0


def _float_writer(decided):
    decided.layer("m").precision.dtype = "fp32"


def _nothing(decided):
    pass


BESIDE = "m = MatMul(x, w)  a = Gelu(m)  n = MatMul(a, v)  y = Add(n, x)  z = Neg(a)"
RESIDUAL = "m = MatMul(x, w)  n = MatMul(m, v)  p = MatMul(x, w)  z = Add(p, m)  y = Add(n, x)"


@pytest.mark.parametrize(
    ("nodes", "change", "outputs"),
    [
        (MLP, _as_float, ""),
        (MLP, _engine, ""),
        (MLP, _float_writer, ""),
        (TWO, _another_scale, ""),
        (TWO, _another_offset, ""),
        (MLP, _nothing, ", float[batch, 5, 40] a"),
        (BESIDE, _nothing, ", float[batch, 5, 40] z"),
        (RESIDUAL, _nothing, ", float[batch, 5, 40] z"),
    ],
)
def test_others_go_on_writing_floats(nodes, change, outputs):
    model = inserted(nodes, outputs=f"float[batch, 5, 24] y{outputs}", change=change)
    assert not ChainInt8Pass()(model).modified
    assert from_node(node_of(model, "m")).out_type == ir.DataType.FLOAT
