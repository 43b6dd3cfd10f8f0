"""Reports as a run makes them, for the tests of the page and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsp_deploy.allocation.masks import block_mask, two_four_mask
from lsp_deploy.allocation.pruning import Analysis, ChosenPoint, Pruning
from lsp_deploy.engines.profiler import Conditions, Profile
from lsp_deploy.engines.protocol import EngineInfo, LayerRecord, layer_counts
from lsp_deploy.plan import LayerPlan, Plan, PrecisionDecision, RecoveryDecision, SparsityDecision
from lsp_deploy.reporting.attention_levels import attention_section
from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.reporting.pruning_rows import pruning_section
from lsp_deploy.reporting.report import Report
from lsp_deploy.reporting.sections import (
    BudgetSection,
    DataSection,
    DataSource,
    EngineSection,
    FidelitySection,
    FlopsSection,
    HostSection,
    ModelSection,
    OutputFile,
    ProfileRow,
    RunSection,
    SizeSection,
    SpeedupRow,
    TargetSection,
    TensorInfo,
)
from lsp_deploy.steps.attention_maps import AttentionMaps, BlockAttention, HeadMaps

TOKENS = 8 * 197


def sample_plan(*, blocks: int = 12, width: int = 192, pattern: str = "2:4", seed: int = 0) -> Plan:
    """A ViT's plan: every layer inside a block int8 and pruned, two of them held back, patch and head left alone."""
    rng = np.random.default_rng(seed)
    shapes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    nodes = {"qkv": "attn/qkv", "proj": "attn/proj", "fc1": "mlp/fc1", "fc2": "mlp/fc2"}
    layers = [_left_alone("/patch_embed/proj/Conv", "patch", 768, width, 8 * 196, "the patch embedding")]
    masks = {}
    for block in range(blocks):
        for role, (K, N) in shapes.items():
            name = f"/blocks/blocks.{block}/{nodes[role]}/MatMul"
            score = rng.random((K, N), np.float32)
            masks[name] = two_four_mask(score) if pattern == "2:4" else block_mask(score, (32, 32), 0.6)
            held_back = block == blocks - 1 and role in ("fc2", "proj")
            layers.append(_pruned(name, role, block, K, N, pattern, masks[name], rng.uniform(21, 39), held_back))
    layers.append(_left_alone("/head/Gemm", "head", width, 1000, 8, "the head"))
    plan = Plan(
        tool_version="0.1.0",
        model_sha256="9f" * 32,
        target="a100",
        compute_type="fp16",
        opset=19,
        block_shape=(32, 32) if pattern == "block" else None,
        recipe={"target": "a100", "precision": "int8", "sparsity": pattern},
        layers=layers,
    )
    plan.masks.update(masks)
    return plan


def _left_alone(name: str, role: str, K: int, N: int, M: int, words: str) -> LayerPlan:
    return LayerPlan(
        name=name,
        role=role,
        K=K,
        N=N,
        M=M,
        sparsity=SparsityDecision(asked="2:4", reason=f"left dense: {words} is not pruned"),
        precision=PrecisionDecision(
            asked="auto", dtype="fp16", reason=f"fp16: {words} is not quantized by default, it costs accuracy"
        ),
    )


def _pruned(
    name: str, role: str, block: int, K: int, N: int, pattern: str, mask: np.ndarray, sqnr: float, held_back: bool
) -> LayerPlan:
    small = "though it does not pay: 2:4 pays on a100 from K = 256 and N = 256; this layer is"
    why = f"asked for: --sparsity {pattern}, {small} {K} × {N}; the pruned layer's output keeps {sqnr / 3:.1f} dB"
    precision = PrecisionDecision(
        asked="auto",
        dtype="int8",
        activation_scale=0.03,
        sqnr_db=round(sqnr, 2),
        reason=f"int8: the output keeps {sqnr:.1f} dB of signal to noise (threshold 20 dB)",
    )
    if held_back:
        precision = PrecisionDecision(
            asked="auto",
            dtype="fp16",
            sqnr_db=15.3,
            reason="fp16: int8 would leave 15.3 dB of signal to noise, below 20 dB",
        )
    return LayerPlan(
        name=name,
        role=role,
        block=block,
        K=K,
        N=N,
        M=TOKENS,
        sparsity=SparsityDecision(
            asked=pattern, pattern=pattern, zeros=float(1 - mask.mean()), method="activation", reason=why
        ),
        precision=precision,
        recovery=_recovered(role, sqnr) if not held_back else _kept(),
    )


