"""Classifiers of timm, exported to ONNX with their preprocessing in the file's metadata."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lsp_deploy.console import progress
from lsp_deploy.data.preprocess import METADATA_KEY
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

__all__ = ["INPUT_NAME", "OUTPUT_NAME", "ExportResult", "Exporter", "export_model", "export_module", "import_timm"]

Exporter = Literal["torchscript", "dynamo"]
INPUT_NAME, OUTPUT_NAME = "pixel_values", "logits"

# What each exporter of torch can write; below its minimum the dynamo exporter writes another opset than asked for.
_OPSETS: dict[Exporter, tuple[int, int]] = {"torchscript": (13, 20), "dynamo": (18, 23)}
_DEFAULT_OPSETS: dict[Exporter, int] = {"torchscript": 17, "dynamo": 18}


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    path: Path
    name: str
    """Of the timm model."""
    opset: int
    exporter: Exporter
    input_shape: tuple[int | str, ...]
    """[batch, channels, height, width]; `batch` where it is dynamic."""
    num_classes: int
    parameters: int
    pretrained: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "path": str(self.path)}


def export_model(
    spec: str,
    output: Path,
    *,
    pretrained: bool = False,
    opset: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    exporter: Exporter = "torchscript",
    batch: int | None = None,
    seed: int = 0,
) -> ExportResult:
    """Export a timm classifier to ONNX: input `pixel_values` [batch, 3, height, width], output `logits`, float32.

    timm's evaluation transform for these weights goes into the file's metadata, for calibration to use.

    Args:
        spec: `timm:` and the name of the model, with or without a tag: `timm:vit_tiny_patch16_224.augreg_in21k`.
        output: ONNX file to write.
        pretrained: download trained weights; otherwise they are random, the same for the same seed.
        opset: of the file; 17 if None, 18 by the dynamo exporter.
        image_size: height and width in pixels; the model's own if None.
        num_classes: of the head; the model's own if None.
        exporter: torchscript (opset 13 to 20) or dynamo (opset 18 to 23).
        batch: a fixed batch; dynamic if None.
        seed: of random weights.

    Raises:
        UserError: an unknown scheme or model, a model without a head, a size that it does not take, an opset that the
            exporter does not write, weights that cannot be had, or PyTorch and timm not installed.
    """
    name = _timm_name(spec)
    opset = _DEFAULT_OPSETS[exporter] if opset is None else opset
    lowest, highest = _OPSETS[exporter]
    if not lowest <= opset <= highest:
        other = "dynamo" if exporter == "torchscript" else "torchscript"
        raise UserError(
            f"the {exporter} exporter writes opset {lowest} to {highest}, not {opset}; "
            f"choose one of these, or --exporter {other}"
        )
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output}: there is no folder {output.parent}")
    timm = import_timm()
    with progress(f"exporting {name}", 1) as advance:
        with _quiet():
            module = _create(timm, name, pretrained, image_size, num_classes, seed)
        config = timm.data.resolve_model_data_config(module)
        size = (image_size, image_size) if image_size else tuple(config["input_size"][1:])
        shape = (config["input_size"][0], *size)
        _check_forward(name, module, shape)
        model = export_module(module, shape, opset=opset, exporter=exporter, batch=batch)
        model.metadata_props[METADATA_KEY] = json.dumps(_preprocessing(config, size))
        _save(model, output)
        advance(1)
    return ExportResult(
        path=output,
        name=name,
        opset=opset,
        exporter=exporter,
        input_shape=(batch or "batch", *shape),
        num_classes=cast(int, module.num_classes),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        pretrained=pretrained,
    )


def export_module(
    module: torch.nn.Module,
    shape: tuple[int, ...],
    *,
    opset: int = 17,
    exporter: Exporter = "torchscript",
    batch: int | None = None,
) -> ir.Model:
    """Export a classifier to ONNX, in memory.

    Args:
        module: in evaluation mode, with one float32 input and one output.
        shape: of one sample, without the batch.
        opset: of the model.
        exporter: torchscript or dynamo.
        batch: a fixed batch; dynamic if None.
    """
    import onnx_ir as ir
    import torch

    # Two samples: dynamo takes a dimension of size one for a constant.
    example = torch.zeros(batch or 2, *shape)
    options: dict[str, Any] = {"dynamo": exporter == "dynamo", "verbose": False}
    if batch is None and exporter == "dynamo":
        options["dynamic_shapes"] = ({0: "batch"},)
    elif batch is None:
        options["dynamic_axes"] = {INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module,
            (example,),
            path,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            **options,
        )
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    for node in model.graph.all_nodes():
        # Paths of the machine that exported.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    return model


def import_timm() -> Any:
    """Import timm, also beside a torchvision that was built for another PyTorch.

    The registries' torchvision is built for CUDA. Beside a CPU build of PyTorch its operators do not load, and its
    import fails with "operator torchvision::nms does not exist". timm needs its image transforms only, so the
    operators' schemas are declared, never their code, and the import runs again.

    Raises:
        UserError: PyTorch, torchvision or timm is not installed.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            _declare_torchvision_operators()
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"export needs PyTorch and timm ({error}): pip install 'lsp-deploy[torch]'") from error


