"""Random lsp::BlockSparseLinear nodes for hypothesis, models of one such node, and what they have to compute."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear, to_node
from lsp_deploy.plugins.block_sparse.packing import pack
from lsp_deploy.plugins.block_sparse.reference import block_sparse_linear
from lsp_deploy.plugins.block_sparse.weights import values_in_layout

BSL16_SHAPES = [(16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 32), (64, 64)]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True)
class Case:
    """One operator with all that it reads."""

    operator: BlockSparseLinear
    weight: np.ndarray
    """[K, N], in the type of the values"""
    values: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    x: np.ndarray
    residual: np.ndarray | None

    def expected(self):
        return block_sparse_linear(self.operator, self.x, self.values, self.bias, self.scale, self.residual)

    def in_layout(self, layout):
        values = values_in_layout(self.operator, self.values, layout)
        return replace(self, operator=replace(self.operator, layout=layout), values=values)

    def model(self, *, opset=20, dynamic=True):
        """Return a model whose only node is this one, called `layer`."""
        shape = [f"d{axis}" if dynamic else size for axis, size in enumerate(self.x.shape[:-1])]
        x = _value("x", ir.DataType.from_numpy(self.x.dtype), [*shape, self.operator.K])
        inputs, residual = [x], None
        if self.residual is not None:
            residual = _value("residual", ir.DataType.from_numpy(self.residual.dtype), [*shape, self.operator.N])
            inputs.append(residual)
        names = ("values", "bias", "scale")
        constants = [_constant(name, getattr(self, name)) for name in names]
        node = to_node(self.operator, x, *constants, residual, name="layer")
        node.outputs[0].name = "y"
        opsets = {"": opset, "lsp": 1}
        graph = ir.Graph(
            inputs, node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one_layer"
        )
        return ir.Model(graph, ir_version=9)

    def feeds(self):
        feeds = {"x": self.x}
        return feeds if self.residual is None else {**feeds, "residual": self.residual}


def case(
    dtype="float32",
    *,
    K=40,
    N=24,
    block=(16, 16),
    zeros=0.5,
    survives=None,
    activation="none",
    outer=(2, 3),
    bias=True,
    residual=False,
    x_type="float32",
    x_offset=0.0,
    out_type="float32",
    out_offset=0.0,
    seed=0,
):
    """Return a random operator; of its blocks those in `survives` are not zero, or all but a fraction `zeros`.

    Scales are powers of two, so that quantizing by dividing and by multiplying give the same.
    """
    random = np.random.default_rng(seed)
    grid = (-(-K // block[0]), -(-N // block[1]))
    survives = random.random(grid) >= zeros if survives is None else survives
    mask = survives.repeat(block[0], axis=0).repeat(block[1], axis=1)[:K, :N]
    int8 = dtype == "int8"
    numbers = random.integers(-127, 128, (K, N)) if int8 else random.standard_normal((K, N)) / np.sqrt(K)
    weight = np.where(mask, numbers, 0).astype(DTYPES[dtype])
    blocks = pack(weight, mask, block)
    x_scale = 2.0**-5 if int8 else 0.0
    quantized = out_type == "int8"
    operator = BlockSparseLinear(
        K=K,
        N=N,
        block_k=block[0],
        block_n=block[1],
        col_ptr=blocks.col_ptr,
        k_idx=blocks.k_idx,
        activation=activation,
        x_scale=x_scale,
        x_offset=x_offset if int8 else 0.0,
        out_type=ir.DataType.from_numpy(np.dtype(DTYPES[out_type])),
        out_scale=2.0**-4 if quantized else 0.0,
        out_offset=out_offset if quantized else 0.0,
    )
    x = random.standard_normal((*outer, K))
    return Case(
        operator=operator,
        weight=weight,
        values=blocks.values,
        bias=(random.standard_normal(N) * bias).astype(np.float32),
        scale=(x_scale * 2.0 ** random.integers(-9, -6, N)).astype(np.float32) if int8 else np.ones(N, np.float32),
        x=random.integers(-128, 128, x.shape).astype(np.int8) if x_type == "int8" else x.astype(DTYPES[x_type]),
        residual=random.standard_normal((*outer, N)).astype(DTYPES["float32" if quantized else out_type])
        if residual
        else None,
    )


BLOCKS = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def cpu_cases(draw, dtypes=("float32", "bfloat16", "int8"), blocks=BLOCKS):
    """Operators in the form of CPUs: x and y are float32, or int8 where the layer is."""
    dtype = draw(st.sampled_from(dtypes))
    types = st.sampled_from(["float32", "int8"] if dtype == "int8" else ["float32"])
    return case(
        dtype,
        K=draw(st.integers(1, 90)),
        N=draw(st.integers(1, 90)),
        block=draw(blocks),
        zeros=draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])),
        activation=draw(st.sampled_from(["none", "gelu", "gelu_tanh", "relu"])),
        outer=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        x_type=draw(types),
        x_offset=draw(st.sampled_from([0.0, 0.75])),
        out_type=draw(st.sampled_from(["float32", "int8"])),
        out_offset=draw(st.sampled_from([0.0, -0.5])),
        seed=draw(st.integers(0, 999)),
    )


def _value(name, dtype, shape):
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _constant(name, array):
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
