"""The recipe: what the user asked for. One declaration gives flags, TOML keys, validation and documentation.

Three layers, the first that says something wins: a flag, a file typed with `--recipe`, and the `lsp-deploy.toml`
beside the model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lsp_deploy.errors import UserError
from lsp_deploy.files import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "AMOUNTS",
    "BLOCK_SHAPES",
    "FOUND_RECIPE",
    "PATH_KEYS",
    "Recipe",
    "merge_recipe",
    "read_recipe_file",
    "save_recipe_file",
]

FOUND_RECIPE = "lsp-deploy.toml"
BLOCK_SHAPES = ("16x16", "16x32", "32x16", "32x32", "32x64", "64x32", "64x64")
NAMED_DATA = ("synthetic", "random")
# Labels are of the data they were named with, block shape and FLOPs of the sparsity.
_BELONGS_TO = {
    "calibration_data": ("labels",),
    "eval_data": ("eval_labels",),
    "sparsity": (
        "block",
        "flops",
        "flops_of",
        "max_latency_ms",
        "max_energy_mj",
        "max_parameters",
        "max_size_mb",
        "min_density",
        "prefer_structure",
    ),
}
# How much block sparsity removes: each is a budget in a unit of its own.
AMOUNTS = ("flops", "max_latency_ms", "max_energy_mj", "max_parameters", "max_size_mb")
PATH_KEYS = ("calibration_data", "labels", "eval_data", "eval_labels")


class Recipe(BaseModel):
    """What `compress` was asked to do; every field is a flag (`max_drop` is `--max-drop`) and a TOML key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(description="Name of a target (see `lsp-deploy targets`) or a TOML file.")
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8", "int4", "fp8"] = Field(
        "auto",
        description="Element type of the transformer's linear layers. auto: int8 where the target has it and each "
        "layer's signal to quantization noise allows, else the target's compute type; on cpu the fastest of int8, bf16 "
        "and fp32 that the budget allows.",
    )
    sparsity: Literal["auto", "none", "2:4", "block"] = Field(
        "auto",
        description="Zeros. auto: 2:4 layer by layer, or blocks, where they pay and the budget allows.",
    )
    block: str | None = Field(
        None, description="Block shape block_k x block_n on W [K, N], for --sparsity block.  [default: 32x32]"
    )
    flops: float | None = Field(
        None,
        description="Fraction of the dense FLOPs that may remain, 0 to 1.  [default: as far as the budget allows]",
    )
    flops_of: Literal["linear", "model"] = Field(
        "linear", description="What --flops counts: all linear layers, or attention's matmuls too."
    )
    max_drop: float | None = Field(
        None,
        description="Points of top-1 that `auto` may lose on the held-out images; typed, it bounds the total.  "
        "[default: 1.0]",
    )
    calibration_data: str | None = Field(
        None,
        description="Folder, .tar, .tar.gz, .npz or .npy of images; or `synthetic`, or `random`.  [default: synthetic]",
    )
    labels: str | None = Field(None, description="CSV with filename,class_index for the calibration data.")
    label_column: str | None = Field(None, description="Column of the label files to use instead of class_index.")
    eval_data: str | None = Field(
        None, description="Images that fidelity is measured on.  [default: every fifth calibration image is held out]"
    )
    eval_labels: str | None = Field(None, description="CSV with filename,class_index for --eval-data.")
    samples: int | None = Field(
        None, description="Images to use of those named.  [default: 512; 64 for synthetic and random]"
    )
    preprocess: str | None = Field(
        None,
        description="imagenet, inception, clip, siglip, none, or a TOML file.  "
        "[default: from the model's metadata, else imagenet]",
    )
    min_shapes: str | None = Field(
        None, description="Smallest input shapes, as x:1x3x224x224,y:1x77.  [default: batch 1]"
    )
    opt_shapes: str | None = Field(
        None, description="Shapes that engines are tuned for and estimates are at.  [default: batch 8]"
    )
    max_shapes: str | None = Field(None, description="Largest input shapes.  [default: batch 32]")
    recover: Literal["none", "reconstruct", "finetune"] | None = Field(
        None,
        description="How lost accuracy is won back: reconstruct solves for the surviving weights layer by layer, "
        "without training.  [default: reconstruct with real calibration data, else none]",
    )
    basis: Literal["keep", "change"] | None = Field(
        None,
        description="Let hidden channels change their basis before pruning: the model computes the same, and its zeros "
        "cost less.  [default: change where weights are reconstructed]",
    )
    objective: Literal["loss", "top1", "pseudo", "output"] | None = Field(
        None,
        description="What block scores differentiate: loss (with labels), top1 (against the dense model's own answer), "
        "pseudo (a sampled class), output (a random projection of all outputs).  "
        "[default: loss with labels, else top1; output for a model without class scores]",
    )
    allocator: Literal["exact", "lsp"] = Field(
        "exact",
        description="How zeros are dealt out to layers: exact (one price for all), or lsp (Eq. 11 of the paper).",
    )
    power_weight: float = Field(1.0, description="Weight of the power term, for --allocator lsp; 0 leaves it out.")
    search: Literal["auto", "one-shot", "gradual"] = Field(
        "auto",
        description="one-shot prunes once; gradual in steps, scores and weights renewed at each. "
        "auto: one-shot where the predicted damage is small.",
    )
    max_latency_ms: float | None = Field(
        None,
        description="Block sparsity: largest latency of all linear layers on the target at the opt shapes, ms; "
        "estimated, on cpu measured.",
    )
    max_energy_mj: float | None = Field(
        None, description="Block sparsity: largest estimated energy of an inference at the opt shapes, mJ."
    )
    max_parameters: int | None = Field(
        None, description="Block sparsity: most entries of all linear layers' weights that may be other than zero."
    )
    max_size_mb: float | None = Field(
        None, description="Block sparsity: largest size of the linear layers' surviving weights in the file, MB."
    )
    min_density: float = Field(0.0, description="Smallest fraction of its blocks that a layer keeps, 0 to 1.")
    exclude: str | None = Field(None, description="Regular expression; layers whose name it finds are not pruned.")
    prefer_structure: bool = Field(
        False, description="Prefer to remove whole neurons and attention heads, which leave the graph for good."
    )
    io_types: Literal["keep", "target"] = Field(
        "keep", description="Element types of the model's inputs and outputs: as they were, or the target's."
    )
    seed: int = Field(
        0,
        description="Seed of everything that draws; the same command gives the same bytes, where layers are timed from "
        "the same times.",
    )

    @field_validator("exclude")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is a regular expression; got {value!r}: {error}") from error
        return value

    @field_validator("min_density", "power_weight")
    @classmethod
    def _not_negative(cls, value: float) -> float:
        if not 0 <= value < float("inf"):
            raise ValueError(f"is a number of 0 or more; got {value:g}")
        return value

    @field_validator("max_latency_ms", "max_energy_mj", "max_parameters", "max_size_mb")
    @classmethod
    def _above_zero(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"is a number above 0; got {value:g}")
        return value

    @field_validator("flops")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"is the fraction of FLOPs that remains, above 0 and at most 1; got {value:g}")
        return value

    @field_validator("max_drop")
    @classmethod
    def _points(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 100:
            raise ValueError(f"is in points of top-1, 0 to 100; got {value:g}")
        return value

    @field_validator("samples")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"must be at least 1; got {value}")
        return value

    @field_validator("block")
    @classmethod
    def _known_block(cls, value: str | None) -> str | None:
        if value is not None and value not in BLOCK_SHAPES:
            raise ValueError(f"is one of {', '.join(BLOCK_SHAPES)}; got {value}")
        return value

    @field_validator("min_shapes", "opt_shapes", "max_shapes")
    @classmethod
    def _parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse_shapes(value)
        return value

    @model_validator(mode="after")
    def _flags_that_need_each_other(self) -> Recipe:
        data = self.calibration_data or "synthetic"
        checks = (
            (self.precision == "int4", "--precision int4 comes with a later version; use int8, fp16 or auto"),
            (self.precision == "fp8", "--precision fp8 comes with a later version; use int8, fp16 or auto"),
            (
                self.recover == "finetune",
                "--recover finetune comes with a later version; use reconstruct or none",
            ),
            *self._checks_of_pruning(),
            (
                self.block is not None and self.sparsity != "block",
                f"--block is for --sparsity block, not for --sparsity {self.sparsity}; leave one of them out",
            ),
            (
                self.flops is not None and self.flops < 1 and self.sparsity == "none",
                f"--flops {self.flops} needs zeros, and --sparsity none allows none; leave one of them out"
                if self.flops is not None
                else "",
            ),
            (self.flops_of == "model" and self.flops is None, "--flops-of model says how --flops counts; give --flops"),
            (
                self.labels is not None and data in NAMED_DATA,
                f"--labels needs images: {data} data has no labels; name images with --calibration-data",
            ),
            (self.eval_labels is not None and self.eval_data is None, "--eval-labels needs --eval-data"),
            (
                self.label_column is not None and self.labels is None and self.eval_labels is None,
                "--label-column names a column of --labels or --eval-labels; give one of them",
            ),
            (self.eval_data in NAMED_DATA, f"--eval-data {self.eval_data} says nothing about accuracy; name images"),
        )
        for wrong, message in checks:
            if wrong:
                raise ValueError(message)
        return self

    def _checks_of_pruning(self) -> list[tuple[bool, str]]:
        amounts = [f"--{name.replace('_', '-')}" for name in AMOUNTS if getattr(self, name) is not None]
        resources = [name for name in amounts if name != "--flops"]
        return [
            (len(amounts) > 1, f"{' and '.join(amounts)} are budgets for one and the same choice; give one of them"),
            (
                bool(resources) and self.sparsity != "block",
                f"{'/'.join(resources)} is for --sparsity block, not for --sparsity {self.sparsity}",
            ),
            (self.min_density > 1, f"--min-density is a fraction of blocks, 0 to 1; got {self.min_density:g}"),
            (
                self.min_density > 0 and self.sparsity != "block",
                f"--min-density is for --sparsity block, not for --sparsity {self.sparsity}",
            ),
            (
                self.prefer_structure and self.sparsity != "block",
                f"--prefer-structure is for --sparsity block, not for --sparsity {self.sparsity}",
            ),
            (
                self.prefer_structure and self.allocator == "lsp",
                "--prefer-structure needs --allocator exact: the paper's slopes know no units",
            ),
            (
                "power_weight" in self.model_fields_set and self.allocator != "lsp",
                "--power-weight is a term of --allocator lsp; give that too, or leave it out",
            ),
            (
                bool(resources) and self.allocator == "lsp",
                f"--allocator lsp knows a FLOPs target only; leave out {'/'.join(resources)} or use --allocator exact",
            ),
        ]

    @property
    def block_shape(self) -> tuple[int, int]:
        """(block_k, block_n) on W [K, N]."""
        block_k, block_n = (self.block or "32x32").split("x")
        return int(block_k), int(block_n)

    def typed(self) -> dict[str, Any]:
        """Return the keys that were given, with their values, in the order of declaration."""
        given = self.model_dump()
        return {name: given[name] for name in type(self).model_fields if name in self.model_fields_set}


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Parse `x:1x3x224x224,y:1x77` (the spelling of trtexec) into shapes by input name.

    Raises:
        ValueError: not of this form, or a dimension below 1.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, colon, dimensions = part.strip().rpartition(":")
        if not colon or not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dimensions):
            raise ValueError(f"is written like x:1x3x224x224,y:1x77; got {text!r}")
        shapes[name] = tuple(int(dimension) for dimension in dimensions.split("x"))
    return shapes