def _recovered(role: str, sqnr: float) -> RecoveryDecision:
    return RecoveryDecision(
        method="reconstruct",
        fits="residual stream" if role in ("proj", "fc2") else "layer output",
        ridge=2.0,
        error_before=10 / sqnr,
        error_after=3 / sqnr,
        reason="the ridge of 2 mean input energies left the least error",
    )


def _kept() -> RecoveryDecision:
    return RecoveryDecision(reason="the error on held-out samples rose from 0.12 to 0.14 by the fit")


def sample_pruning(plan: Plan, *, seed: int = 0) -> Pruning:
    """How the blocks of `plan` were found: a curve for every layer that has a mask."""
    rng = np.random.default_rng(seed)
    assert plan.block_shape is not None
    curves = {}
    for name, mask in plan.masks.items():
        survivors = mask[:: plan.block_shape[0], :: plan.block_shape[1]]
        share = np.linspace(0, 1, survivors.size + 1)
        curves[name] = ChosenPoint(rng.uniform(1, 5) * share**3 - 0.05 * share, int((~survivors).sum()))
    return Pruning(
        asked="block",
        masks=plan.masks,
        method="δ-curve",
        notes=["the predicted damage is small: one-shot"],
        analysis=Analysis(
            objective="top1",
            samples=640,
            kappa=1.25e-7,
            allocator="exact",
            search="one-shot",
            measure="flops",
            keep=0.65,
            predicted_damage=0.0312,
            curves=curves,
        ),
    )


def sample_attention(blocks: int = 12, heads: int = 3, side: int = 14, *, seed: int = 0) -> AttentionMaps:
    """Attention of a ViT: the last head of the last block inactive afterwards, the first block gone."""
    rng = np.random.default_rng(seed)
    made = []
    for block in range(blocks):
        dense, small = (rng.dirichlet(np.full(side * side, 0.3), heads) for _ in range(2))
        last = block == blocks - 1
        if last:
            small[-1] = 1 / (side * side + 1)
        maps = [
            HeadMaps(weights.reshape(heads, side, side).astype(np.float32), inactive)
            for weights, inactive in ((dense, []), (small, [heads - 1] if last else []))
        ]
        name = f"/blocks/blocks.{block}/attn/Softmax"
        made.append(BlockAttention(name, "class token", maps[0], None if block == 0 else maps[1]))
    return AttentionMaps(made)


def sample_engine(plan: Plan, *, other_precision: Sequence[str] = ()) -> EngineInfo:
    """The engine of `plan`; layers named in `other_precision` run in fp16 whatever was asked."""
    records = [
        LayerRecord(
            name=f"__mye_{index}_gemm",
            kind="gemm",
            precision="fp16" if layer.name in other_precision else layer.precision.dtype,
            tactic="__myelin_CASK_STUB",
            onnx_nodes=[layer.name, f"{layer.name}_bias"],
        )
        for index, layer in enumerate(plan.layers)
    ]
    records += [LayerRecord(name=f"__mye_k{index}", kind="kgen", precision="fp16") for index in range(37)]
    return EngineInfo(
        backend="tensorrt_rtx",
        target=plan.target,
        compute_capability="8.0",
        file="tensorrt_rtx-a100.engine",
        sha256="c4" * 32,
        size_bytes=6_312_448,
        versions={"tensorrt_rtx": "1.7.0.11"},
        build_seconds=11.42,
        layers=records,
    )


