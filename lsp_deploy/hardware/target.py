"""Targets: what the hardware is, one TOML file each; users bring their own the same way.

The shipped ones are in `targets/` beside this file, every figure with its source in a comment.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lsp_deploy.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from lsp_deploy.passes.validate_target import TargetRules

__all__ = [
    "BuilderName",
    "Kernels",
    "Pays",
    "Peak",
    "Target",
    "list_targets",
    "load_target",
]

ElementType = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4"]
MatrixUnit = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"]
BuilderName = Literal["tensorrt_rtx", "tensorrt", "onnxruntime"]

# INT4 is a storage type: TensorRT multiplies the dequantized weights in the compute type.
_STORED_ONLY = frozenset({"int4"})
_FOLDER = Path(__file__).parent / "targets"
_NOT_INHERITED = ("name", "title", "aliases")
_FILLED_IN = ("model", "engine", "build_flags", "run_flags")
_TRTEXEC = r"""
trtexec --onnx={model} --saveEngine={engine} \
    {build_flags}
trtexec --loadEngine={engine} --useCudaGraph {run_flags}
"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Peak(_Strict):
    """Peak rate of one matrix unit, in TFLOP/s or TOP/s (a multiply-add counts as two)."""

    dense: float = Field(gt=0, description="peak rate on dense operands, TFLOP/s or TOP/s")
    sparse24: float | None = Field(None, gt=0, description="peak rate on 2:4 weights; none where there is no such unit")
    pj_per_flop: float | None = Field(
        None,
        gt=0,
        description="energy of one dense FLOP at full load, pJ, where measured; else tdp_w over the peak rate",
    )

    @model_validator(mode="after")
    def _sparse_is_faster(self) -> Peak:
        if self.sparse24 is not None and self.sparse24 <= self.dense:
            raise ValueError(f"sparse24 = {self.sparse24:g} is not above dense = {self.dense:g}; leave it out")
        return self


class Kernels(_Strict):
    """How matrix kernels use the hardware: the constants of the cost model (`cost_model.py` has its formula)."""

    tile_m: int = Field(64, gt=0, description="rows of x that one tile computes: B_m of LSP's Eq. 7")
    tile_n: list[int] = Field([64, 32], min_length=1, description="columns of y that one tile may compute")
    overhead_k: float = Field(
        80, ge=0, description="what starting and ending a tile costs, in steps of K in the compute type"
    )
    dense_efficiency: float = Field(0.6, gt=0, le=1, description="fraction of the dense peak that dense kernels reach")
    sparse24_efficiency: float = Field(0.37, gt=0, le=1, description="fraction of the 2:4 peak that 2:4 kernels reach")
    block_efficiency: float = Field(
        0.48, gt=0, le=1, description="fraction of the dense peak that block-sparse kernels reach on what survives"
    )
    source: str = Field(
        "fitted to a model of block-sparse kernels and to published 2:4 speedups, not measured",
        min_length=1,
        description="where these figures come from, as a clause for the report",
    )

    @field_validator("tile_n")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("a tile has at least one column")
        return value


class Pays(_Strict):
    """From where on zeros make a layer faster on this target. A figure that is left out: they never do."""

    sparse24_min_k: int | None = Field(None, gt=0, description="smallest K of W [K, N] from which 2:4 zeros pay")
    sparse24_min_n: int | None = Field(None, gt=0, description="smallest N of W [K, N] from which 2:4 zeros pay")
    source: str = Field(min_length=1, description="where the 2:4 figures come from, as a clause for the report")
    block_zeros_min: float | None = Field(
        None, gt=0, lt=1, description="fraction of zero blocks from which a layer pays, blocks 32 or more wide"
    )
    block_zeros_min_16: float | None = Field(
        None, gt=0, lt=1, description="fraction of zero blocks from which a layer pays, blocks 16 wide"
    )
    block_source: str = Field(min_length=1, description="where the block figures come from, as a clause for the report")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Pays:
        if (self.sparse24_min_k is None) != (self.sparse24_min_n is None):
            raise ValueError("sparse24_min_k and sparse24_min_n belong together; give both or neither")
        return self


