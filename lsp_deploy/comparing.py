"""Two models side by side, or one alone: fidelity on the same images, latency and power in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from lsp_deploy import console
from lsp_deploy.engines.fidelity import Fidelity
from lsp_deploy.engines.profiler import Profile
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.data import Dataset
    from lsp_deploy.engines.power.recording import PowerRecorder
    from lsp_deploy.engines.protocol import Engine
    from lsp_deploy.hardware.target import Target

__all__ = ["Comparison", "LayerFidelity", "compare_models", "profile_model"]

DEFAULT_BATCHES = (1, 8)
Shapes = Mapping[str, tuple[int, ...]]


class LayerFidelity(BaseModel):
    """Signal to noise of one linear layer's output, compressed against dense."""

    name: str
    sqnr_db: float


class Comparison(BaseModel):
    """What `compare` measured."""

    dense: str
    compressed: str
    data: str
    fidelity: Fidelity
    profiles: list[Profile] = Field(description="dense and compressed at every batch size")
    layers: list[LayerFidelity] = Field(default_factory=list)


def compare_models(
    dense: Path,
    compressed: Path,
    *,
    data: str,
    labels: str | None,
    label_column: str | None,
    preprocess: str | None,
    samples: int | None,
    batches: Sequence[int] | None,
    shapes: Shapes | None,
    layers: bool,
    threads: int,
    target: str = "cpu",
    plugins: Sequence[Path] = (),
    rate_per_s: float | None = None,
    power: bool | None = None,
) -> Comparison:
    """Compare `compressed` with `dense`: answers on the same data, latency and power in alternating blocks of one run.

    On a CPU 16-bit models run as float32 twins: their time says nothing about a GPU's. For a GPU both models are built
    for `target` and timed there, and the answers of the compressed engine are compared with those of the dense model
    in ONNX Runtime. `rate_per_s` and `power` are as in `profile_model`.

    Raises:
        UserError: models whose inputs differ, data that does not fit them, a target that is not here, or no meter
            where power is wanted.
    """
    from lsp_deploy.engines.fidelity import run_dataset
    from lsp_deploy.gpu_engines import is_engine_file
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.model import load_model, resolve_shapes
    from lsp_deploy.recipe import NAMED_DATA
    from lsp_deploy.steps.calibration import NAMED_SAMPLES, open_named, warn_assumed_preprocess
    from lsp_deploy.steps.evaluation import Evaluator

    if engine := next((path for path in (dense, compressed) if is_engine_file(path)), None):
        raise UserError(f"{engine} is an engine: compare takes ONNX files, and builds for --target itself")
    models = {"dense": load_model(dense), "compressed": load_model(compressed)}
    _check_same_inputs(models, dense, compressed)
    resolved = resolve_shapes(models["dense"], shapes, batch=DEFAULT_BATCHES[-1])
    dataset, preprocess_from = open_named(
        models["dense"],
        resolved,
        data,
        preprocess=preprocess,
        labels=labels,
        label_column=label_column,
        samples=samples or (NAMED_SAMPLES if data in NAMED_DATA else None),
        seed=0,
    )
    warn_assumed_preprocess(dataset, preprocess_from)
    evaluator = Evaluator(models["dense"], models["dense"], dataset, batch=DEFAULT_BATCHES[-1], threads=threads)
    paths = {"dense": dense, "compressed": compressed}
    batches = batches or _default_batches(models["dense"], shapes)
    runs_on = load_target(target)
    with _engines(paths, models, runs_on, shapes, (*batches, evaluator.batch), threads, plugins) as engines:
        description = f"compressed model on {runs_on.title}"
        outputs = run_dataset(
            engines["compressed"], dataset, evaluator.batch, evaluator.output, description=description
        )
        profiles = _profiles(engines, dataset, batches, threads, runs_on, rate_per_s=rate_per_s, power=power)
    return Comparison(
        dense=str(dense),
        compressed=str(compressed),
        data=f"{data}: {len(dataset)} samples",
        fidelity=evaluator.compare(outputs),
        profiles=profiles,
        layers=_layers(models, resolved, dataset, threads) if layers else [],
    )