def sample_report(
    plan: Plan,
    *,
    engine: EngineInfo | None = None,
    engine_section: object = None,
    labelled: bool = True,
    classifier: bool = True,
    pruning: Pruning | None = None,
    attention: AttentionMaps | None = None,
    **changes: object,
) -> Report:
    """The report of a run that carried `plan` out; `engine` None: it was not built; `changes` replace whole fields."""
    linear = sum(layer.flops for layer in plan.layers)
    remaining = round(sum(layer.flops * (1 - layer.sparsity.zeros) for layer in plan.layers))
    products = linear // 9
    images = {
        "kind": "images",
        "labelled": labelled,
        "preprocess": "size 224 224, crop_pct 0.9, crop_mode center, interpolation bicubic, mean 0.485 0.456 0.406, "
        "std 0.229 0.224 0.225, scale 0.00392157, channels RGB",
        "preprocess_from": "model metadata",
    }
    fields: dict[str, object] = {
        "tool_version": "0.1.0",
        "created": "2026-09-01T12:00:00+00:00",
        "command": "compress deit_tiny_patch16_224.onnx --target a100 --sparsity 2:4 --calibration-data images/ "
        "--labels labels.csv -o out",
        "notes": ["fidelity is measured on every fifth calibration sample, held out (160 of 800)"],
        "warnings": [
            "the drop is known to -0.31 to 1.87 points only, an interval wider than the budget of 1: more held-out "
            "images would settle it"
        ],
        "model": ModelSection(
            file="deit_tiny_patch16_224.onnx",
            sha256=plan.model_sha256,
            size_bytes=22_981_730,
            parameters=5_717_416,
            opset_before=17,
            opset_after=19,
            inputs=[TensorInfo(name="pixel_values", dtype="float", shape=["batch", 3, 224, 224])],
            outputs=[TensorInfo(name="logits", dtype="float", shape=["batch", 1000])],
            io_types="keep",
        ),
        "target": TargetSection(
            name="a100", title="NVIDIA A100 (SXM4 80 GB)", compute_capability="8.0", compute_type="fp16"
        ),
        "data": DataSection(
            calibration=DataSource(source="images", samples=640, skipped=2, **images),
            held_out=DataSource(source="images", samples=160, **images),
            held_out_from="every fifth calibration sample, held out (160 of 800)",
        ),
        "size": SizeSection(dense_bytes=22_981_730, compressed_bytes=6_212_345, compressed_percent=27.031),
        "flops": FlopsSection(
            batch=8,
            linear_dense_flops=linear,
            linear_remaining_flops=remaining,
            attention_flops=products,
            linear_remaining_fraction=remaining / linear,
            model_remaining_fraction=(remaining + products) / (linear + products),
        ),
        "layers": layer_rows(plan, engine, pruning=pruning),
        "pruning": pruning_section(pruning),
        "attention": attention_section(attention),
        "fidelity": _fidelity(labelled, classifier),
        "budget": BudgetSection(
            max_drop_points=1.0,
            typed=False,
            measure="expected",
            drop_points=0.78,
            low_points=-0.31,
            high_points=1.87,
            met=True,
            warning="the drop is known to -0.31 to 1.87 points only",
        )
        if classifier
        else None,
        "profiles": [_profile("dense", 18.4), _profile("compressed", 11.9)],
        "speedups": [
            SpeedupRow(
                device="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
                batch=1,
                median_ratio=1.546,
                low_ratio=1.48,
                high_ratio=1.61,
                rounds=10,
            )
        ],
        "engine": engine_section or _engine(engine),
        "host": HostSection(
            cpu="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            threads=2,
            platform="Linux x86_64",
            versions={"python": "3.11.2", "onnxruntime": "1.31.1"},
        ),
        "run": RunSection(
            stage_seconds={
                "load": 1.2,
                "data": 0.4,
                "analyse and decide": 38.2,
                "apply": 0.9,
                "write": 0.2,
                "build": 11.6,
                "measure": 21.3,
            },
            peak_memory_bytes=1_734_000_000,
        ),
        "outputs": [
            OutputFile(name="model.onnx", what="the compressed model", size_bytes=6_212_345),
            OutputFile(name="plan.json", what="every layer's decision and its reason", size_bytes=48_112),
            OutputFile(
                name="plan.safetensors",
                what="masks, scales and changed weights that belong to the plan",
                size_bytes=702_113,
            ),
            OutputFile(name="report.json", what="this report, for programs"),
            OutputFile(name="report.html", what="this report, for people"),
        ],
    }
    return Report.model_validate(fields | changes)


