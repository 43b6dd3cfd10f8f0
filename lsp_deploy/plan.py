"""The plan: what was decided for every linear layer, and why. The one thing that passes read.

`plan.json` holds decisions, reasons and hashes: diffable, editable by hand. `plan.safetensors` beside it holds
what the decisions need to be carried out again without calibration data: masks, weight scales and changed weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lsp_deploy.data.preprocess import Preprocess
from lsp_deploy.errors import UserError
from lsp_deploy.files import atomic_path, sha256_of, write_text

__all__ = [
    "AttentionDecision",
    "ExecutionDecision",
    "Kernel",
    "LayerPlan",
    "Pattern",
    "Plan",
    "PrecisionDecision",
    "RecoveryDecision",
    "SparsityDecision",
    "load_plan",
    "save_plan",
]

Kernel = Literal["engine", "block_sparse", "gather", "qgemm"]
Pattern = Literal["dense", "2:4", "block"]
_CONSTANT = "constant:"  # before the place of a constant, in plan.safetensors


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SparsityDecision(_Strict):
    """Which zeros a layer's weight gets."""

    asked: str = Field(description="what the recipe asked for: auto, none, 2:4 or block")
    pattern: Pattern = "dense"
    zeros: float = Field(0.0, ge=0, le=1, description="fraction of the weight's entries that the pattern makes zero")
    method: str | None = Field(None, description="score the mask was chosen by, e.g. magnitude or activation")
    reason: str = Field(description="why this and not more, in words for the report")


class RecoveryDecision(_Strict):
    """What was done to the surviving weights of a layer, so that the network loses less."""

    method: Literal["none", "reconstruct"] = "none"
    fits: Literal["layer output", "residual stream"] | None = Field(
        None, description="reconstruct: what of the dense model the new weights fit"
    )
    ridge: float | None = Field(None, description="strength of the pull to the old weights, in mean input energies")
    error_before: float | None = Field(
        None,
        description="relative squared error of what is fitted, on samples held out from the fit (on those fitted to, "
        "where there are too few), before it",
    )
    error_after: float | None = Field(None, description="the same after it")
    reason: str = Field("nothing was pruned", description="why this, in words for the report")


class PrecisionDecision(_Strict):
    """Which element type a layer computes in."""

    asked: str = Field(description="what the recipe asked for: auto, fp32, fp16, bf16 or int8")
    dtype: Literal["fp32", "fp16", "bf16", "int8"]
    activation_scale: float | None = Field(None, gt=0, description="int8: scale of the layer's input, one per tensor")
    activation_offset: float = Field(0.0, description="int8: subtracted from the input first, to center it on zero")
    sqnr_db: float | None = Field(None, description="measured signal to quantization noise of the layer's output, dB")
    reason: str


class ExecutionDecision(_Strict):
    """What multiplies a layer's matrices."""

    kernel: Kernel = Field(
        "engine",
        description="engine: its own MatMul; block_sparse: lsp::BlockSparseLinear, which skips zero blocks and takes "
        "in what follows the layer; gather: standard operators that skip them; qgemm: int8 in the form that ONNX "
        "Runtime runs in int8 on CPUs",
    )
    times_us: dict[str, float] = Field(
        default_factory=dict, description="what each candidate took for the layer's shape, measured on this machine, µs"
    )
    threads: int | None = Field(None, description="that the candidates were timed with")
    reason: str = Field("left to the engine", description="why this, in words for the report")


class AttentionDecision(_Strict):
    """What computes softmax(scale · q kᵀ) v, in all layers of the network."""

    kernel: Literal["engine", "lsp"] = Field(
        "engine", description="engine: the operators as exported; lsp: lsp::Attention, one operator for them all"
    )
    compute: Literal["fp32", "bf16"] = Field("fp32", description="lsp: what its products are computed in")
    times_us: dict[str, float] = Field(
        default_factory=dict,
        description="what each candidate took in all layers that the operator computes, measured on this machine, µs",
    )
    threads: int | None = Field(None, description="that the candidates were timed with")
    left: dict[str, str] = Field(
        default_factory=dict, description="why others stay as exported, by the name of their Softmax or Attention"
    )
    reason: str = Field("left to the engine", description="why this, in words for the report")


class LayerPlan(_Strict):
    """The decisions for one linear layer; `name` is its node's name in the canonical graph."""

    name: str
    role: str
    block: int | None = Field(None, description="index of the transformer block, from 0")
    K: int
    N: int
    M: int = Field(description="rows of the layer's input at the opt shapes")
    sparsity: SparsityDecision
    precision: PrecisionDecision
    recovery: RecoveryDecision = Field(default_factory=RecoveryDecision)
    execution: ExecutionDecision = Field(default_factory=ExecutionDecision)

    @property
    def flops(self) -> int:
        """Dense FLOPs at the opt shapes: 2·M·K·N."""
        return 2 * self.M * self.K * self.N


