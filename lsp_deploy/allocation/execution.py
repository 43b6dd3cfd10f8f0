"""What runs each layer on a CPU: the fastest of what was timed on this machine that its precision allows.

Under `--precision auto` an int8 layer that another type runs faster is not int8, and bf16 is taken where it is the
fastest and the loss on held-out images allows it. That is checked for all layers and attention together: bf16 hardly
loses anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

from lsp_deploy.allocation.masks import block_sums
from lsp_deploy.allocation.question import Question
from lsp_deploy.hardware.cpu_timings import CpuTimings, LayerTimes
from lsp_deploy.plan import AttentionDecision, ExecutionDecision, Kernel, LayerPlan, Plan, PrecisionDecision

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import ElementType

__all__ = ["block_density", "decide_execution", "expected_type", "least_time_us", "linear_time_us"]

_WORTH = 0.05  # of the time: for less, nothing is rounded to bf16
_BF16_ATTENTION = "lsp bf16"
_Name = TypeVar("_Name", bound=str)

# Of a plan, by the candidate that was timed.
_KERNELS: dict[str, Kernel] = {
    "matmul": "engine",
    "qgemm": "qgemm",
    "block_sparse": "block_sparse",
    "gather": "gather",
}


def decide_execution(question: Question, plan: Plan, budget: float) -> Plan:
    """Return the plan with the fastest way to run each layer, and attention; `auto` may change element types for it.

    Without timings (a GPU's engines choose their own kernels) the plan comes back as it is.

    Args:
        question: with its timings.
        plan: zeros and int8 decided.
        budget: points that the plan may lose on held-out images, for bf16 under `auto`.
    """
    timings = question.timings
    if timings is None:
        return plan
    if question.recipe.precision not in ("auto", "int8"):
        return _executed(plan, timings, bf16_attention=question.recipe.precision == "bf16")
    without = _executed(_retyped(plan, timings, bf16=None), timings, bf16_attention=False)
    fits = "the model has no class output to measure its loss on"
    if question.loss is not None:
        fits = f"all that is bf16 stays within {question.points_of_loss(budget)}"
    taken = _executed(_retyped(plan, timings, bf16=fits), timings, bf16_attention=True)
    if not _uses_bf16(taken) or question.loss is None or question.loss_of(taken) <= budget:
        return taken
    return _taken_back(without, taken, f"bf16 would exceed {question.points_of_loss(budget)} on held-out images")


def expected_type(times: LayerTimes, allowed: list[ElementType]) -> ElementType:
    """Return the type, of those allowed, in which the dense layer is fastest."""
    timed = [dtype for dtype in allowed if times.usable(dtype)]
    return min(timed, key=lambda dtype: float(times.least_us(dtype)))


def block_density(plan: Plan, layer: LayerPlan) -> float:
    """Return the fraction of a layer's blocks that survive its mask; 1 where it has none, or another pattern."""
    mask = plan.masks.get(layer.name)
    if mask is None or layer.sparsity.pattern != "block" or plan.block_shape is None:
        return 1.0
    return float((block_sums(mask.astype("float32"), plan.block_shape) > 0).mean())


def least_time_us(question: Question, plan: Plan) -> float:
    """Return what the linear layers take with the plan's zeros, each in the fastest type that it may have, µs.

    Raises:
        ValueError: nothing was timed.
    """
    if question.timings is None:
        raise ValueError("what the layers take is not known: nothing was timed")
    least = 0.0
    for layer in plan.layers:
        times = question.timings.layers[layer.name]
        least += min(_times_by_type(layer, times, block_density(plan, layer), bf16=True).values())
    return least


def linear_time_us(layer: LayerPlan) -> float | None:
    """Return what the layer takes the way it is run, as its plan says, µs; None where that was not timed."""
    times, dtype = layer.execution.times_us, layer.precision.dtype
    if layer.sparsity.pattern == "2:4" and f"two_four {dtype}" in times:
        return times[f"two_four {dtype}"]
    (candidate,) = (candidate for candidate, kernel in _KERNELS.items() if kernel == layer.execution.kernel)
    return times.get(f"{candidate} {dtype}")


def _executed(plan: Plan, timings: CpuTimings, *, bf16_attention: bool) -> Plan:
    """Return the plan with every layer run by the fastest candidate of its element type."""
    decided = plan.branch()
    for layer in decided.layers:
        times = timings.layers[layer.name]
        density = block_density(decided, layer)
        chosen = times.fastest(layer.precision.dtype, density)
        known = {name: round(float(times.at(name, density)), 2) for name in times.curves}
        layer.execution = ExecutionDecision(
            kernel=_KERNELS[chosen.partition(" ")[0]],
            times_us=known,
            threads=timings.threads,
            reason=_why(chosen, known, timings, density, is_conv=times.shape.is_conv),
        )
    decided.attention = _attention(timings, bf16=bf16_attention)
    return decided


def _why(chosen: str, times: dict[str, float], timings: CpuTimings, density: float, *, is_conv: bool) -> str:
    if is_conv:
        return f"engine: a convolution; a MatMul of its shape takes {_us(times[chosen])} ({timings.conditions})"
    others = sorted((time, name) for name, time in times.items() if name != chosen)
    words = ", ".join(f"{name} {_us(time)}" for time, name in others)
    blocks = "" if density == 1 else f"; {density:.0%} of the blocks survive"
    return f"{chosen}: {_us(times[chosen])}{f'; {words}' if words else ''} ({timings.conditions}{blocks})"


def _attention(timings: CpuTimings, *, bf16: bool) -> AttentionDecision:
    times, left = {name: round(time, 2) for name, time in timings.attention.items()}, dict(timings.attention_left)
    stay = [
        f"{number} {'stays' if number == 1 else 'stay'} as exported: {why}"
        for why, number in Counter(left.values()).items()
    ]
    if not times:
        return AttentionDecision(left=left, reason="; ".join(stay) or "left to the engine: no attention was found")
    chosen = _best({name: time for name, time in times.items() if bf16 or name != _BF16_ATTENTION}, _BF16_ATTENTION)
    others = "".join(f"; {name} {_us(time)}" for name, time in times.items() if name != chosen)
    where = "other layers" if left else "layers"
    return AttentionDecision(
        kernel="lsp" if chosen.startswith("lsp") else "engine",
        compute="bf16" if chosen.endswith("bf16") else "fp32",
        times_us=times,
        threads=timings.threads,
        left=left,
        reason="; ".join([f"{chosen}: {_us(times[chosen])} in all {where}{others} ({timings.conditions})", *stay]),
    )


def _retyped(plan: Plan, timings: CpuTimings, *, bf16: str | None) -> Plan:
    """Return the plan in which layers left to `auto` have the fastest type of those that accuracy allows.

    `bf16` says in words why bf16 may be taken, None where it may not.
    """
    result = plan.branch()
    for layer in result.layers:
        asked, now = layer.precision.asked, layer.precision.dtype
        if asked != "auto":
            continue
        times, density = timings.layers[layer.name], block_density(result, layer)
        if times.shape.is_conv:
            if now == "int8":
                reason = "fp32: ONNX Runtime does not run a convolution like this in int8"
                layer.precision = PrecisionDecision(
                    asked=asked, dtype="fp32", sqnr_db=layer.precision.sqnr_db, reason=reason
                )
            continue
        least = _times_by_type(layer, times, density, bf16=bf16 is not None)
        best = _best(least, "bf16")
        if best == now:
            continue
        why = (
            f"{best}: {_us(least[best])}, {now} takes {_us(float(times.least_us(now, density)))} ({timings.conditions})"
        )
        if best == "bf16":
            why += f"; {bf16}"
        layer.precision = PrecisionDecision(
            asked=asked, dtype=_plan_type(best), sqnr_db=layer.precision.sqnr_db, reason=why
        )
    return result


def _times_by_type(layer: LayerPlan, times: LayerTimes, density: float, *, bf16: bool) -> dict[ElementType, float]:
    """Return the least microseconds in each type that a layer may have: `auto` may go back from int8 to a wider one."""
    decided = layer.precision.dtype
    allowed: list[ElementType] = [decided]
    if layer.precision.asked == "auto":
        allowed = ["int8", "fp32"] if decided == "int8" else ["fp32"]
        allowed += ["bf16"] if bf16 else []
    return {dtype: float(times.least_us(dtype, density)) for dtype in allowed if times.usable(dtype)}


def _best(times: Mapping[_Name, float], rounding: _Name) -> _Name:
    """Return the fastest; the one that rounds to bf16 only if it is worth it."""
    others = {name: time for name, time in times.items() if name != rounding}
    best = min(others, key=others.__getitem__)
    return rounding if times.get(rounding, float("inf")) < (1 - _WORTH) * others[best] else best


def _us(time: float) -> str:
    return f"{time:.0f} µs" if time >= 20 else f"{time:.1f} µs"


def _uses_bf16(plan: Plan) -> bool:
    attention = plan.attention.kernel == "lsp" and plan.attention.compute == "bf16"
    return attention or any(layer.precision.dtype == "bf16" for layer in plan.layers)


def _taken_back(without: Plan, taken: Plan, words: str) -> Plan:
    """Return the plan without bf16, each layer that would have had it with the reason."""
    for layer, other in zip(without.layers, taken.layers, strict=True):
        if other.precision.dtype == "bf16" and layer.precision.dtype != "int8":
            layer.precision.reason = f"{layer.precision.dtype}: {words}"
    if taken.attention.compute == "bf16":
        without.attention.reason += f"; {words}"
    return without


def _plan_type(dtype: ElementType) -> Literal["fp32", "fp16", "bf16", "int8"]:
    assert dtype in ("fp32", "fp16", "bf16", "int8")
    return dtype
