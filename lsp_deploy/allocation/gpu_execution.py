"""What runs each layer on a GPU: its engine, or lsp::BlockSparseLinear where a layer has lost blocks.

The engine times its own kernels, and the operator's among themselves, but not the one against the other: that is what
the kernel in the plan decides, by times measured on this machine's GPU where it is the target, else by the cost model,
and then as an estimate. Blocks that were asked for are run by the operator whatever it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lsp_deploy.allocation.execution import block_density
from lsp_deploy.allocation.question import Question
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cost_model import estimate_layer
from lsp_deploy.plan import ExecutionDecision, LayerPlan, Plan, PrecisionDecision
from lsp_deploy.plugins.block_sparse.operator import BSL16_BLOCKS

if TYPE_CHECKING:
    from lsp_deploy.hardware.gpu_timings import GpuTimings
    from lsp_deploy.hardware.target import ElementType, Target
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["decide_gpu_execution", "gpu_time_us", "gpu_too_old", "operator_cannot_run"]

_MIN_CAPABILITY = (8, 0)
Block = tuple[int, int]


@dataclass(frozen=True)
class _Times:
    """What the ways to run a layer take."""

    us: dict[str, float] = field(default_factory=dict)
    """By candidate, "matmul int8"; empty where nothing is known."""
    source: str = ""
    """Measured or estimated, and on what; of what is not known, why."""
    measured: bool = False


def decide_gpu_execution(question: Question, plan: Plan) -> Plan:
    """Return the plan with what runs each layer; `auto` leaves int8 where the compute type is faster.

    The operator runs every layer that has lost blocks because they were asked for, and those of which `auto` took
    blocks where it is the fastest; but none that its kernels cannot run.
    """
    decided = _retyped(question, plan)
    for layer, of_model in zip(decided.layers, question.layers, strict=True):
        layer.execution = _execution(layer, of_model, decided, question)
    return decided


def gpu_time_us(question: Question, plan: Plan) -> float:
    """Return what the linear layers take together, each in the faster way of those it may be run in, µs.

    Raises:
        UserError: nothing was measured, and the target has no peak rates to estimate from.
    """
    total = 0.0
    for layer, of_model in zip(plan.layers, question.layers, strict=True):
        times = _times(layer, of_model, plan, question)
        if times.us:
            total += min(times.us[name] for name in _ways(layer, layer.precision.dtype) if name in times.us)
        elif question.gpu_timings is None:
            raise UserError(times.source)
    return total


def operator_cannot_run(layer: LayerPlan, of_model: LinearLayer, block: Block, target: Target) -> str | None:
    """Return why the operator's kernels for GPUs cannot run a layer with blocks of this shape, or None."""
    if of_model.node.op_type == "Conv":
        return "does no convolutions"
    if layer.precision.dtype == "fp32":
        return "computes in fp16, bf16 and int8 on a GPU"
    if not set(block) <= set(BSL16_BLOCKS):
        return f"has no blocks of {block[0]}x{block[1]} on a GPU, but of {', '.join(map(str, BSL16_BLOCKS))}"
    return gpu_too_old(target)


def gpu_too_old(target: Target) -> str | None:
    """Return that a target's GPU is older than the operator's kernels, or None."""
    capability = target.compute_capability
    if capability is not None and tuple(map(int, capability.split("."))) < _MIN_CAPABILITY:
        return f"needs compute capability 8.0, {target.name} has {capability}"
    return None


def _execution(layer: LayerPlan, of_model: LinearLayer, plan: Plan, question: Question) -> ExecutionDecision:
    times, density = _times(layer, of_model, plan, question), block_density(plan, layer)
    measured = {name: round(time, 2) for name, time in times.us.items()} if times.measured else {}
    if density == 1 or plan.block_shape is None:
        words = f"left to the engine: {_listed(times)}" if times.measured else "left to the engine"
        return ExecutionDecision(times_us=measured, reason=words)
    why_not = operator_cannot_run(layer, of_model, plan.block_shape, question.target)
    if why_not is not None:
        reason = f"left to the engine, at the dense speed: the operator {why_not}"
        return ExecutionDecision(times_us=measured, reason=reason)
    left = f"{density:.0%} of the blocks survive; {_comparison(layer, times)}"
    if layer.sparsity.asked == "block" or _is_faster(layer, times):
        return ExecutionDecision(kernel="block_sparse", times_us=measured, reason=f"block_sparse: {left}")
    return ExecutionDecision(times_us=measured, reason=f"left to the engine, at the dense speed: {left}")