class Plan(_Strict):
    """All decisions about one model for one target."""

    format: Literal["lsp-deploy.plan.v1"] = "lsp-deploy.plan.v1"
    tool_version: str
    model_sha256: str = Field(description="of the input model's file")
    target: str
    compute_type: Literal["fp32", "fp16", "bf16"] = Field(description="what everything not quantized computes in")
    opset: int = Field(description="default-domain opset of the model that the plan gives")
    io_types: Literal["keep", "target"] = "keep"
    block_shape: tuple[int, int] | None = Field(None, description="block_k × block_n, where pattern is block")
    recipe: dict[str, Any] = Field(default_factory=dict, description="the recipe as replayed by --recipe")
    preprocess: Preprocess | None = Field(None, description="what --preprocess said: it goes into the model's metadata")
    layers: list[LayerPlan]
    attention: AttentionDecision = Field(default_factory=AttentionDecision)
    tensors_sha256: str | None = Field(None, description="of plan.safetensors")

    _masks: dict[str, NDArray[np.bool_]] = PrivateAttr(default_factory=dict)
    _weight_scales: dict[str, NDArray[np.float32]] = PrivateAttr(default_factory=dict)
    _weights: dict[str, NDArray[np.float32]] = PrivateAttr(default_factory=dict)
    _biases: dict[str, NDArray[np.float32]] = PrivateAttr(default_factory=dict)
    _constants: dict[str, NDArray[np.float32]] = PrivateAttr(default_factory=dict)

    @property
    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """By layer name: bool [K, N], True where the weight survives. Dense layers have none."""
        return self._masks

    @property
    def weight_scales(self) -> dict[str, NDArray[np.float32]]:
        """By layer name: float32 [N], symmetric int8 scale of each output column. Layers not quantized have none."""
        return self._weight_scales

    @property
    def weights(self) -> dict[str, NDArray[np.float32]]:
        """By layer name: float32 [K, N], the weight in place of the dense one. Layers not changed have none."""
        return self._weights

    @property
    def biases(self) -> dict[str, NDArray[np.float32]]:
        """By layer name: float32 [N], the bias in place of the dense one. Layers not changed have none."""
        return self._biases

    @property
    def constants(self) -> dict[str, NDArray[np.float32]]:
        """By `node:input`, the node's name and the index of its input: float32, what takes that constant's place."""
        return self._constants

    def branch(self) -> Plan:
        """Return a copy whose decisions can be changed freely; the arrays are shared."""
        copy = self.model_copy(update={"layers": [layer.model_copy(deep=True) for layer in self.layers]})
        copy._masks = dict(self._masks)
        copy._weight_scales = dict(self._weight_scales)
        copy._weights = dict(self._weights)
        copy._biases = dict(self._biases)
        copy._constants = dict(self._constants)
        return copy

    def layer(self, name: str) -> LayerPlan:
        """Return the plan of one layer; KeyError if it has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan` to `path` (plan.json) and its tensors to plan.safetensors beside it, atomically."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {}
    for name, mask in plan.masks.items():
        tensors[f"{name}.mask"] = np.packbits(mask, axis=None)
    for kind, arrays in (("weight_scale", plan.weight_scales), ("weight", plan.weights), ("bias", plan.biases)):
        for name, array in arrays.items():
            tensors[f"{name}.{kind}"] = np.ascontiguousarray(array)
    for place, array in plan.constants.items():
        tensors[f"{_CONSTANT}{place}"] = np.ascontiguousarray(array)
    with atomic_path(path.with_suffix(".safetensors")) as temporary:
        temporary.write_bytes(save(tensors))
        plan.tensors_sha256 = sha256_of(temporary)
    write_text(path, plan.model_dump_json(indent=1) + "\n")


def load_plan(path: Path) -> Plan:
    """Read a plan and, where it is still there, its plan.safetensors.

    Raises:
        UserError: not a plan of this tool, or tensors that do not belong to it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        plan = Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read plan {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"plan {path} is not a text file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UserError(f"plan {path} is not valid at {where}: {first['msg']}") from error
    tensors_path = path.with_suffix(".safetensors")
    if not tensors_path.exists():
        return plan
    if plan.tensors_sha256 is not None and sha256_of(tensors_path) != plan.tensors_sha256:
        raise UserError(f"{tensors_path} does not belong to {path.name}: its hash differs; restore it or remove it")
    try:
        tensors = load_file(tensors_path)
        for layer in plan.layers:
            if (bits := tensors.get(f"{layer.name}.mask")) is not None:
                mask = np.unpackbits(bits, count=layer.K * layer.N).astype(bool).reshape(layer.K, layer.N)
                plan.masks[layer.name] = mask
            if (scale := tensors.get(f"{layer.name}.weight_scale")) is not None:
                plan.weight_scales[layer.name] = scale.astype(np.float32).reshape(layer.N)
            if (weight := tensors.get(f"{layer.name}.weight")) is not None:
                plan.weights[layer.name] = weight.astype(np.float32).reshape(layer.K, layer.N)
            if (bias := tensors.get(f"{layer.name}.bias")) is not None:
                plan.biases[layer.name] = bias.astype(np.float32).reshape(layer.N)
        for name, array in tensors.items():
            if name.startswith(_CONSTANT):
                plan.constants[name.removeprefix(_CONSTANT)] = array.astype(np.float32)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{tensors_path} does not belong to {path.name}: {error}") from error
    return plan


def plan_schema() -> str:
    """Return the JSON schema of plan.json."""
    return json.dumps(Plan.model_json_schema(), indent=1) + "\n"