class Target(_Strict):
    """One piece of hardware: what it computes, how fast, who builds for it, and where zeros pay."""

    name: str = Field(description="what is typed after --target and written into file names")
    title: str = Field(description="the name its maker gave it")
    aliases: list[str] = Field(default_factory=list, description="other names it is found by")
    kind: Literal["gpu", "cpu"] = Field(description="gpu or cpu")
    architecture: str = Field(description="the maker's name for the generation, for people")
    compute_capability: str | None = Field(
        None, pattern=r"^\d+\.\d$", description='CUDA compute capability, e.g. "8.0"; GPUs only'
    )
    builders: list[BuilderName] = Field(
        min_length=1, description="what can build its engines, the preferred first: tensorrt_rtx, tensorrt, onnxruntime"
    )
    tensorrt: str | None = Field(None, description='TensorRT releases that serve it, e.g. ">=10.15"')
    compute_type: Literal["fp32", "fp16"] = Field(description="what everything not quantized computes in")
    types: list[ElementType] = Field(
        min_length=1, description="element types that a model for it may hold (int4: weights only)"
    )
    max_opset: int = Field(ge=17, description="highest opset of the default domain that its parser takes")
    memory_gb: float | None = Field(None, gt=0, description="device memory, GB")
    bandwidth_gb_s: float | None = Field(None, gt=0, description="peak memory bandwidth, GB/s")
    tdp_w: float | None = Field(None, gt=0, description="power limit of the board or module, W")
    sm_count: int | None = Field(None, gt=0, description="streaming multiprocessors (wave quantization)")
    boost_mhz: int | None = Field(None, gt=0, description="clock at which the peak rates are stated, MHz")
    launch_us: float | None = Field(None, gt=0, description="time that one more kernel in a captured graph costs, µs")
    peak: dict[MatrixUnit, Peak] = Field(
        default_factory=dict, description="peak rate by matrix unit: fp32, tf32, fp16, bf16, int8, fp8, fp4"
    )
    kernels: Kernels = Field(
        default_factory=Kernels, description="how matrix kernels use it: the cost model's constants"
    )
    pays: Pays = Field(description="from where on zeros make a layer faster")
    build_on_device: bool = Field(False, description="true where no other machine can build its engines")
    device_commands: str = Field(
        _TRTEXEC,
        description="what to run on the device, with {model}, {engine}, {build_flags} and {run_flags} to fill in",
    )
    notes: str = Field("", description="what a user of this target should know, a sentence or two")

    @field_validator("name", "aliases")
    @classmethod
    def _typeable(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or name.endswith(".toml"):
                raise ValueError(f"a name is made of lower-case letters, digits, '-' and '.'; got {name!r}")
        return value

    @field_validator("device_commands")
    @classmethod
    def _fillable(cls, value: str) -> str:
        for name in re.findall(r"(?<!\$)\{(\w+)\}", value):  # braces may be the shell's own
            near = difflib.get_close_matches(name, _FILLED_IN, n=1, cutoff=0.7)
            if near and name not in _FILLED_IN:
                raise ValueError(f"{{{name}}} is not filled in; did you mean {{{near[0]}}}?")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        if self.compute_type not in self.types:
            raise ValueError(f"compute_type is {self.compute_type}, which is not among types: {', '.join(self.types)}")
        if self.kind == "gpu":
            needed = ("compute_capability", "memory_gb", "bandwidth_gb_s", "tdp_w", "sm_count", "launch_us")
            absent = [name for name in needed if getattr(self, name) is None]
            absent += [f"peak.{name}" for name in self.types if name not in _STORED_ONLY and name not in self.peak]
            if absent:
                raise ValueError(f"a GPU target also needs {', '.join(absent)}")
        if self.build_on_device and not self.device_commands:
            raise ValueError("build_on_device needs device_commands: what to run there")
        return self

    @property
    def sha256(self) -> str:
        """Hash of everything the target says, in hex: two targets of one hash decide alike."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def rules(self) -> TargetRules:
        """Return what a model for this target must keep to."""
        from lsp_deploy.passes.validate_target import TargetRules

        return TargetRules(
            name=self.name,
            max_opset=self.max_opset,
            types=frozenset(self.types),
            tensorrt=self.kind == "gpu",
            compute_capability=self.compute_capability,
        )

    def commands_on_device(
        self,
        model: str = "model.onnx",
        engine: str = "model.engine",
        *,
        shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        sparse_weights: bool = False,
        plugins: Sequence[str] = (),
        build_flags: Sequence[str] = (),
        run_flags: Sequence[str] = (),
    ) -> str:
        """Return the commands that build and time an engine on the device itself, ready to paste into a shell.

        Args:
            model: path of the ONNX file there.
            engine: path of the engine to write.
            shapes: "min", "opt" and "max" input shapes by name; none for a model whose shapes are all fixed.
            sparse_weights: let TensorRT use its 2:4 kernels.
            plugins: paths of plugin libraries there.
            build_flags: further flags of trtexec as it builds.
            run_flags: further flags of trtexec as it runs the engine.
        """
        libraries = [f"--dynamicPlugins={plugin}" for plugin in plugins]
        build, run = ["--stronglyTyped", *libraries, *build_flags], [*libraries, *run_flags]
        if sparse_weights:
            build.append("--sparsity=enable")
        if shapes:
            build += [f"--{bound}Shapes={_trtexec_shapes(shapes[bound])}" for bound in ("min", "opt", "max")]
            run.append(f"--shapes={_trtexec_shapes(shapes['opt'])}")
        filled = {"model": [model], "engine": [engine], "build_flags": build, "run_flags": run}
        text = re.sub(rf"\{{({'|'.join(_FILLED_IN)})\}}", lambda m: shlex.join(filled[m[1]]), self.device_commands)
        return "\n".join(line.rstrip() for line in text.strip().splitlines())


def load_target(name_or_path: str) -> Target:
    """Return the target of that name or alias, or the one a TOML file describes.

    Case does not matter, nor whether words are joined by `-` or `_`. What contains a slash or ends with `.toml` is
    a path, anything else is a name. A file may say `base = "a100"` and only what differs.

    Raises:
        UserError: no target of that name (with the nearest), or a file that is not a valid target.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        path = Path(name_or_path)
        return _validated(_read(path), path)
    found = _names().get(_normal(name_or_path))
    if found is None:
        raise UserError(
            f"unknown target {name_or_path!r}{_did_you_mean(name_or_path)}; `lsp-deploy targets` lists all, "
            "and a path to a .toml names your own"
        )
    return _shipped(found)


def list_targets() -> list[Target]:
    """Return the shipped targets: GPUs by name, then the CPU."""
    targets = [_shipped(name) for name in _tables()]
    return sorted(targets, key=lambda target: (target.kind != "gpu", target.name))


def _normal(name: str) -> str:
    return name.strip().casefold().replace("_", "-").replace(" ", "-")


@cache
def _tables() -> dict[str, dict[str, Any]]:
    """Return what the shipped files say, by name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.toml"))}


@cache
def _names() -> dict[str, str]:
    """Return the shipped name by name and alias."""
    return {alias: name for name, table in _tables().items() for alias in (name, *table.get("aliases", ()))}


def _did_you_mean(name: str) -> str:
    wanted, names = _normal(name), _names()
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    near += [alias for alias in names if wanted and wanted in alias]
    nearest = list(dict.fromkeys(names[alias] for alias in near))[:3]
    return f"; the nearest are {', '.join(nearest)}" if nearest else ""


@cache
def _shipped(name: str) -> Target:
    return _validated(_tables()[name], _FOLDER / f"{name}.toml")


def _validated(table: Mapping[str, Any], path: Path) -> Target:
    values = _with_base(table, path)
    values.setdefault("name", _normal(path.stem))
    values.setdefault("title", values["name"])
    try:
        return Target.model_validate(values)
    except ValidationError as error:
        raise UserError(f"target {path}: {_one_line(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"target {path} does not exist; `lsp-deploy targets` lists those that come along") from error
    except OSError as error:
        raise UserError(f"cannot read target {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"target {path} is not a text file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"target {path} is not valid TOML: {error}") from error


def _with_base(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return `table` with what its `base`, a shipped target, says beyond it."""
    values = dict(table)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or _normal(base) not in _names():
        raise UserError(f"target {path}: base is the name of a target that comes along with this tool; got {base!r}")
    inherited = _with_base(_tables()[_names()[_normal(base)]], path)
    return _merge({key: value for key, value in inherited.items() if key not in _NOT_INHERITED}, values)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `over` on top, table by table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _one_line(error: ValidationError) -> str:
    """Say which field is wrong, what is expected there, and what was found."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt field, then the rest
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    message = first["msg"].removeprefix("Value error, ")
    table = _table_of(first["loc"])
    field = str(first["loc"][-1]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, table.model_fields, n=1)
        return f"there is no field {where!r}; " + (
            f"did you mean {near[0]}?" if near else f"the fields are {', '.join(table.model_fields)}"
        )
    expected = table.model_fields[field].description if field in table.model_fields else None
    if first["type"] == "missing":
        return f"{where} is missing: {expected}"
    found = f"; got {first['input']!r}" if not isinstance(first["input"], dict) else ""
    return ": ".join(part for part in (where, message) if part) + found + (f" ({expected})" if expected else "")


def _table_of(location: tuple[int | str, ...]) -> type[BaseModel]:
    tables: dict[int | str, type[BaseModel]] = {"peak": Peak, "pays": Pays, "kernels": Kernels}
    return tables.get(location[0], Target) if len(location) > 1 else Target


def _trtexec_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(str(size) for size in shape)}" for name, shape in shapes.items())
