"""Real exports of vision models for the tests, made once and kept in `.cache/exports/`.

The weights are random but the same in every run: `create_timm` with the same arguments gives the exported module.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "exports"

# Two blocks, or one a stage, of each family: the graph of the real model, exported in a second.
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny_distilled_patch16_224": {"depth": 2, "image_size": 64},
    "vit_tiny_patch16_224": {"depth": 2, "image_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (3, 6), "image_size": 112},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 192, "num_heads": 3, "image_size": 64},
    "cait_xxs24_224": {"depth": 2, "image_size": 64},
    "levit_128s": {"depth": (1, 1, 1)},
    "mobilevit_xxs": {"image_size": 64},
    "eva02_tiny_patch14_224": {"depth": 2, "image_size": 56, "fused_attention": False},
    "convnext_atto": {"depths": (1, 1, 2, 1), "image_size": 64},
}


def export_timm(
    name: str,
    *,
    exporter: str = "torchscript",
    opset: int = 17,
    image_size: int | None = None,
    dynamic: bool = True,
    num_classes: int = 10,
    dtype: str = "fp32",
    **options: Any,
) -> Path:
    """Export a timm classifier with random weights; skips the test where torch or timm is missing.

    Args:
        name: of the timm architecture.
        exporter: torchscript or dynamo.
        opset: of the file.
        image_size: height and width; the architecture's own if None.
        dynamic: whether the batch is dynamic.
        num_classes: of the head.
        dtype: fp32 or fp16.
        **options: passed to `timm.create_model`.

    Returns:
        Path of the ONNX file: input `pixel_values`, output `logits`.
    """
    module = _Lazy(create_timm, name, image_size=image_size, num_classes=num_classes, **options)
    key = {"name": name, "image_size": image_size, "num_classes": num_classes, **options}

    def example() -> tuple[Any, ...]:
        import torch

        return (torch.zeros(2 if dynamic else 1, *_input_size(module.get(), image_size)),)

    return export_module(
        name, key, module.get, example, ["pixel_values"], ["logits"], exporter, opset, dynamic=dynamic, dtype=dtype
    )


def export_family(name: str, **changes: Any) -> Path:
    """Export one of `FAMILIES` at its small size."""
    return export_timm(name, **(FAMILIES[name] | changes))


def create_timm(
    name: str,
    *,
    image_size: int | None = None,
    num_classes: int = 10,
    fused_attention: bool = True,
    **options: Any,
) -> Any:
    """Return the timm module that `export_timm` exports for the same arguments.

    Without `fused_attention` it is written out: the TorchScript exporter cannot take every fused one.
    """
    timm = _import_timm()
    import torch

    if image_size is not None and not name.startswith(("convnext", "mobilevit", "levit")):
        options["img_size"] = image_size
    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options).eval()
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = part.fused_attn and fused_attention
    return module


def export_huggingface_vit(*, exporter: str = "torchscript", opset: int = 17) -> Path:
    """Export a small ViT written as Hugging Face's transformers write it: separate query, key and value."""

    def build() -> Any:
        from torch_models import HuggingFaceViT

        return HuggingFaceViT()

    return export_module(
        "huggingface_vit", {}, _seeded(build), _zeros((2, 3, 64, 64)), ["pixel_values"], ["logits"], exporter, opset
    )


def export_clip(*, exporter: str = "torchscript", opset: int = 17) -> Path:
    """Export a small CLIP: an image tower and a causal text tower, QuickGELU, and the similarity of both."""

    def build() -> Any:
        from torch_models import Clip

        return Clip()

    def example() -> tuple[Any, ...]:
        import torch

        return torch.zeros(2, 3, 64, 64), torch.ones(2, 16, dtype=torch.int64)

    names = ["pixel_values", "input_ids"]
    return export_module("clip", {}, _seeded(build), example, names, ["logits_per_image"], exporter, opset)


def export_segmentation_vit(*, exporter: str = "torchscript", opset: int = 17, classes: int = 6) -> Path:
    """Export a small SETR: a timm ViT whose tokens give classes for every pixel, [batch, classes, 64, 64]."""
    name = "vit_tiny_patch16_224"

    def build() -> Any:
        from torch_models import SegmentationViT

        return SegmentationViT(create_timm(name, depth=2, image_size=64, num_classes=0), classes)

    names = ["pixel_values"], ["logits"]
    return export_module(
        "segmentation_vit", {"classes": classes}, _seeded(build), _zeros((2, 3, 64, 64)), *names, exporter, opset
    )


def export_module(
    name: str,
    key: dict[str, Any],
    module: Any,
    example: Any,
    inputs: list[str],
    outputs: list[str],
    exporter: str = "torchscript",
    opset: int = 17,
    *,
    dynamic: bool = True,
    dtype: str = "fp32",
) -> Path:
    """Export what `module()` returns, traced with `example()`, unless the cache has it.

    The name of the file holds a hash of `key`, the other arguments, the sources here and the exporters' versions.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'lsp-deploy[torch]'")
    packages = {package: version(package) for package in ("torch", "onnx", "onnxscript")}
    sources = [(Path(__file__).parent / file).read_text() for file in ("exports.py", "torch_models.py")]
    content = json.dumps([name, key, exporter, opset, dynamic, dtype, packages, sources], sort_keys=True)
    target = CACHE / f"{name}-{exporter}-{opset}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.onnx"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    traced, arguments = module(), example()
    if dtype == "fp16":
        traced, arguments = traced.half(), tuple(a.half() if a.is_floating_point() else a for a in arguments)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        common: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "opset_version": opset}
        if exporter == "dynamo":
            shapes = tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in inputs) if dynamic else None
            torch.onnx.export(
                traced,
                arguments,
                file,
                dynamo=True,
                external_data=False,
                verbose=False,
                dynamic_shapes=shapes,
                **common,
            )
        else:
            axes = {value: {0: "batch"} for value in (*inputs, *outputs)} if dynamic else None
            torch.onnx.export(traced, arguments, file, dynamo=False, dynamic_axes=axes, **common)
        file.replace(target)
    return target


class _Lazy:
    """A module that is created when it is first needed."""

    def __init__(self, create: Any, *arguments: Any, **options: Any) -> None:
        self._create = lambda: create(*arguments, **options)
        self._module: Any = None

    def get(self) -> Any:
        if self._module is None:
            self._module = self._create()
        return self._module


def _input_size(module: Any, image_size: int | None) -> tuple[int, int, int]:
    channels, height, width = module.default_cfg["input_size"]
    return (channels, height, width) if image_size is None else (channels, image_size, image_size)


def _seeded(build: Any) -> Any:
    def seeded() -> Any:
        import torch

        torch.manual_seed(0)
        return build().eval()

    return seeded


def _zeros(shape: tuple[int, ...]) -> Any:
    def example() -> tuple[Any, ...]:
        import torch

        return (torch.zeros(shape),)

    return example


def _import_timm() -> Any:
    for package in ("torch", "timm"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'lsp-deploy[torch]'")
    from lsp_deploy.export import import_timm

    return import_timm()
