"""What runs layers and attention, as parts of the report: the choice, and what was measured for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lsp_deploy.allocation.execution import linear_time_us
from lsp_deploy.plan import AttentionDecision, LayerPlan, Plan
from lsp_deploy.plugins import library
from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.sections import AttentionExecution, LayerExecution, LayerRow, LinearTimeSection

__all__ = [
    "attention_execution",
    "layer_execution",
    "layer_time_ms",
    "linear_time",
    "linear_time_words",
    "operator_words",
    "run_as",
]

_DENSE = "matmul fp32"


def layer_execution(layer: LayerPlan) -> LayerExecution:
    """Return what multiplies a layer's matrices, and why."""
    return LayerExecution(**layer.execution.model_dump())


def layer_time_ms(layer: LayerPlan) -> float | None:
    """Return what the layer takes the way it is run, ms; None where it was not timed."""
    time = linear_time_us(layer)
    return None if time is None else time / 1000


def attention_execution(decision: AttentionDecision) -> AttentionExecution:
    """Return what computes attention, and why."""
    return AttentionExecution(**decision.model_dump())


def linear_time(plan: Plan, batch: int) -> LinearTimeSection | None:
    """Return what the linear layers take together, dense and as the plan runs them; None where one was not timed.

    Args:
        plan: with the times that were measured for its layers.
        batch: samples an inference, at the opt shapes.
    """
    chosen = [layer_time_ms(layer) for layer in plan.layers]
    dense = [layer.execution.times_us.get(_DENSE) for layer in plan.layers]
    threads = next((layer.execution.threads for layer in plan.layers), None)
    known = [time for time in chosen if time is not None]
    as_dense = [time / 1000 for time in dense if time is not None]
    if not known or threads is None or len(known) < len(chosen) or len(as_dense) < len(dense):
        return None
    return LinearTimeSection(batch=batch, threads=threads, dense_ms=sum(as_dense), compressed_ms=sum(known))


def linear_time_words(times: LinearTimeSection, layers: Sequence[LayerRow]) -> str:
    """Return in a sentence what runs the layers, and what they take together."""
    kernels = Counter(kernel for kernel, _ in run_as(layers)).most_common()
    return (
        f"linear layers: {', '.join(f'{number} {kernel}' for kernel, number in kernels)}; "
        f"{formatting.milliseconds(times.compressed_ms)} together, {formatting.milliseconds(times.dense_ms)} as dense "
        f"{_DENSE} (measured, shape by shape, batch {times.batch}, {formatting.count(times.threads, 'thread')})"
    )


def operator_words(layers: Sequence[LayerRow], attention: AttentionExecution | None, *, on_gpu: bool) -> str | None:
    """Return what whoever runs the model needs for operators of this project; None where the model has none."""
    kernels = {layer.execution.kernel for layer in layers if not layer.gone}
    if "block_sparse" not in kernels and (attention is None or attention.kernel != "lsp"):
        return None
    needs = "a session of your own needs lsp_deploy.plugins.register(options), with the library that is not built here"
    if library().path is not None:
        needs = "a session of your own needs lsp_deploy.plugins.register(options)"
    if on_gpu:
        needs = "TensorRT takes them from liblsp_block_sparse.so (docs/tensorrt-plugin.md), to build and to run"
    return (
        f"model.onnx has operators of lsp-deploy: {needs}, and `lsp-deploy lower` writes the same with stock operators"
    )


def run_as(layers: Sequence[LayerRow]) -> list[tuple[str, str]]:
    """Return for each layer what runs it, as "block_sparse int8", and the reason."""
    return [(f"{layer.execution.kernel} {layer.precision.dtype}", layer.execution.reason) for layer in layers]
