"""One vision transformer in every form whose speed on a CPU is compared.

Weights are random: speed does not depend on them. They are scaled so that every layer has a say in the logits, and
biases and gains are not zeros and ones, so that whatever a variant leaves out shows in its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from competitors import Images, NotMeasured, OnnxRuntimeRunner, OpenVinoRunner, Quantizers, Runner
from numpy.typing import NDArray

from lsp_deploy import __version__
from lsp_deploy.allocation.precision import COMPRESSIBLE_ROLES, decide_precision
from lsp_deploy.data import Dataset, open_dataset
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.export import INPUT_NAME, OUTPUT_NAME, export_module, import_timm
from lsp_deploy.hardware.target import load_target
from lsp_deploy.linear_layers import LinearLayer
from lsp_deploy.model import save_model
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plan import AttentionDecision, ExecutionDecision, LayerPlan, Plan, PrecisionDecision, SparsityDecision
from lsp_deploy.recipe import Recipe
from lsp_deploy.sensitivity.activations import ActivationStatistics, collect_activations
from lsp_deploy.sensitivity.quantization import weight_scale
from lsp_deploy.steps.apply import apply_decisions, apply_plan
from lsp_deploy.steps.preparation import prepare

BLOCK = (32, 32)
SIZE = (3, 224, 224)
WHY = "asked for by the benchmark"

# The project's aims: times as fast as ONNX Runtime's dense fp32, at batch 1 on 2 threads.
AIMS = {
    ("deit_small_patch16_224", "fp32", 0.5): 1.8,
    ("deit_small_patch16_224", "fp32", 0.7): 2.6,
    ("deit_small_patch16_224", "bf16", 0.5): 2.9,
    ("deit_small_patch16_224", "int8", 0.5): 3.7,
    ("deit_small_patch16_224", "int8", 0.7): 4.7,
    ("deit_base_patch16_224", "fp32", 0.5): 1.95,
    ("deit_base_patch16_224", "fp32", 0.7): 3.0,
    ("deit_base_patch16_224", "bf16", 0.5): 3.5,
    ("deit_base_patch16_224", "int8", 0.5): 4.6,
    ("deit_base_patch16_224", "int8", 0.7): 6.2,
}

Dtype = Literal["fp32", "bf16", "int8"]
Kernel = Literal["engine", "block_sparse", "qgemm"]
Attention = Literal["as exported", "fp32", "bf16"]


@dataclass(frozen=True)
class Variant:
    """One way to run the network."""

    name: str
    zeros: float
    """Share of zero blocks in every linear layer of the transformer's blocks."""
    dtype: Dtype
    file: Callable[[], Path]
    """Returns the model's file, which it makes first; raises NotMeasured."""
    open: Callable[[Path, int, int], Runner]
    """Takes the file, threads and batch; raises NotMeasured."""
    aim: float | None = None


def variants(network: Network) -> list[Variant]:
    """Return all variants of `network`; the first is what the others are compared with."""
    own, stock = network.variant, partial(Variant, zeros=0.0)
    f32, bf16 = partial(OpenVinoRunner, precision="f32"), partial(OpenVinoRunner, precision="bf16")
    return [
        stock("ONNX Runtime fp32", dtype="fp32", file=network.dense, open=OnnxRuntimeRunner),
        own("ONNX Runtime fp32", 0.5, "fp32", "engine", "as exported"),
        *[own("operator fp32", zeros, "fp32", "block_sparse", "fp32") for zeros in (0.0, 0.5, 0.7)],
        *[own("operator bf16", zeros, "bf16", "block_sparse", "bf16") for zeros in (0.0, 0.5, 0.7)],
        *[own("operator int8", zeros, "int8", "block_sparse", "fp32") for zeros in (0.0, 0.5, 0.7)],
        *[own("operator int8", zeros, "int8", "block_sparse", "bf16") for zeros in (0.0, 0.5, 0.7)],
        *[own(f"operator {dtype}", 0.5, dtype, "block_sparse", "as exported") for dtype in ("fp32", "bf16", "int8")],
        *[network.gathered(zeros) for zeros in (0.5, 0.7)],
        own("ONNX Runtime int8, written by lsp-deploy", 0.0, "int8", "qgemm", "as exported"),
        stock(
            "ONNX Runtime int8, quantize_static", dtype="int8", file=network.others.onnxruntime, open=OnnxRuntimeRunner
        ),
        stock("OpenVINO fp32", dtype="fp32", file=network.dense, open=f32),
        stock("OpenVINO bf16", dtype="bf16", file=network.dense, open=bf16),
        stock("OpenVINO int8", dtype="int8", file=network.others.nncf, open=f32),
        stock("OpenVINO int8, rest bf16", dtype="int8", file=network.others.nncf, open=bf16),
    ]


