"""Running a graph in parts, on another device, and operators that only their ONNX function bodies define."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lsp_deploy.errors import UserError
from lsp_deploy.model import load_model, resolve_shapes

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import FAMILIES, export_family  # noqa: E402
from graphs import graph, random_feeds, run  # noqa: E402

from lsp_deploy.autodiff.module import OnnxModule  # noqa: E402
from lsp_deploy.passes.canonicalize import canonicalize  # noqa: E402

DIGITS = Path(__file__).parents[2] / "lsp_deploy" / "assets" / "digits_vit.onnx"
X = "float[2, 5, 8, 3] x"
Y = "float[2, 5, 8, 3] y"


@pytest.fixture(scope="module")
def digits() -> ir.Model:
    return canonicalize(load_model(DIGITS), max_opset=22)


def feeds_of(model: ir.Model, batch: int = 3) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    return {
        name: torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
        for name, shape in resolve_shapes(model, None, batch=batch).items()
    }


@torch.no_grad()
def test_going_node_by_node_costs_one_forward_and_gives_the_same(digits: ir.Model) -> None:
    module, feeds = OnnxModule(digits), feeds_of(digits)
    nodes = [str(node.name) for node in digits.graph]
    seen = []
    for name in nodes:
        module.hooks_by_node[name] = lambda x, y, name=name: (seen.append(name), y)[1]
    state = module.start(feeds)
    for node in digits.graph:
        state.advance(str(node.name), after=False)
        initializers = digits.graph.initializers
        assert {str(value.name) for value in node.inputs if value and value.name not in initializers} <= set(
            state.values
        )
        state.advance(str(node.name), after=True)
    assert seen == nodes
    outputs = state.finish()
    module.hooks_by_node.clear()
    for name, expected in module(feeds).items():
        torch.testing.assert_close(outputs[name], expected, rtol=0, atol=0)
    assert set(state.values) == set(outputs)


@torch.no_grad()
def test_values_are_dropped_unless_kept(digits: ir.Model) -> None:
    module = OnnxModule(digits)
    first = digits.graph[0]
    kept = str(first.outputs[0].name)
    plain, keeping = module.start(feeds_of(digits)), module.start(feeds_of(digits), keep=[kept])
    for state in (plain, keeping):
        state.advance(str(digits.graph[len(digits.graph) // 2].name), after=True)
    assert kept not in plain.values
    assert kept in keeping.values
    assert not set(module.input_names) & set(plain.values)


@torch.no_grad()
def test_a_weight_changed_on_the_way_takes_effect(digits: ir.Model) -> None:
    module, feeds = OnnxModule(digits), feeds_of(digits)
    node = [node for node in digits.graph if node.op_type == "MatMul" and node.inputs[1].is_initializer()][-1]
    state = module.start(feeds)
    state.advance(str(node.name), after=False)
    module.weights[str(node.inputs[1].name)].data.zero_()
    state.advance(str(node.name), after=True)
    assert not state.values[str(node.outputs[0].name)].any()


def test_stops_that_cannot_be_made_are_refused(digits: ir.Model) -> None:
    state = OnnxModule(digits).start(feeds_of(digits))
    with pytest.raises(ValueError, match="no node nowhere"):
        state.advance("nowhere", after=True)
    state.advance(str(digits.graph[3].name), after=True)
    state.advance(str(digits.graph[3].name), after=True)
    with pytest.raises(ValueError, match="has run already"):
        state.advance(str(digits.graph[3].name), after=False)


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ("y = Mish(x)", 18),
        ("y = Selu<alpha=1.2>(x)", 17),
        ("y = Celu<alpha=0.7>(x)", 17),
        ("y = Shrink<lambd=0.3>(x)", 17),
        ("y = ThresholdedRelu(x)", 22),
        ("y = MeanVarianceNormalization(x)", 17),
        ("a = Celu(x) b = Celu<alpha=2.0>(a) y = Softsign(b)", 17),
    ],
)
def test_operators_with_a_function_body_are_written_out(nodes: str, opset: int) -> None:
    model = graph(nodes, x=X, y=Y, opset=opset)
    before = str(model.graph)
    feeds = random_feeds(model)
    (expected,) = run(model, feeds)
    found = OnnxModule(model)({name: torch.from_numpy(value) for name, value in feeds.items()})["y"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert str(model.graph) == before


def test_attention_is_written_out() -> None:
    model = graph("y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x)", opset=23)
    feeds = random_feeds(model)
    (expected,) = run(model, feeds)
    found = OnnxModule(model)({name: torch.from_numpy(value) for name, value in feeds.items()})["y"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_model_local_functions_are_inlined() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "mine": 1]> g (float[2, 3] x) => (float[2, 3] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["": 17]> twice (a) => (b) { b = Add(a, a) }"""
    )
    x = torch.randn(2, 3)
    torch.testing.assert_close(OnnxModule(ir.from_proto(proto))({"x": x})["y"], 2 * x)


def test_control_flow_is_refused_by_name() -> None:
    model = graph(
        """y = If(c) <then_branch = t () => (float[1] a) { a = Neg(x) },
                    else_branch = e () => (float[1] b) { b = Abs(x) }>""",
        x="float[1] x, bool c",
        y="float[1] y",
    )
    model.graph[0].name = "the_branch"
    with pytest.raises(UserError, match=r"If \(node the_branch\)"):
        OnnxModule(model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_device_is_mixed(family: str) -> None:
    # Tensors of the meta device hold no numbers and mix with no others: shape arithmetic must stay on the CPU.
    model = canonicalize(load_model(export_family(family)), max_opset=22)
    module = OnnxModule(model).to("meta")
    feeds = {name: value.to("meta") for name, value in feeds_of(model, batch=2).items()}
    with torch.no_grad():
        expected = OnnxModule(model)(feeds_of(model, batch=2))
    for name, value in module(feeds).items():
        assert value.device.type == "meta"
        assert value.shape == expected[name].shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_the_cpu_on_cuda(family: str) -> None:
    model = load_model(export_family(family))
    feeds = feeds_of(model, batch=2)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = OnnxModule(model)(feeds)
        found = OnnxModule(model).cuda()({name: value.cuda() for name, value in feeds.items()})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].cpu().numpy(), value.numpy(), atol=1e-4 * float(value.abs().max()))
