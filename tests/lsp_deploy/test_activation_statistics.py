"""Statistics of activations do not depend on the batch that the model happens to take."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.sensitivity.activations import ActivationStatistics, collect_activations

SAMPLES, TOKENS, K, N = 10, 3, 8, 5


class Arrays:
    def __len__(self) -> int:
        return SAMPLES

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        x = np.random.default_rng(0).standard_normal((SAMPLES, TOKENS, K)).astype(np.float32)
        for start in range(0, SAMPLES, size):
            yield {"x": x[start : start + size]}


def collect(batch: int | str) -> ActivationStatistics:
    weight = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape([batch, TOKENS, K]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    # Tokens merged with the batch, as window attention has them.
    rows = ir.Value(name="rows", const_value=ir.tensor(np.array([-1, K], np.int64), name="rows"))
    relu = ir.node("Relu", [x])
    merge = ir.node("Reshape", [relu.outputs[0], rows])
    merge.outputs[0].name = "merged"
    linear = ir.node("MatMul", [merge.outputs[0], w])
    y = linear.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([None, N]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[relu, merge, linear], initializers=[w, rows], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=9)
    layers = linear_layers(model, {"x": (batch if isinstance(batch, int) else 2, TOKENS, K)})
    with OnnxRuntimeEngine.from_model(model, threads=1, extra_outputs=["merged"]) as engine:
        return collect_activations(engine, layers, Arrays(), batch_size=2, rows=SAMPLES * TOKENS)["merged"]  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_fixed_batch_that_does_not_divide_the_samples(batch: int) -> None:
    expected, found = collect("batch"), collect(batch)
    assert found.count == expected.count == SAMPLES * TOKENS
    np.testing.assert_array_equal(found.histogram.counts, expected.histogram.counts)
    np.testing.assert_allclose(found.square_sum, expected.square_sum, rtol=1e-12)
    np.testing.assert_array_equal(found.rows, expected.rows)