def _retyped(question: Question, plan: Plan) -> Plan:
    """Return the plan without int8 in layers left to `auto` that the compute type runs faster."""
    decided = plan.branch()
    for layer, of_model in zip(decided.layers, question.layers, strict=True):
        if layer.precision.asked != "auto" or layer.precision.dtype != "int8":
            continue
        times, dtype = _times(layer, of_model, decided, question), decided.compute_type
        least = {one: _least(times, _ways(layer, one)) for one in (dtype, layer.precision.dtype)}
        wide, narrow = least[dtype], least["int8"]
        if wide is not None and narrow is not None and wide < narrow:
            reason = f"{dtype}: {_us(wide)}, int8 takes {_us(narrow)} ({times.source})"
            layer.precision = PrecisionDecision(
                asked="auto", dtype=dtype, sqnr_db=layer.precision.sqnr_db, reason=reason
            )
    return decided


def _times(layer: LayerPlan, of_model: LinearLayer, plan: Plan, question: Question) -> _Times:
    """Return what the layer takes with its zeros, in its own type and the compute type, in all ways that there are."""
    density = block_density(plan, layer)
    timings = question.gpu_timings
    if timings is not None:
        return _measured(layer, density, timings)
    lost_blocks = density < 1 and plan.block_shape is not None
    if lost_blocks and plan.block_shape is not None:
        lost_blocks = operator_cannot_run(layer, of_model, plan.block_shape, question.target) is None
    found: dict[str, float] = {}
    source = ""
    try:
        for dtype in dict.fromkeys((layer.precision.dtype, plan.compute_type)):
            size = (question.target, layer.M, layer.K, layer.N, dtype)
            dense = estimate_layer(*size)
            found[f"matmul {dtype}"], source = dense.time_us, dense.source
            if layer.sparsity.pattern == "2:4":
                found[f"two_four {dtype}"] = estimate_layer(*size, pattern="2:4").time_us
            if lost_blocks and plan.block_shape is not None and dtype != "fp32":
                blocks = estimate_layer(*size, pattern="block", density=density, block=plan.block_shape)
                found[f"block_sparse {dtype}"] = blocks.time_us
    except UserError as error:
        return _Times(source=str(error))
    return _Times(found, source)


def _measured(layer: LayerPlan, density: float, timings: GpuTimings) -> _Times:
    known = timings.at(layer.name, density)
    names = [name for name in known if density < 1 or not name.startswith("block_sparse")]
    if layer.sparsity.pattern != "2:4":
        names = [name for name in names if not name.startswith("two_four")]
    source = f"measured on {timings.device}" if known else f"it was not timed on {timings.device}"
    return _Times({name: known[name] for name in names}, source, measured=bool(known))


def _ways(layer: LayerPlan, dtype: ElementType) -> list[str]:
    """Return the candidates of a type for the layer's zeros; what an engine gets with 2:4 zeros it chooses itself."""
    engine = f"two_four {dtype}" if layer.sparsity.pattern == "2:4" else f"matmul {dtype}"
    return [engine, f"block_sparse {dtype}"]


def _least(times: _Times, names: Sequence[str]) -> float | None:
    return min((times.us[name] for name in names if name in times.us), default=None)


def _is_faster(layer: LayerPlan, times: _Times) -> bool:
    engine, operator = _ways(layer, layer.precision.dtype)
    return operator in times.us and engine in times.us and times.us[operator] < times.us[engine]


def _comparison(layer: LayerPlan, times: _Times) -> str:
    engine, operator = _ways(layer, layer.precision.dtype)
    if not times.us:
        return f"its speed is not estimated: {times.source}"
    if operator not in times.us:
        return f"the operator was not timed ({times.source})"
    faster = "faster than" if _is_faster(layer, times) else "no faster than"
    return f"{faster} the dense layer, {_us(times.us[operator])} against {_us(times.us[engine])} ({times.source})"


def _listed(times: _Times) -> str:
    words = ", ".join(f"{name} {_us(time)}" for name, time in sorted(times.us.items(), key=lambda one: one[1]))
    return f"{words} ({times.source})"


def _us(time: float) -> str:
    return f"{time:.0f} µs" if time >= 20 else f"{time:.1f} µs"
