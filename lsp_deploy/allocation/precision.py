"""Which element type each layer computes in, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.plan import PrecisionDecision
from lsp_deploy.sensitivity.quantization import (
    ComputeType,
    activation_grid,
    fake_quantize,
    output_sqnr_db,
    weight_scale,
)

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.sensitivity.activations import ActivationStatistics

__all__ = ["COMPRESSIBLE_ROLES", "SQNR_THRESHOLD_DB", "decide_precision", "without_int8"]

# The linear layers inside transformer blocks. Patch embedding, head and anything unrecognised stay in the compute type.
COMPRESSIBLE_ROLES = frozenset({"qkv", "proj", "fc1", "fc2"})

# A layer below this loses more than a tenth of its output's amplitude to rounding.
SQNR_THRESHOLD_DB = 20.0

_ROLE_NAMES = {"patch": "the patch embedding", "head": "the head", "other": "a layer outside attention and MLP"}


def decide_precision(
    layer: LinearLayer,
    weight: NDArray[np.float32],
    statistics: ActivationStatistics,
    *,
    asked: str,
    compute_type: ComputeType,
    int8_on_target: bool,
) -> PrecisionDecision:
    """Decide one layer's element type from its measured signal to quantization noise ratio.

    Args:
        layer: the linear layer.
        weight: W [K, N].
        statistics: of the layer's input.
        asked: auto, fp32, fp16, bf16 or int8.
        compute_type: of everything that is not quantized.
        int8_on_target: whether the target multiplies int8.
    """

    def stays(reason: str, sqnr_db: float | None = None) -> PrecisionDecision:
        return PrecisionDecision(asked=asked, dtype=compute_type, sqnr_db=sqnr_db, reason=reason)

    if asked == "bf16" and compute_type == "fp32":  # on a CPU, where an operator of its own multiplies in bf16
        if layer.node.op_type == "Conv":
            return stays("fp32: a convolution, which the bf16 operator does not do")
        return PrecisionDecision(asked=asked, dtype="bf16", reason="asked for: --precision bf16")
    if asked not in ("auto", "int8"):
        return stays(f"asked for: --precision {asked}")
    if not int8_on_target:
        return stays(f"{compute_type}: the target has no int8 matrix unit")
    if layer.role not in COMPRESSIBLE_ROLES:
        return stays(f"{compute_type}: {_ROLE_NAMES[layer.role]} is not quantized by default, it costs accuracy")
    grid = activation_grid(statistics.histogram, compute_type)
    quantized = grid.rounded(statistics.rows) @ fake_quantize(weight, weight_scale(weight, compute_type))
    sqnr_db = round(min(output_sqnr_db(statistics.rows, weight, quantized), 200.0), 2)
    if asked == "auto" and sqnr_db < SQNR_THRESHOLD_DB:
        reason = f"{compute_type}: int8 would leave {sqnr_db:.1f} dB of signal to noise, below {SQNR_THRESHOLD_DB:g} dB"
        return stays(reason, sqnr_db)
    if asked == "auto":
        reason = f"int8: the output keeps {sqnr_db:.1f} dB of signal to noise (threshold {SQNR_THRESHOLD_DB:g} dB)"
    elif sqnr_db < SQNR_THRESHOLD_DB:
        reason = (
            f"asked for: --precision int8, though only {sqnr_db:.1f} dB of signal to noise are left; auto would not"
        )
    else:
        reason = f"asked for: --precision int8; the output keeps {sqnr_db:.1f} dB of signal to noise"
    return PrecisionDecision(
        asked=asked,
        dtype="int8",
        activation_scale=grid.scale,
        activation_offset=grid.offset,
        sqnr_db=sqnr_db,
        reason=reason,
    )


def without_int8(
    decision: PrecisionDecision, compute_type: Literal["fp32", "fp16", "bf16"], allowed: str
) -> PrecisionDecision:
    """Return the decision taken back because the loss budget, in words, does not allow it."""
    reason = f"{compute_type}: int8 here would exceed {allowed} on held-out images"
    return PrecisionDecision(asked=decision.asked, dtype=compute_type, sqnr_db=decision.sqnr_db, reason=reason)