def merge_recipe(flags: Mapping[str, Any], recipe_file: Path | None, model: Path) -> Recipe:
    """Build the recipe from the flags that were typed, the file typed with `--recipe`, and the one beside the model.

    Raises:
        UserError: a key or value that is not valid, with the place it came from.
    """
    values: dict[str, Any] = {}
    found = model.parent / FOUND_RECIPE
    sources: dict[str, str] = {}
    if found.is_file():
        beside = read_recipe_file(found, own_folder_only=True)
        values |= beside
        sources |= dict.fromkeys(beside, str(found))
    if recipe_file is not None:
        named = read_recipe_file(recipe_file, own_folder_only=False)
        values = _without_what_belongs_to(named, values) | named
        sources |= dict.fromkeys(named, str(recipe_file))
    typed = {name: value for name, value in flags.items() if value is not None}
    values = _without_what_belongs_to(typed, values) | typed
    sources |= dict.fromkeys(typed, "")
    if "target" not in values:
        raise UserError("--target is missing: name one (see `lsp-deploy targets`), for example --target a100")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, sources)) from error


def _without_what_belongs_to(stronger: Mapping[str, Any], weaker: Mapping[str, Any]) -> dict[str, Any]:
    """Return `weaker` without the keys that speak of something which `stronger` names anew."""
    gone = {key for owner, keys in _BELONGS_TO.items() if owner in stronger for key in keys}
    return {key: value for key, value in weaker.items() if key not in gone}