def profile_model(
    model: Path,
    target: str,
    *,
    batches: Sequence[int] | None,
    shapes: Shapes | None,
    threads: int,
    duration: float,
    warm_up: float,
    plugins: Sequence[Path] = (),
    weights: Path | None = None,
    rate_per_s: float | None = None,
    power: bool | None = None,
) -> list[Profile]:
    """Measure one model's latency, throughput and power on this host at every batch size.

    Args:
        model: ONNX file, or a built engine.
        target: name of the device that runs it: cpu, or the GPU of this machine.
        batches: batch sizes; None: that of `shapes`, the model's own, or 1 and 8, of an engine 1.
        shapes: of its inputs, for what the model leaves open.
        threads: CPU threads.
        duration: seconds of measuring; with a power meter three of its windows at least.
        warm_up: seconds before.
        plugins: libraries that a GPU's engine needs.
        weights: ONNX file whose weights a GPU's engine takes, as one that was built without needs.
        rate_per_s: requests a second; None: back-to-back.
        power: True: a meter must be there; None: where there is one; False: no.

    Raises:
        UserError: a target that is not here, weights for what takes none, or no meter where power is wanted.
    """
    from lsp_deploy.data import open_dataset
    from lsp_deploy.gpu_engines import engine_shapes, is_engine_file
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.model import load_model, resolve_shapes

    runs_on = load_target(target)
    paths = {model.name: model}
    models = {} if is_engine_file(model) else {model.name: load_model(model)}
    loaded = models.get(model.name)
    if weights is not None and (loaded is not None or runs_on.kind != "gpu"):
        raise UserError(f"--weights is for engines of a GPU; {model} has its own")
    sizes = batches or (_default_batches(loaded, shapes) if loaded is not None else (1,))
    with _engines(paths, models, runs_on, shapes, sizes, threads, plugins, weights) as engines:
        (engine,) = engines.values()
        if loaded is None and not batches:
            sizes = (_own_batch(engine),)
        dataset = open_dataset(
            "random",
            shapes=engine_shapes(engine, shapes) if loaded is None else resolve_shapes(loaded, shapes, batch=1),
            dtypes={name: spec.dtype for name, spec in engine.inputs.items()},
            preprocess=None,
            samples=max(sizes),
            seed=0,
        )
        return _profiles(
            engines,
            dataset,
            sizes,
            threads,
            runs_on,
            duration=duration,
            warm_up=warm_up,
            rate_per_s=rate_per_s,
            power=power,
        )


def _check_same_inputs(models: Mapping[str, ir.Model], dense: Path, compressed: Path) -> None:
    from lsp_deploy.model import input_shapes

    names = [list(input_shapes(model)) for model in models.values()]
    if names[0] != names[1]:
        raise UserError(f"{dense} takes {', '.join(names[0])} but {compressed} takes {', '.join(names[1])}")


def _default_batches(model: ir.Model, shapes: Shapes | None) -> Sequence[int]:
    """Return the batch sizes to time where none are named: that of the shapes, or the model's own if it is fixed."""
    from lsp_deploy.model import input_shapes

    name, declared = next(iter(input_shapes(model).items()))
    batch = (shapes or {}).get(name, declared)[0]
    return (batch,) if isinstance(batch, int) else DEFAULT_BATCHES


def _own_batch(engine: Engine) -> int:
    """Return the batch size that an engine is built for, 1 where it takes several."""
    batch = next(iter(engine.inputs.values())).shape[:1]
    return batch[0] if batch and isinstance(batch[0], int) else 1


