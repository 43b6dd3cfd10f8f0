"""Whole models with lsp::Attention in ONNX Runtime: their outputs are those of the exported attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exports import export_clip, export_family
from graphs import move_weights, random_feeds, run

from lsp_deploy.model import load_model, model_bytes
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.fuse_attention import FuseAttentionPass
from lsp_deploy.plugins.attention.operator import Compute

MODELS: dict[str, Callable[[], Path]] = {
    "fused projection": lambda: export_family("vit_tiny_patch16_224"),
    "shifted windows": lambda: export_family("swin_tiny_patch4_window7_224", fused_attention=False),
    "three projections and a causal mask": export_clip,
    "one query": lambda: export_family("cait_xxs24_224"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_outputs_are_those_of_the_exported_attention(
    native_library: Path, name: str, compute: Compute, tolerance: float
) -> None:
    before = canonicalize(load_model(MODELS[name]()), max_opset=20)
    move_weights(before)
    fused = before.clone()
    rewrite = FuseAttentionPass(compute)
    rewrite(fused)
    assert rewrite.found
    feeds = random_feeds(before, batch=3)
    for expected, actual in zip(run(before, feeds), run_native(fused, native_library, feeds), strict=True):
        assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def run_native(model: ir.Model, library: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"]).run(None, feeds)
