"""From the results of a run to its report."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy import __version__
from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.reporting.attention_levels import attention_section
from lsp_deploy.reporting.execution_rows import attention_execution, linear_time, operator_words
from lsp_deploy.reporting.judgement import budget_section, run_warnings
from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.reporting.power_rows import power_section
from lsp_deploy.reporting.pruning_rows import pruning_section
from lsp_deploy.reporting.report import Report
from lsp_deploy.reporting.sections import (
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

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.allocation.pruning import Pruning
    from lsp_deploy.data import Dataset
    from lsp_deploy.engines.fidelity import Fidelity
    from lsp_deploy.engines.profiler import Profile
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.passes.remove_dead_structure import DeadStructure, SmallerLayer
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.attention_maps import AttentionMaps
    from lsp_deploy.steps.building import Built
    from lsp_deploy.steps.calibration import CalibrationData
    from lsp_deploy.steps.measuring import Measured
    from lsp_deploy.steps.output_folder import OutputFolder
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["assemble"]

_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxruntime")


def assemble(
    prepared: PreparedModel,
    data: CalibrationData,
    plan: Plan,
    removed: DeadStructure,
    target: Target,
    recipe: Recipe,
    built: Built,
    measured: Measured,
    stage_seconds: Mapping[str, float],
    output: OutputFolder,
    command: str,
    *,
    pruning: Pruning | None = None,
    attention: AttentionMaps | None = None,
) -> Report:
    """Return the report of a run whose model, plan and engine are written into `output`.

    `pruning` is how the plan's zeros were found, None where a plan was carried out; `attention` is what the heads of
    both models attend to, None where they cannot be compared.
    """
    layers = layer_rows(plan, built.info, removed, pruning)
    budget = budget_section(measured.fidelity, recipe)
    attended = attention_execution(plan.attention)
    needs = operator_words(layers, attended, on_gpu=target.kind == "gpu")
    profiles = [_profile(profile, label, target) for label, profile in measured.profiles.items()]
    return Report(
        tool_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        notes=[*data.notes, *([needs] if needs else [])],
        warnings=run_warnings(data, layers, budget, built, measured.fidelity, measured.profiles.values()),
        model=_model(prepared, plan),
        target=TargetSection(
            name=target.name,
            title=target.title,
            compute_capability=target.compute_capability,
            compute_type=plan.compute_type,
            sha256=target.sha256,
        ),
        data=_data(prepared, data, recipe),
        size=_size(prepared, output),
        flops=_flops(prepared, plan, removed),
        layers=layers,
        linear_time=linear_time(plan, _batch(prepared)),
        attention_execution=attended,
        pruning=pruning_section(pruning),
        attention=attention_section(attention),
        fidelity=_fidelity(measured.fidelity),
        budget=budget,
        profiles=profiles,
        speedups=_speedups(measured.profiles),
        power=power_section(measured.profiles),
        engine=_engine(built, output),
        host=_host(measured.profiles),
        run=RunSection(stage_seconds=dict(stage_seconds), peak_memory_bytes=_peak_memory_bytes()),
        outputs=_outputs(output, built),
    )


def _model(prepared: PreparedModel, plan: Plan) -> ModelSection:
    original = prepared.original
    tensors = [value.const_value for value in original.graph.initializers.values() if value.const_value is not None]
    return ModelSection(
        file=prepared.path.name,
        sha256=prepared.sha256,
        size_bytes=_model_bytes(prepared),
        parameters=sum(int(tensor.size) for tensor in tensors),
        opset_before=original.opset_imports[""],
        opset_after=plan.opset,
        inputs=[_tensor(value) for value in original.graph.inputs if not value.is_initializer()],
        outputs=[_tensor(value) for value in original.graph.outputs],
        io_types=plan.io_types,
    )


def _tensor(value: ir.Value) -> TensorInfo:
    dimensions = () if value.shape is None else value.shape
    shape = [size if isinstance(size, int) else str(size.value or "?") for size in dimensions]
    return TensorInfo(name=str(value.name), dtype=value.dtype.name.lower() if value.dtype else "unknown", shape=shape)


def _data(prepared: PreparedModel, data: CalibrationData, recipe: Recipe) -> DataSection:
    words = _preprocess_words(prepared, recipe)
    return DataSection(
        calibration=_source(data.calibration, words, data.preprocess_from),
        held_out=_source(data.held_out, words, data.preprocess_from),
        held_out_from=data.held_out_from,
    )


def _source(dataset: Dataset, preprocess: str, preprocess_from: str) -> DataSource:
    images = dataset.kind == "images"
    return DataSource(
        source=dataset.name,
        kind=dataset.kind,
        samples=len(dataset),
        skipped=dataset.skipped,
        labelled=dataset.labels is not None,
        preprocess=preprocess if images else None,
        preprocess_from=preprocess_from if images else None,
        identity=dataset.identity,
    )


def _preprocess_words(prepared: PreparedModel, recipe: Recipe) -> str:
    from lsp_deploy.data import image_size, load_preprocess

    size = image_size(prepared.shapes.opt)
    settings, _ = load_preprocess(recipe.preprocess, prepared.original.metadata_props, size)
    words = []
    for key, value in settings.model_dump(exclude_none=True).items():
        numbers = value if isinstance(value, tuple) else (value,)
        words.append(f"{key} {' '.join(f'{one:.6g}' if isinstance(one, float) else str(one) for one in numbers)}")
    return ", ".join(words)


def _model_bytes(prepared: PreparedModel) -> int:
    import onnx_ir as ir

    tensors = [value.const_value for value in prepared.original.graph.initializers.values()]
    external = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sum(path.stat().st_size for path in (prepared.path, *external))


def _size(prepared: PreparedModel, output: OutputFolder) -> SizeSection:
    dense = _model_bytes(prepared)
    compressed = sum(path.stat().st_size for path in _written_model(output))
    return SizeSection(
        dense_bytes=dense, compressed_bytes=compressed, compressed_percent=round(100 * compressed / dense, 3)
    )


def _written_model(output: OutputFolder) -> list[Path]:
    return [path for path in (output.model, output.model.with_name(f"{output.model.name}.data")) if path.exists()]


def _flops(prepared: PreparedModel, plan: Plan, removed: DeadStructure) -> FlopsSection:
    dense = sum(layer.flops for layer in plan.layers)
    smaller = {layer.name: layer for layer in removed.removed}
    remaining = round(sum(_remaining_flops(layer, plan, smaller.get(layer.name)) for layer in plan.layers))
    attention = prepared.attention_flops
    return FlopsSection(
        batch=_batch(prepared),
        linear_dense_flops=dense,
        linear_remaining_flops=remaining,
        attention_flops=attention,
        linear_remaining_fraction=remaining / dense,
        model_remaining_fraction=(remaining + attention) / (dense + attention),
    )


def _batch(prepared: PreparedModel) -> int:
    return next(iter(prepared.shapes.opt.values()))[0]


def _remaining_flops(layer: LayerPlan, plan: Plan, smaller: SmallerLayer | None) -> float:
    if smaller is None:
        return layer.flops * (1 - layer.sparsity.zeros)
    K, N = smaller.after
    mask = plan.masks.get(layer.name)
    weights = K * N if mask is None else int(mask[smaller.rows][:, smaller.columns].sum())
    return 2 * layer.M * weights


def _fidelity(fidelity: Fidelity) -> FidelitySection:
    return FidelitySection(
        samples=fidelity.samples,
        top1_dense_percent=fidelity.dense_top1_percent,
        top1_compressed_percent=fidelity.compressed_top1_percent,
        top5_dense_percent=fidelity.dense_top5_percent,
        top5_compressed_percent=fidelity.compressed_top5_percent,
        agreement_percent=fidelity.agreement_percent,
        cosine=fidelity.cosine,
        sqnr_db=fidelity.sqnr_db,
        non_finite_samples=fidelity.non_finite_samples,
        expected_drop_points=fidelity.expected_drop_points,
        expected_drop_low_points=fidelity.expected_drop_low_points,
        expected_drop_high_points=fidelity.expected_drop_high_points,
        measured_drop_points=fidelity.measured_drop_points,
        measured_drop_low_points=fidelity.measured_drop_low_points,
        measured_drop_high_points=fidelity.measured_drop_high_points,
        only_dense_right=fidelity.only_dense_right,
        only_compressed_right=fidelity.only_compressed_right,
    )


def _profile(profile: Profile, label: str, target: Target) -> ProfileRow:
    if target.kind == "cpu":
        what = "the model on its target"
    else:
        what = f"the model's float32 twin on this host's CPU: says nothing about the speed of {target.name}"
    return ProfileRow(
        label="dense" if label == "dense" else "compressed",
        device=profile.device,
        what=what,
        batch=profile.batch,
        threads=profile.threads,
        latency_min_ms=profile.latency_min_ms,
        latency_median_ms=profile.latency_median_ms,
        latency_p90_ms=profile.latency_p90_ms,
        latency_p99_ms=profile.latency_p99_ms,
        spread_percent=100 * profile.spread,
        throughput_per_s=profile.throughput_per_s,
        runs=profile.runs,
        blocks=profile.blocks,
        discarded_blocks=profile.discarded_blocks,
        warm_up_seconds=profile.conditions.warm_up_seconds,
        governor=profile.conditions.governor,
    )


def _speedups(profiles: Mapping[str, Profile]) -> list[SpeedupRow]:
    from lsp_deploy.engines.profiler import latency_ratio

    if not {"dense", "compressed"} <= profiles.keys():
        return []
    dense, compressed = profiles["dense"], profiles["compressed"]
    ratio = latency_ratio(dense, compressed)
    return [
        SpeedupRow(
            device=compressed.device,
            batch=compressed.batch,
            median_ratio=ratio.median,
            low_ratio=ratio.low,
            high_ratio=ratio.high,
            rounds=ratio.rounds,
        )
    ]


def _engine(built: Built, output: OutputFolder) -> EngineSection:
    from lsp_deploy.engines.protocol import layer_counts

    info = built.info
    if info is None:
        return EngineSection(built=False, not_built_reason=built.not_built)
    path = output.engine(info.backend, info.target)
    return EngineSection(
        built=True,
        backend=info.backend,
        file=path.relative_to(output.path).as_posix(),
        sha256=info.sha256,
        size_bytes=info.size_bytes,
        compute_capability=info.compute_capability,
        versions=info.versions,
        build_seconds=info.build_seconds,
        layer_counts=layer_counts(info.layers),
        warnings=list(info.warnings),
    )


def _host(profiles: Mapping[str, Profile]) -> HostSection:
    from lsp_deploy.engines.host import available_cpus, cpu_model

    threads = next((profile.threads for profile in profiles.values() if profile.threads), None)
    return HostSection(
        cpu=cpu_model(),
        threads=threads or len(available_cpus()),
        platform=f"{platform.system()} {platform.machine()}",
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    )


def _peak_memory_bytes() -> int:
    """Return the largest resident set of this process or of a child that ended, whichever is larger."""
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) * unit


def _outputs(output: OutputFolder, built: Built) -> list[OutputFile]:
    from lsp_deploy.engines.protocol import sidecar_path

    files = [(path, "the compressed model") for path in _written_model(output)]
    files += [
        (output.plan, "every layer's decision and its reason; edit it, and --plan carries it out"),
        (output.plan.with_suffix(".safetensors"), "masks, scales and changed weights that belong to the plan"),
    ]
    if built.info is not None:
        engine = output.engine(built.info.backend, built.info.target)
        files += [(engine, "the engine"), (sidecar_path(engine), "what the engine is, with its layer table")]
    written = [
        OutputFile(name=path.relative_to(output.path).as_posix(), what=what, size_bytes=path.stat().st_size)
        for path, what in files
        if path.exists()
    ]
    reports = (("report.json", "this report, for programs"), ("report.html", "this report, for people"))
    return [*written, *(OutputFile(name=name, what=what) for name, what in reports)]
