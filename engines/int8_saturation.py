"""Whether ONNX Runtime's int8 products saturate on this CPU."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

__all__ = ["int8_saturates"]

_K, _N = 64, 32


@cache
def int8_saturates() -> bool:
    """Return whether uint8 times int8 comes out wrong: CPUs without VNNI add pairs of products in 16 bits.

    Found by multiplying the largest numbers there are. `session.x64quantprecision` then gives exact results by other
    kernels. It must not be set where nothing saturates: ONNX Runtime 1.31 takes the other kernels there as well, and an
    int8 layer runs at less than half the speed (DeiT shapes on a CPU with AVX-512 VNNI).
    """
    x = np.full((8, _K), 255, np.uint8)
    session = ort.InferenceSession(_product(), _options(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return bool((y != 255 * 127 * _K).any())


def _product() -> bytes:
    """Return a model of x [8, K] uint8 @ W [K, N] int8, all of W at 127."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((_K, _N), 127, np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [8, _K])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [8, _N])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options
