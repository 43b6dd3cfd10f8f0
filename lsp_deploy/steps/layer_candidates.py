"""One linear layer as a model of its own, in every form that it could be run in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.plan import ExecutionDecision, LayerPlan, Plan, PrecisionDecision, SparsityDecision

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.hardware.cpu_timings import LinearShape
    from lsp_deploy.hardware.target import ElementType
    from lsp_deploy.sensitivity.quantization import ComputeType

__all__ = ["candidate_model", "gpu_candidate_model", "layer_feeds"]

_NAME = "layer"
_OPSET = 20  # the first with Gelu
_X_SCALE = 4 / 127  # of normally distributed inputs


def candidate_model(shape: LinearShape, candidate: str, density: float) -> ir.Model:
    """Return act(x · W + bias) + residual in the form of a candidate, with random weights.

    Args:
        shape: of the layer.
        candidate: one of `CANDIDATES`.
        density: fraction of the blocks of W that survive, at random places; those that cannot skip keep them all.

    Raises:
        ValueError: there is no such candidate.
    """
    from lsp_deploy.hardware.cpu_timings import type_of

    dtype = type_of(candidate)
    kernel = candidate.partition(" ")[0]
    if kernel in ("matmul", "qgemm"):
        model = _stock_model(shape)
        if kernel == "qgemm":
            _to_qgemm(model, shape)
        return model
    model = _operator_model(shape, dtype, density)
    if kernel == "gather":
        from lsp_deploy.passes.lower_operators import LowerOperatorsPass

        LowerOperatorsPass("gather")(model)
    return model


def gpu_candidate_model(shape: LinearShape, candidate: str, density: float, compute_type: ComputeType) -> ir.Model:
    """Return the same for a GPU, as `compress` writes it; inputs and outputs are of the compute type.

    The input of an int8 layer is int8: in a network, what comes before quantizes it as it writes.

    Args:
        shape: of the layer.
        candidate: one of `GPU_CANDIDATES`, or "two_four <type>".
        density: fraction of the blocks of W that survive, at random places; for block_sparse.
        compute_type: of what is not quantized.

    Raises:
        UserError: a block that the operator has no kernels for.
    """
    import onnx_ir as ir

    from lsp_deploy.allocation.masks import magnitude_score, two_four_mask
    from lsp_deploy.sensitivity.quantization import weight_scale
    from lsp_deploy.steps.apply import apply_plan

    kernel, _, name = candidate.partition(" ")
    dtype: ElementType = "int8" if name == "int8" else compute_type
    plan, weight = _plan(shape, dtype, compute_type), _weight(shape, 1.0)
    plan.io_types = "target"
    if kernel == "block_sparse":
        plan.block_shape = shape.block
        plan.layers[0].sparsity.pattern, plan.layers[0].execution.kernel = "block", "block_sparse"
        plan.masks[_NAME] = _block_mask(shape, density)
    elif kernel == "two_four":
        plan.layers[0].sparsity.pattern = "2:4"
        plan.masks[_NAME] = two_four_mask(magnitude_score(weight))
    if dtype == "int8":
        masked = weight * plan.masks[_NAME] if plan.masks else weight
        plan.weight_scales[_NAME] = weight_scale(masked, compute_type)
    stock = _stock_model(shape)
    floats = {str(value.name): ir.DataType.FLOAT for value in (*stock.graph.inputs, *stock.graph.outputs)}
    shapes = {name: feed.shape for name, feed in layer_feeds(shape).items()}
    model = apply_plan(stock, plan, floats, shapes, kind="gpu").model
    if dtype == "int8":
        _start_quantized(model)
    return model


def layer_feeds(shape: LinearShape) -> dict[str, NDArray[np.float32]]:
    """Return random inputs of `candidate_model`."""
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((1, shape.M, shape.K), np.float32)}
    if shape.residual:
        feeds["residual"] = random.standard_normal((1, shape.M, shape.N), np.float32)
    return feeds


def _weight(shape: LinearShape, density: float) -> NDArray[np.float32]:
    """Return a random W [K, N] of which the fraction `density` of the blocks is not zero, at least one."""
    weight = np.random.default_rng(0).standard_normal((shape.K, shape.N), np.float32) / np.float32(shape.K**0.5)
    return np.asarray(weight * _block_mask(shape, density), np.float32)


def _block_mask(shape: LinearShape, density: float) -> NDArray[np.bool_]:
    """Return the mask [K, N] of that weight."""
    block_k, block_n = shape.block
    rows, columns = -(-shape.K // block_k), -(-shape.N // block_n)
    survives = np.zeros(rows * columns, bool)
    order = np.random.default_rng(0).permutation(rows * columns)
    survives[order[: max(1, round(density * rows * columns))]] = True
    mask = np.repeat(np.repeat(survives.reshape(rows, columns), block_k, axis=0), block_n, axis=1)
    return np.asarray(mask[: shape.K, : shape.N])


def _stock_model(shape: LinearShape) -> ir.Model:
    import onnx_ir as ir

    graph, x, residual = _graph(shape)
    weight, bias = _constant(graph, "weight", _weight(shape, 1.0)), _constant(graph, "bias", _bias(shape))
    nodes = [ir.Node("", "MatMul", [x, weight], name=_NAME)]
    nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], bias], name=f"{_NAME}/bias"))
    if shape.activation != "none":
        approximate = [ir.AttrString("approximate", "tanh")] if shape.activation == "gelu_tanh" else []
        op_type = "Relu" if shape.activation == "relu" else "Gelu"
        nodes.append(ir.Node("", op_type, [nodes[-1].outputs[0]], approximate, name=f"{_NAME}/activation"))
    if residual is not None:
        nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], residual], name=f"{_NAME}/residual"))
    for node in nodes:
        node.outputs[0].name = str(node.name)
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([1, shape.M, shape.N]), ir.DataType.FLOAT
    return _model(graph, nodes)


def _operator_model(shape: LinearShape, dtype: str, density: float) -> ir.Model:
    import ml_dtypes

    from lsp_deploy.plugins.block_sparse import operator as block_sparse
    from lsp_deploy.plugins.block_sparse.packing import pack
    from lsp_deploy.sensitivity.quantization import weight_scale

    graph, x, residual = _graph(shape)
    weight, scale = _weight(shape, density), np.ones(shape.N, np.float32)
    blocks = pack(weight, None, shape.block)
    values = blocks.values
    if dtype == "bf16":
        values = values.astype(ml_dtypes.bfloat16)
    elif dtype == "int8":
        steps = weight_scale(weight, "fp32")
        scale = np.asarray(steps * np.float32(_X_SCALE), np.float32)
        values = pack(np.clip(np.rint(weight / steps), -127, 127).astype(np.int8), weight != 0, shape.block).values
    operator = block_sparse.BlockSparseLinear(
        K=shape.K,
        N=shape.N,
        block_k=shape.block[0],
        block_n=shape.block[1],
        col_ptr=blocks.col_ptr,
        k_idx=blocks.k_idx,
        activation=shape.activation,
        x_scale=_X_SCALE if dtype == "int8" else 0.0,
    )
    inputs = (_constant(graph, "values", values), _constant(graph, "bias", _bias(shape)))
    node = block_sparse.to_node(operator, x, *inputs, _constant(graph, "scale", scale), residual, name=_NAME)
    node.outputs[0].name = "y"
    model = _model(graph, [node])
    model.opset_imports[block_sparse.DOMAIN] = block_sparse.VERSION
    return model


def _to_qgemm(model: ir.Model, shape: LinearShape) -> None:
    """Quantize the layer of a stock model as a plan that runs it by qgemm does."""
    from lsp_deploy.passes.qgemm_form import QgemmFormPass
    from lsp_deploy.sensitivity.quantization import weight_scale

    plan = _plan(shape, "int8", "fp32")
    plan.layers[0].execution.kernel = "qgemm"
    plan.weight_scales[_NAME] = weight_scale(_weight(shape, 1.0), "fp32")
    QgemmFormPass(plan)(model)


def _plan(shape: LinearShape, dtype: ElementType, compute_type: ComputeType) -> Plan:
    """Return a plan that computes the layer in a type, dense, and leaves it to the engine."""
    from lsp_deploy.sensitivity.quantization import round_scale

    scale = float(round_scale(np.array([_X_SCALE], np.float32), compute_type)[0]) if dtype == "int8" else None
    assert dtype in ("fp32", "fp16", "bf16", "int8")
    layer = LayerPlan(
        name=_NAME,
        role="fc1",
        K=shape.K,
        N=shape.N,
        M=shape.M,
        sparsity=SparsityDecision(asked="none", reason="to be timed"),
        precision=PrecisionDecision(asked=dtype, dtype=dtype, activation_scale=scale, reason="to be timed"),
        execution=ExecutionDecision(),
    )
    return Plan(tool_version="", model_sha256="", target="", compute_type=compute_type, opset=_OPSET, layers=[layer])


def _start_quantized(model: ir.Model) -> None:
    """Make the int8 that x is quantized to the model's input."""
    import onnx_ir as ir

    x = model.graph.inputs[0]
    (quantize,) = [node for node, _ in x.uses()]
    if quantize.op_type != "QuantizeLinear":
        raise ValueError(f"x is read by a {quantize.op_type}, not quantized")
    start = ir.Value(name=x.name, shape=x.shape, type=ir.TensorType(ir.DataType.INT8))
    for node, index in tuple(quantize.outputs[0].uses()):
        node.replace_input_with(index, start)
    model.graph.remove(quantize, safe=True)
    model.graph.inputs[0] = start


def _graph(shape: LinearShape) -> tuple[ir.Graph, ir.Value, ir.Value | None]:
    """Return an empty graph with its inputs: x [1, M, K] and, where there is one, the residual [1, M, N]."""
    import onnx_ir as ir

    def value(name: str, columns: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape([1, shape.M, columns]), type=ir.TensorType(ir.DataType.FLOAT))

    x = value("x", shape.K)
    residual = value("residual", shape.N) if shape.residual else None
    inputs = [x] if residual is None else [x, residual]
    return ir.Graph(inputs, [], nodes=[], opset_imports={"": _OPSET}, name="layer"), x, residual


def _model(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Model:
    import onnx_ir as ir

    graph.extend(nodes)
    graph.outputs.append(nodes[-1].outputs[0])
    return ir.Model(graph, ir_version=10)


def _bias(shape: LinearShape) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape.N, np.float32)


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    from lsp_deploy.passes.layer_weights import add_initializer

    return add_initializer(graph, name, array)