def read_recipe_file(path: Path, *, own_folder_only: bool) -> dict[str, Any]:
    """Read a recipe's keys from TOML; its paths are relative to its own folder and come back resolved.

    With `own_folder_only` (a file that was found, not typed) a path that leads out of the folder is refused.

    Raises:
        UserError: unreadable, not TOML, or a path that leads out.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error
    folder = path.parent.resolve()
    for key in (*PATH_KEYS, "preprocess", "target"):
        value = values.get(key)
        if not isinstance(value, str) or not _is_path(key, value):
            continue
        resolved = (folder / value).resolve()
        if own_folder_only and not resolved.is_relative_to(folder):
            raise UserError(
                f"{path}: {key} = {value!r} leads out of the model's folder; a recipe that was found, not typed, "
                f"may name files beside the model only: pass it with --recipe {path}"
            )
        values[key] = str(path.parent / value)
    return values


def save_recipe_file(recipe: Recipe, path: Path) -> None:
    """Write the keys that were given to `path` as TOML, paths made absolute; `--recipe` replays it."""
    import tomli_w

    values = {key: value for key, value in recipe.typed().items() if value is not None}
    for key, value in values.items():
        if isinstance(value, str) and _is_path(key, value):
            values[key] = str(Path(value).resolve())
    write_text(path, tomli_w.dumps(values))


def _is_path(key: str, value: str) -> bool:
    if key in PATH_KEYS:
        return value not in NAMED_DATA
    return key in ("preprocess", "target") and (value.endswith(".toml") or "/" in value)


def _one_line(error: ValidationError, sources: Mapping[str, str]) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    key = str(first["loc"][0])
    origin = sources.get(key, "")
    name = f"{key} in {origin}" if origin else f"--{key.replace('_', '-')}"
    if first["type"] == "extra_forbidden":
        return f"{origin}: there is no recipe key {key!r}; the keys are {', '.join(Recipe.model_fields)}"
    if first["type"] == "literal_error":
        message = f"is one of {first.get('ctx', {}).get('expected', '')}; got {first['input']!r}"
    return f"{name} {message[0].lower()}{message[1:]}"
