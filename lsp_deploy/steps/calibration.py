"""Which images a run calibrates on and which it measures on, and what the user is told about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy import console
from lsp_deploy.errors import UserError
from lsp_deploy.recipe import NAMED_DATA

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.data import Dataset
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["CalibrationData", "open_data", "open_named", "warn_assumed_preprocess"]

DEFAULT_SAMPLES = 512
NAMED_SAMPLES = 64


@dataclass
class CalibrationData:
    """The data of a run."""

    calibration: Dataset
    held_out: Dataset
    held_out_from: str
    """Where the held-out images come from, in words."""
    preprocess_from: str
    notes: list[str] = field(default_factory=list)

    @property
    def real(self) -> bool:
        """Whether the user named images or arrays, rather than synthetic or random data."""
        return self.calibration.kind not in NAMED_DATA


def open_data(prepared: PreparedModel, recipe: Recipe) -> CalibrationData:
    """Open the calibration data and the images that fidelity is measured on.

    Raises:
        UserError: data that cannot be read or does not fit the model.
    """
    source = recipe.calibration_data or "synthetic"
    notes = []
    if source in NAMED_DATA:
        notes.append(
            f"calibrated on {source} images, not real ones: only layers whose output survives are quantized, and auto "
            "prunes nothing; real images (--calibration-data) would make scales right and accuracy measurable"
        )
    samples = recipe.samples or (NAMED_SAMPLES if source in NAMED_DATA else DEFAULT_SAMPLES)
    named, preprocess_from = open_named(
        prepared.original,
        prepared.shapes.opt,
        source,
        # Made-up data is not prepared: then --preprocess is for --eval-data.
        preprocess=None if source in NAMED_DATA and recipe.eval_data is not None else recipe.preprocess,
        labels=recipe.labels,
        label_column=recipe.label_column,
        samples=samples,
        seed=recipe.seed,
    )
    warn_assumed_preprocess(named, preprocess_from)
    data = _split(prepared, recipe, named, preprocess_from)
    data.notes[:0] = notes
    return data


def open_named(
    model: ir.Model,
    shapes: dict[str, tuple[int, ...]],
    source: str,
    *,
    preprocess: str | None,
    labels: str | None,
    label_column: str | None,
    samples: int | None,
    seed: int,
) -> tuple[Dataset, str]:
    """Open one source of data for `model`; returns it and where its preprocessing came from.

    Raises:
        UserError: data that cannot be read or does not fit the model.
    """
    from lsp_deploy.data import image_size, load_preprocess, open_dataset

    settings, origin = load_preprocess(preprocess, model.metadata_props, image_size(shapes))
    dataset = open_dataset(
        source,
        shapes=shapes,
        dtypes={str(value.name): value.dtype.numpy() for value in model.graph.inputs if value.dtype is not None},
        preprocess=settings,
        labels=Path(labels) if labels else None,
        label_column=label_column if labels else None,
        samples=samples,
        seed=seed,
    )
    if preprocess is not None and dataset.kind != "images":
        raise UserError(f"--preprocess is for images; {source} is fed to the model as it is: leave it out")
    if dataset.skipped:
        console.warn(f"{source}: {dataset.skipped} images do not decode and were skipped")
    return _with_fitting_labels(dataset, model, source), origin


def warn_assumed_preprocess(dataset: Dataset, preprocess_from: str) -> None:
    """Warn where images are prepared in a way that nobody named."""
    if preprocess_from == "default" and dataset.kind == "images":
        console.warn("the model says nothing of its preprocessing; `imagenet` is assumed (--preprocess to change it)")


def _with_fitting_labels(dataset: Dataset, model: ir.Model, source: str) -> Dataset:
    """Return the dataset with labels that are classes of the model, or without those that only look like labels.

    Raises:
        UserError: a label that was given is not a class of the model.
    """
    from lsp_deploy.graph.class_scores import class_count

    classes = class_count(model)
    if dataset.labels is None or classes is None:
        return dataset
    if dataset.class_names is not None and len(dataset.class_names) != classes:
        console.warn(
            f"{source}: its {len(dataset.class_names)} class folders are not the model's {classes} classes; "
            "they are not used as labels (--labels to name the classes)"
        )
        return dataset.without_labels()
    if int(dataset.labels.max()) >= classes:
        raise UserError(
            f"{source}: label {int(dataset.labels.max())} is not one of the model's {classes} classes; "
            "check the label file and --label-column"
        )
    return dataset


def _split(prepared: PreparedModel, recipe: Recipe, named: Dataset, preprocess_from: str) -> CalibrationData:
    from lsp_deploy.data import hold_out

    if recipe.eval_data is not None:
        evaluation, evaluation_from = open_named(
            prepared.original,
            prepared.shapes.opt,
            recipe.eval_data,
            preprocess=None if named.kind == "arrays" else recipe.preprocess,
            labels=recipe.eval_labels,
            label_column=recipe.label_column,
            samples=None,
            seed=recipe.seed,
        )
        if named.kind != "images":
            preprocess_from = evaluation_from
            warn_assumed_preprocess(evaluation, evaluation_from)
        return CalibrationData(named, evaluation, f"--eval-data {recipe.eval_data}", preprocess_from)
    calibration, held_out = hold_out(named)
    if len(named) < 5:
        words = f"all {len(named)} calibration samples: too few to hold any out"
        return CalibrationData(calibration, held_out, words, preprocess_from, [f"fidelity is measured on {words}"])
    words = f"every fifth calibration sample, held out ({len(held_out)} of {len(named)})"
    return CalibrationData(calibration, held_out, words, preprocess_from, [f"fidelity is measured on {words}"])
