"""Plans for GPUs in which every linear layer has lost blocks and is run by lsp::BlockSparseLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from graphs import random_feeds
from pass_models import layer
from pass_models import plan as plan_of

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.linear_layers import LinearLayer, linear_layers
from lsp_deploy.plan import Plan
from lsp_deploy.sensitivity.quantization import ComputeType, round_scale, weight_scale
from lsp_deploy.steps.apply import apply_plan

INSIDE = ("qkv", "q", "k", "v", "proj", "fc1", "fc2")


def inside(model: ir.Model) -> list[LinearLayer]:
    """Return the linear layers of a canonical model that lie in its blocks."""
    return [one for one in linear_layers(model) if one.role in INSIDE]


def block_plan(
    model: ir.Model,
    dtype: str,
    *,
    compute_type: ComputeType = "fp16",
    block: tuple[int, int] = (32, 32),
    density: float = 0.5,
) -> Plan:
    """Return a plan that keeps random blocks of every layer in the model's blocks; dtype is what they compute in."""
    random = np.random.default_rng(0)
    layers = inside(model)
    largest = _largest_inputs(model, layers) if dtype == "int8" else {}
    made = plan_of(
        *(
            layer(one.name, one.K, one.N, dtype, _scale(largest[str(one.x.name)], compute_type) if largest else None)
            for one in layers
        ),
        masks={one.name: _mask(random, one, block, density) for one in layers},
        weight_scales={one.name: weight_scale(one.weight(), compute_type) for one in layers} if largest else {},
    )
    made.compute_type, made.block_shape = compute_type, block
    for decided in made.layers:
        decided.execution.kernel = "block_sparse"
        decided.sparsity.pattern = "block"
    return made


def applied(model: ir.Model, plan: Plan) -> ir.Model:
    """Carry a plan out for a GPU; inputs and outputs stay float32."""
    (x,) = model.graph.inputs
    shape = [2, *list(x.shape or ())[1:]]
    types = {str(value.name): ir.DataType.FLOAT for value in (*model.graph.inputs, *model.graph.outputs)}
    return apply_plan(model, plan, types, {str(x.name): shape}, kind="gpu").model


def _mask(random: np.random.Generator, one: LinearLayer, block: tuple[int, int], density: float) -> np.ndarray:
    grid = (-(-one.K // block[0]), -(-one.N // block[1]))
    kept = random.random(grid) < density
    return kept.repeat(block[0], axis=0).repeat(block[1], axis=1)[: one.K, : one.N]


def _largest_inputs(model: ir.Model, layers: list[LinearLayer]) -> dict[str, float]:
    names = sorted({str(one.x.name) for one in layers})
    with OnnxRuntimeEngine.from_model(model, threads=1, extra_outputs=names) as engine:
        values = engine.run(random_feeds(model))
    return {name: float(np.abs(values[name]).max()) for name in names}


def _scale(largest: float, compute_type: ComputeType) -> float:
    return float(round_scale(np.array([largest / 127], np.float32), compute_type)[0])