class OwnRunner:
    """A model of lsp-deploy in its own session of ONNX Runtime."""

    def __init__(self, path: Path, threads: int, batch: int) -> None:
        self._engine = OnnxRuntimeEngine.from_model(path, threads=threads)
        if warnings := self._engine.describe().warnings:
            raise NotMeasured("; ".join(warnings))

    def run(self, images: Images) -> NDArray[np.float32]:
        return self._engine.run({INPUT_NAME: images})[OUTPUT_NAME]

    def close(self) -> None:
        self._engine.close()


class Network:
    """A network of timm with random weights, and what it is made into."""

    def __init__(self, name: str, folder: Path, work: Path, *, samples: int, threads: int) -> None:
        """Export the network.

        Args:
            name: of timm's model.
            folder: holds what may serve again: the export, and the models of other quantizers.
            work: holds the models that lsp-deploy makes, anew in each run.
            samples: made-up images that int8 is calibrated on.
            threads: of calibration.
        """
        self.name, self.work, self.threads = name, work, threads
        self.path = folder / f"{name}.onnx"
        if not self.path.exists():
            export(name, self.path)
        self.prepared = prepare(self.path, Recipe(target="cpu"), load_target("cpu"))
        self.layers = [layer for layer in self.prepared.layers if layer.role in COMPRESSIBLE_ROLES]
        self.data = made_up(samples, seed=0)
        self.others = Quantizers(self.path, folder, images(self.data))
        self.statistics = cache(self._statistics)
        self.masks = cache(self._masks)

    def dense(self) -> Path:
        return self.path

    def variant(self, name: str, zeros: float, dtype: Dtype, kernel: Kernel, attention: Attention) -> Variant:
        """Return a variant that lsp-deploy makes."""
        notes = [f"{zeros:.0%} zeros"] if zeros or kernel == "block_sparse" else []
        notes += [f"attention {attention}"] if kernel == "block_sparse" else []
        name = ", ".join([name, *notes])
        aim = AIMS.get((self.name, dtype, zeros)) if attention != "as exported" else None
        plan = partial(self.plan, zeros, dtype, kernel, attention)
        return Variant(name, zeros, dtype, lambda: self._made(name, plan), OwnRunner, aim)

    def gathered(self, zeros: float) -> Variant:
        """Return the variant that skips zero blocks with ONNX Runtime's own operators."""
        name = f"gather fp32, {zeros:.0%} zeros"
        plan = partial(self.plan, zeros, "fp32", "block_sparse", "as exported")
        return Variant(name, zeros, "fp32", lambda: self._made(name, plan, lower=True), OwnRunner)

    def reference(self, zeros: float, images: Images) -> NDArray[np.float32]:
        """Return the logits of the dense fp32 model whose weights hold the same zeros."""
        model = apply_decisions(self.prepared.canonical, self.plan(zeros, "fp32", "engine", "as exported"))
        with OnnxRuntimeEngine.from_model(model, threads=self.threads) as engine:
            return engine.run({INPUT_NAME: images})[OUTPUT_NAME]

    def plan(self, zeros: float, dtype: Dtype, kernel: Kernel, attention: Attention) -> Plan:
        """Return the plan of a variant."""
        masks = self.masks(zeros)
        plan = Plan(
            tool_version=__version__,
            model_sha256=self.prepared.sha256,
            target="cpu",
            compute_type="fp32",
            opset=self.prepared.opset,
            block_shape=BLOCK,
            layers=[self._layer_plan(layer, zeros, dtype, kernel) for layer in self.layers],
        )
        if attention != "as exported":
            plan.attention = AttentionDecision(kernel="lsp", compute=attention, reason=WHY)
        if zeros:
            plan.masks.update(masks)
        if dtype == "int8":
            weights = self.prepared.weights
            plan.weight_scales.update(
                {name: weight_scale(weights[name] * mask, "fp32") for name, mask in masks.items()}
            )
        return plan

    def _layer_plan(self, layer: LinearLayer, zeros: float, dtype: Dtype, kernel: Kernel) -> LayerPlan:
        return LayerPlan(
            name=layer.name,
            role=layer.role,
            block=layer.block,
            K=layer.K,
            N=layer.N,
            M=layer.M,
            sparsity=SparsityDecision(
                asked="block" if zeros else "none",
                pattern="block" if zeros else "dense",
                zeros=1 - float(self.masks(zeros)[layer.name].mean()),
                reason=WHY,
            ),
            precision=self._precision(layer, zeros, dtype),
            execution=ExecutionDecision(kernel=kernel, reason=WHY),
        )

    def _precision(self, layer: LinearLayer, zeros: float, dtype: Dtype) -> PrecisionDecision:
        if dtype != "int8":
            return PrecisionDecision(asked=dtype, dtype=dtype, reason=WHY)
        weight = self.prepared.weights[layer.name] * self.masks(zeros)[layer.name]
        statistics = self.statistics(zeros)[str(layer.x.name)]
        return decide_precision(layer, weight, statistics, asked="int8", compute_type="fp32", int8_on_target=True)

    def _masks(self, zeros: float) -> dict[str, NDArray[np.bool_]]:
        rng = np.random.default_rng(0)
        return {layer.name: random_mask(layer.K, layer.N, zeros, rng) for layer in self.layers}

    def _statistics(self, zeros: float) -> dict[str, ActivationStatistics]:
        model = apply_decisions(self.prepared.canonical, self.plan(zeros, "fp32", "engine", "as exported"))
        inputs = sorted({str(layer.x.name) for layer in self.layers})
        with OnnxRuntimeEngine.from_model(model, threads=self.threads, extra_outputs=inputs) as engine:
            return collect_activations(engine, self.layers, self.data, batch_size=4)

    def _made(self, name: str, plan: Callable[[], Plan], *, lower: bool = False) -> Path:
        path = self.work / f"{self.name}, {name}.onnx"
        if not path.exists():
            prepared = self.prepared
            model = apply_plan(prepared.canonical, plan(), prepared.original_io, prepared.shapes.opt, kind="cpu").model
            if lower:
                LowerOperatorsPass("gather")(model)
            save_model(model, path)
        return path