@contextmanager
def _engines(
    paths: Mapping[str, Path],
    models: Mapping[str, ir.Model],
    target: Target,
    shapes: Shapes | None,
    batches: Sequence[int],
    threads: int,
    plugins: Sequence[Path],
    weights: Path | None = None,
) -> Iterator[Mapping[str, Engine]]:
    """Open models, or engine files where there is no model of that label, on the target."""
    from contextlib import ExitStack

    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeEngine
    from lsp_deploy.gpu_engines import build_options, gpu_engines

    if target.kind == "gpu":
        options = build_options(next(iter(models.values()), None), shapes, batches, plugins)
        with gpu_engines(paths, target, options, weights) as engines:
            yield engines
        return
    with ExitStack() as stack:
        sessions = {
            label: stack.enter_context(
                OnnxRuntimeEngine.from_model(models[label], threads=threads, float32_twin=True)
                if label in models
                else OnnxRuntimeBackend().load(_cpu_engine(path))
            )
            for label, path in paths.items()
        }
        for label, session in sessions.items():
            for warning in session.describe().warnings:
                console.warn(f"{label}: {warning}")
            if label in models and _has_float16(models[label]):
                console.warn(f"{label}: its 16-bit floats run as float32 on a CPU; the times say nothing about a GPU's")
        yield sessions


def _has_float16(model: ir.Model) -> bool:
    """Return whether a model is one for GPUs: on a CPU only operators of ours take 16-bit floats, in bfloat16."""
    import onnx_ir as ir

    types = {value.dtype for graph in model.graphs() for value in graph.initializers.values()}
    return ir.DataType.FLOAT16 in types


def _cpu_engine(path: Path) -> Path:
    from lsp_deploy.engines.protocol import read_sidecar

    info = read_sidecar(path) if path.is_file() else None
    if info is not None and info.backend != "onnxruntime":
        raise UserError(f"{path} runs on a GPU: name it with --target")
    return path


def _profiles(
    engines: Mapping[str, Engine],
    dataset: Dataset,
    batches: Sequence[int],
    threads: int,
    target: Target,
    *,
    duration: float = 3.0,
    warm_up: float = 0.5,
    rate_per_s: float | None = None,
    power: bool | None = None,
) -> list[Profile]:
    from lsp_deploy.engines.power.finding import power_recorder
    from lsp_deploy.engines.profiler import profile

    results: list[Profile] = []
    with power_recorder(target.kind, power) as recorder, console.progress(_doing(recorder), len(batches)) as advance:
        for batch in batches:
            feeds = dataset.batch(batch)
            measured = profile(
                engines,
                feeds,
                threads=threads if target.kind == "cpu" else 1,  # the one that launches
                duration=duration,
                warm_up=warm_up,
                rate_per_s=rate_per_s,
                power=recorder,
            )
            results.extend(measured.values())
            advance(1)
    return results


def _doing(recorder: PowerRecorder) -> str:
    """Return what is done, and why it takes so long where it does."""
    return f"profiling, power in windows of {recorder.window_s:g} s" if recorder.window_s else "profiling"


def _layers(models: Mapping[str, ir.Model], shapes: Shapes, dataset: Dataset, threads: int) -> list[LayerFidelity]:
    from lsp_deploy.engines.fidelity import layer_sqnr
    from lsp_deploy.linear_layers import linear_layers
    from lsp_deploy.passes.lower_operators import LowerOperatorsPass
    from lsp_deploy.passes.to_float32 import ToFloat32Pass

    twins = {label: model.clone() for label, model in models.items()}
    for twin in twins.values():
        ToFloat32Pass()(twin)
        LowerOperatorsPass()(twin)  # our operators hold bias and activation too: a layer's own output is inside
    found = {label: linear_layers(twin, shapes) for label, twin in twins.items()}
    by_name = {layer.name: layer for layer in found["compressed"]}
    pairs = {
        layer.name: (str(layer.y.name), str(by_name[layer.name].y.name))
        for layer in found["dense"]
        if layer.name in by_name and (by_name[layer.name].K, by_name[layer.name].N) == (layer.K, layer.N)
    }
    if not pairs:
        raise UserError("--layers: the two models have no linear layer of the same name and size")
    if left_out := [layer.name for layer in found["dense"] if layer.name not in pairs]:
        console.say(
            f"--layers leaves out {len(left_out)} of {len(found['dense'])} linear layers, which the compressed model "
            f"does not have or has in another size: {', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}"
        )
    measured = layer_sqnr(twins["dense"], twins["compressed"], pairs, dataset, threads=threads)
    return [LayerFidelity(name=name, sqnr_db=value) for name, value in measured.items()]
