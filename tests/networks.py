"""Networks as the search has them, and the models that a plan makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from graphs import move_weights, run
from numpy.typing import NDArray

from lsp_deploy.data.arrays import ArrayReader
from lsp_deploy.data.dataset import Dataset
from lsp_deploy.data.synthetic import SyntheticReader
from lsp_deploy.model import load_model, resolve_shapes
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.replace_parameters import ReplaceParametersPass
from lsp_deploy.plan import LayerPlan, Plan, PrecisionDecision, SparsityDecision
from lsp_deploy.search.network import Network

__all__ = ["ASSETS", "digits_network", "moved_network", "network_of", "outputs_of_plan", "plan_of"]

ASSETS = Path(__file__).parents[1] / "lsp_deploy" / "assets"


def digits_network(samples: int = 40) -> Network:
    """Return the embedded model with some of its calibration images."""
    model = canonicalize(load_model(ASSETS / "digits_vit.onnx"), max_opset=20)
    images = np.load(ASSETS / "calibration.npz")
    arrays = {str(model.graph.inputs[0].name): images[images.files[0]][:samples]}
    rows = np.arange(samples)
    reader = ArrayReader(ASSETS / "calibration.npz", arrays, {}, rows)
    data = Dataset("calibration.npz", "arrays", reader, rows, tuple(map(str, rows)))
    return Network(model, resolve_shapes(model, None, batch=8), data)


def moved_network(path: Path, *, samples: int = 4) -> Network:
    """Return an export whose gains, offsets and biases are other than one and zero, with noise for its inputs."""
    model = load_model(path)
    move_weights(model)
    return network_of(canonicalize(model, max_opset=20), samples=samples)


def network_of(model: ir.Model, *, samples: int = 4, fixed_batch: bool = False) -> Network:
    """Return a canonical model with noise for its inputs."""
    shapes = resolve_shapes(model, None, batch=2)
    dtypes = {str(value.name): value.dtype.numpy() for value in model.graph.inputs if value.dtype is not None}
    reader = SyntheticReader("random", shapes, dtypes, 0)
    data = Dataset("random", "random", reader, np.arange(samples), tuple(map(str, range(samples))))
    return Network(model, shapes, data, fixed_batch=fixed_batch)


def outputs_of_plan(model: ir.Model, plan: Plan, feeds: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Run a canonical model in ONNX Runtime with the plan's weights, biases and constants in place of its own."""
    changed = model.clone()
    ReplaceParametersPass(plan)(changed)
    return run(changed, feeds)


def plan_of(network: Network) -> Plan:
    """Return the plan that holds all that is other in the pruned network than in the model."""
    layers = [
        LayerPlan(
            name=layer.name,
            role=layer.role,
            block=layer.block,
            K=layer.K,
            N=layer.N,
            M=layer.M,
            sparsity=SparsityDecision(asked="none", reason="test"),
            precision=PrecisionDecision(asked="fp32", dtype="fp32", reason="test"),
        )
        for layer in network.layers
    ]
    plan = Plan(tool_version="0", model_sha256="0", target="cpu", compute_type="fp32", opset=17, layers=layers)
    for layer in network.layers:
        if layer.name in network.not_writable or not network.is_changed(layer.name):
            continue
        theta = network.theta(layer.name).float().numpy()
        plan.weights[layer.name] = np.ascontiguousarray(theta[: layer.K])
        if len(theta) > layer.K:
            plan.biases[layer.name] = np.ascontiguousarray(theta[layer.K])
    plan.constants.update(network.changed_constants())
    return plan