def _declare_torchvision_operators() -> None:
    from torch import library

    for operator in ("nms", "qnms"):
        library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "torchvision"]:
        del sys.modules[loaded]


def _timm_name(spec: str) -> str:
    scheme, colon, name = spec.partition(":")
    if not colon or scheme != "timm" or not name:
        raise UserError(f"cannot export {spec!r}: name a timm model, for example timm:deit_small_patch16_224")
    return name


def _create(
    timm: Any, name: str, pretrained: bool, image_size: int | None, num_classes: int | None, seed: int
) -> torch.nn.Module:
    """Build the module with random weights, which needs no network, then load the trained ones if asked for."""
    import torch

    _check_name(timm, name)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if image_size is not None:
        options["img_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = timm.create_model(name, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            # A convolutional network: it takes any size.
            del options["img_size"]
            module = timm.create_model(name, **options)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"timm cannot build {name} with {_words(options)}: {_line(error)}") from error
        if pretrained:
            module = _with_trained_weights(timm, name, options)
    if not module.num_classes:
        raise UserError(f"{name} has no classifier head; give --num-classes to add one with random weights")
    for part in module.modules():
        # Attention as MatMul, Softmax, MatMul, which every opset and runtime takes.
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module.eval()  # type: ignore[no-any-return]


def _check_name(timm: Any, name: str) -> None:
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        # A name that stops short (deit_tiny) is like none by its letters.
        near = [name for name in known if architecture in name][:3]
        near = near or difflib.get_close_matches(architecture, known, n=3)
        hint = f"; near it are {', '.join(near)}" if near else "; timm.list_models() lists them"
        raise UserError(f"timm has no model {architecture!r}{hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if dot and tag not in tags:
        raise UserError(f"timm has no weights {tag!r} for {architecture}; it has {', '.join(tags) or 'none'}")


def _with_trained_weights(timm: Any, name: str, options: dict[str, Any]) -> torch.nn.Module:
    if not timm.is_model_pretrained(name):
        raise UserError(f"timm has no trained weights for {name}; leave --pretrained out for random ones")
    try:
        return timm.create_model(name, pretrained=True, **options)  # type: ignore[no-any-return]
    except Exception as error:
        # The same call without weights has just worked: what fails is the download, in one of several libraries.
        raise UserError(
            f"cannot download the weights of {name}: {_line(error)}; "
            "check the network, or leave --pretrained out for random weights"
        ) from error


def _check_forward(name: str, module: torch.nn.Module, shape: tuple[int, ...]) -> None:
    import torch

    try:
        with torch.inference_mode():
            module(torch.zeros(1, *shape))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} does not take images of {shape[1]}x{shape[2]} pixels: {_line(error)}") from error


def _preprocessing(config: dict[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    return {
        "size": list(size),
        "crop_pct": float(config["crop_pct"]),
        "crop_mode": config["crop_mode"],
        "interpolation": config["interpolation"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }


def _save(model: ir.Model, output: Path) -> None:
    from lsp_deploy.model import save_model

    save_model(model, output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' and timm's remarks from the user, who can do nothing about them."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _words(options: dict[str, Any]) -> str:
    flags = {"img_size": "--image-size", "num_classes": "--num-classes"}
    return " ".join(f"{flags[key]} {value}" for key, value in options.items()) or "its own settings"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
