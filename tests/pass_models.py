"""Small graphs for the tests of passes, plans that name their layers, and ONNX Runtime to compare before and after."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import CheckerPass

from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.plan import LayerPlan, Plan, PrecisionDecision, SparsityDecision


def graph(text, opset=19, **initializers):
    """Return the model of a graph in ONNX text, `name (inputs) => (outputs) { nodes }`.

    Nodes without a name get that of their output.
    """
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1, "lsp" : 1]>\n{text}'
    )
    for name, array in initializers.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(np.asarray(array), name=name)))
    model = ir.from_proto(proto)
    for node in model.graph.all_nodes():
        node.name = node.name or node.outputs[0].name
    InferShapesPass()(model)
    return model


def run(model, optimize=False, **feeds):
    """Run a checked model in ONNX Runtime and return its outputs by name, computed node by node unless `optimize`."""
    CheckerPass(full_check=True)(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimize:
        # A CPU without VNNI would saturate in 16 bit otherwise.
        options.add_session_config_entry("session.x64quantprecision", "1")
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))


def layer(name, k, n, dtype="fp32", scale=None, role="fc1"):
    return LayerPlan(
        name=name,
        role=role,
        K=k,
        N=n,
        M=1,
        sparsity=SparsityDecision(asked="none", reason="test"),
        precision=PrecisionDecision(asked=dtype, dtype=dtype, activation_scale=scale, reason="test"),
    )


def plan(*layers, masks=None, weight_scales=None):
    made = Plan(tool_version="0", model_sha256="0", target="a100", compute_type="fp32", opset=19, layers=list(layers))
    made.masks.update(masks or {})
    made.weight_scales.update(weight_scales or {})
    return made


def array_of(model, name):
    """Return what an initializer holds."""
    return model.graph.initializers[name].const_value.numpy()


def node_of(model, name):
    return next(node for node in model.graph.all_nodes() if node.name == name)


def op_types(model):
    return [node.op_type for node in model.graph]
