"""The ONNX graph in torch: equal to ONNX Runtime, and its gradients equal to torch's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.model import load_model, resolve_shapes

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import FAMILIES, export_family, export_huggingface_vit  # noqa: E402

from lsp_deploy.autodiff.module import OnnxModule  # noqa: E402

DIGITS = Path(__file__).parents[2] / "lsp_deploy" / "assets" / "digits_vit.onnx"


def feeds_for(model: ir.Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = resolve_shapes(model, None, batch=2)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_equal_to_onnxruntime(path: Path) -> None:
    model = load_model(path)
    feeds = feeds_for(model)
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        expected = engine.run(feeds)
    with torch.no_grad():
        found = OnnxModule(model)({name: torch.from_numpy(value) for name, value in feeds.items()})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, atol=1e-4 * np.abs(value).max())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_onnxruntime_on_real_families(family: str) -> None:
    assert_equal_to_onnxruntime(export_family(family))


def test_equals_onnxruntime_on_a_hugging_face_export() -> None:
    assert_equal_to_onnxruntime(export_huggingface_vit())


def test_parameters_go_back_bit_exactly() -> None:
    model = load_model(DIGITS)
    module = OnnxModule(model)
    for parameter in module.weights.values():
        parameter.data.mul_(1.5)
    module.write_back(model)
    for name, parameter in module.weights.items():
        value = model.graph.initializers[name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), parameter.detach().numpy())


def test_an_operator_without_implementation_is_named_with_its_node() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Einstein", [x], domain="somewhere", name="the_node")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17, "somewhere": 1}, name="g")
    with pytest.raises(UserError, match=r"somewhere::Einstein \(node the_node\)"):
        OnnxModule(ir.Model(graph, ir_version=9))