def _fidelity(labelled: bool, classifier: bool) -> FidelitySection:
    answers = {
        "agreement_percent": 95.625,
        "expected_drop_points": 0.78,
        "expected_drop_low_points": -0.31,
        "expected_drop_high_points": 1.87,
    }
    accuracy = {
        "top1_dense_percent": 77.5,
        "top1_compressed_percent": 76.875,
        "top5_dense_percent": 93.75,
        "top5_compressed_percent": 93.125,
        "measured_drop_points": 0.625,
        "measured_drop_low_points": -1.4,
        "measured_drop_high_points": 2.6,
        "only_dense_right": 3,
        "only_compressed_right": 2,
    }
    fields = (answers if classifier else {}) | (accuracy if classifier and labelled else {})
    return FidelitySection(samples=160, cosine=0.98734, sqnr_db=16.2, **fields)


def sample_profile(label: str = "compressed", latency_ms: float = 10.0, **fields: Any) -> Profile:
    """Return a measured profile whose latencies are all `latency_ms`; `fields` replace what else it has."""
    latencies = {f"latency_{name}_ms": latency_ms for name in ("min", "median", "mean", "p90", "p99", "max")}
    others: dict[str, Any] = {
        "backend": "onnxruntime",
        "device": "a CPU",
        "batch": 8,
        "threads": 2,
        "spread": 0.1,
        "throughput_per_s": 8000 / latency_ms,
        "runs": 600,
        "blocks": 3,
        "disturbed_blocks": 0,
        "discarded_blocks": 0,
        "block_medians_ms": [latency_ms] * 3,
        "conditions": Conditions(cpu="a CPU", cpus=2, warm_up_seconds=0.5, block_seconds=2),
    }
    return Profile(label=label, **latencies, **others | fields)


def _profile(label: str, median_ms: float) -> ProfileRow:
    return ProfileRow(
        label=label,
        device="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        what="the model's float32 twin on this host's CPU: says nothing about the speed of a100",
        batch=1,
        threads=2,
        latency_min_ms=median_ms * 0.96,
        latency_median_ms=median_ms,
        latency_p90_ms=median_ms * 1.07,
        latency_p99_ms=median_ms * 1.32,
        spread_percent=3.1,
        throughput_per_s=1000 / median_ms,
        runs=171,
        blocks=10,
        discarded_blocks=1,
        warm_up_seconds=0.5,
    )


def _engine(info: EngineInfo | None) -> EngineSection:
    if info is None:
        reason = (
            "not built here: only an AGX Orin builds for agx-orin-64gb; copy model.onnx there and run\n"
            "trtexec --onnx=model.onnx --saveEngine=model.engine \\\n    --stronglyTyped --sparsity=enable\n"
            "trtexec --loadEngine=model.engine --useCudaGraph"
        )
        return EngineSection(built=False, not_built_reason=reason)
    return EngineSection(
        built=True,
        backend=info.backend,
        file=f"engines/{info.file}",
        sha256=info.sha256,
        size_bytes=info.size_bytes,
        compute_capability=info.compute_capability,
        versions=info.versions,
        build_seconds=info.build_seconds,
        layer_counts=layer_counts(info.layers),
        warnings=list(info.warnings),
    )