def export(name: str, path: Path) -> None:
    """Write a network of timm, its batch dynamic, with random weights whose scale keeps activations alive."""
    import torch

    torch.manual_seed(0)
    module = import_timm().create_model(name).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=float(np.prod(parameter.shape[1:])) ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_model(export_module(module, SIZE), path)


def made_up(samples: int, *, seed: int) -> Dataset:
    """Return made-up images with the spectrum of natural ones."""
    return open_dataset(
        "synthetic", shapes={INPUT_NAME: (1, *SIZE)}, dtypes={}, preprocess=None, samples=samples, seed=seed
    )


def images(data: Dataset) -> Images:
    """Return all images of a dataset, float32 [images, 3, height, width]."""
    return data.feeds(range(len(data)))[INPUT_NAME]


def random_mask(K: int, N: int, zeros: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask [K, N] whose zero blocks are chosen by chance, exactly as many as `zeros` says.

    Every row and column of blocks keeps one: no neuron or channel dies, and the layer stays as large as it is.
    """
    rows, columns = -(-K // BLOCK[0]), -(-N // BLOCK[1])
    gone = round(zeros * rows * columns)
    while True:
        kept = (rng.permutation(rows * columns) >= gone).reshape(rows, columns)
        if kept.any(axis=0).all() and kept.any(axis=1).all():
            return np.repeat(np.repeat(kept, BLOCK[0], axis=0), BLOCK[1], axis=1)[:K, :N]
