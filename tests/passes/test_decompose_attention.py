"""Attention as a single node, written out for older parsers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_family
from graphs import assert_same_outputs, graph, operators

from lsp_deploy.errors import UserError
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize

Q = "float[N, 3, 5, 8] q, float[N, 3, 7, 8] k, float[N, 3, 7, 6] v"
Y = "float[N, 3, 5, 6] y"
MASK = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
DECOMPOSED = {"Mul": 2, "Transpose": 1, "MatMul": 2, "Softmax": 1}


def attention(nodes: str, *, x: str = Q, y: str = Y) -> ir.Model:
    return graph(nodes, x=x, y=y, opset=23, weights={"mask": MASK, "yes": MASK > 0})


@pytest.mark.parametrize(
    ("nodes", "extra"),
    [
        ("y = Attention(q, k, v)", {}),
        ("y = Attention<scale = 0.3>(q, k, v)", {}),
        ("y = Attention<is_causal = 0, softcap = 0.0>(q, k, v, mask)", {"Add": 1}),
        ("a = Attention(q, k, v) y = Neg(a)", {"Neg": 1}),
    ],
)
def test_decomposes(nodes: str, extra: dict[str, int]) -> None:
    before = attention(nodes)
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == DECOMPOSED | extra
    assert after.opset_imports[""] == 20
    assert_same_outputs(before, after)


def test_keeps_it_where_the_target_takes_it() -> None:
    assert operators(canonicalize(attention("y = Attention(q, k, v)"), max_opset=23)) == {"Attention": 1}


@pytest.mark.parametrize(
    ("nodes", "x", "y"),
    [
        ("y = Attention<is_causal = 1>(q, k, v)", Q, Y),
        ("y = Attention<softcap = 2.0>(q, k, v)", Q, Y),
        ("y = Attention(q, k, v, yes)", Q, Y),
        ("y, k_, v_ = Attention(q, k, v)", Q, f"{Y}, float[N, 3, 7, 8] k_, float[N, 3, 7, 6] v_"),
        ("y = Attention(q, k, v)", Q.replace("N, 3, 5", "N, 6, 5"), Y.replace("N, 3", "N, 6")),
        ("y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, q, q)", "float[N, 5, 8] q", "float[N, 5, 8] y"),
    ],
)
def test_other_forms_are_refused(nodes: str, x: str, y: str) -> None:
    with pytest.raises(UserError, match="Attention cannot be expressed in opset 20"):
        canonicalize(attention(nodes, x=x, y=y), max_opset=20)


def test_export_with_attention_nodes() -> None:
    before = load_model(export_family("vit_tiny_patch16_224", exporter="dynamo", opset=23))
    assert operators(before)["Attention"] == 2
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after)["Softmax"] == 2
    assert_same_outputs(before, after)
