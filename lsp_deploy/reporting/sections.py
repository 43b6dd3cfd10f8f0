"""The parts of a report. Units are in the names; `basis` says whether numbers were measured, counted or estimated."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy.plan import Pattern

__all__ = [
    "AttentionBlock",
    "AttentionSection",
    "Basis",
    "BudgetSection",
    "DataSection",
    "DataSource",
    "EngineLayer",
    "EngineSection",
    "FidelitySection",
    "FlopsSection",
    "HostSection",
    "LayerBlocks",
    "LayerPrecision",
    "LayerRecovery",
    "LayerRow",
    "LayerSparsity",
    "LayerStructure",
    "ModelSection",
    "OutputFile",
    "PowerRow",
    "PowerSection",
    "ProfileRow",
    "PruningSection",
    "RunSection",
    "Section",
    "SizeSection",
    "SpeedupRow",
    "TargetSection",
    "TensorInfo",
]

Basis = Literal["measured", "counted", "estimated"]


class Section(BaseModel):
    """What all parts have in common: no unknown keys, no change after they are made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorInfo(Section):
    """An input or output of the model."""

    name: str = Field(description="its name in the graph")
    dtype: str = Field(description="element type")
    shape: list[int | str] = Field(description="dimensions; a name or ? where dynamic")


class ModelSection(Section):
    """The model that went in, and what changed at its border."""

    file: str = Field(description="name of the input file")
    sha256: str = Field(description="of the input file")
    size_bytes: int = Field(ge=0, description="of the input file with its external data, measured")
    parameters: int = Field(ge=0, description="weights and other constants of the input model, counted")
    opset_before: int = Field(description="default-domain opset of the input model")
    opset_after: int = Field(description="default-domain opset of the compressed model")
    inputs: list[TensorInfo] = Field(description="of the input model; the compressed one keeps them, unless io_types")
    outputs: list[TensorInfo] = Field(description="of the input model; the compressed one keeps them, unless io_types")
    io_types: Literal["keep", "target"] = Field(description="keep, or target: its element types at inputs and outputs")


class TargetSection(Section):
    """The hardware that the model was compressed for."""

    name: str = Field(description="as in --target")
    title: str = Field(description="for people")
    compute_capability: str | None = Field(None, description='CUDA compute capability, e.g. "8.0"; null for a CPU')
    compute_type: str = Field(description="what everything not quantized computes in")
    sha256: str | None = Field(None, description="of everything that the target says; two of one hash decide alike")


class DataSource(Section):
    """One set of samples and how they were prepared."""

    source: str = Field(description="name of the folder, archive or file; synthetic, or random")
    kind: str = Field(description="images, arrays, synthetic or random")
    samples: int = Field(ge=0, description="samples used, counted")
    skipped: int = Field(0, ge=0, description="images that were asked for and did not decode, counted")
    labelled: bool = Field(description="whether every sample has a class label")
    preprocess: str | None = Field(None, description="how images became inputs; null for arrays, fed as they are")
    preprocess_from: str | None = Field(None, description="where that came from: typed, model metadata, or assumed")
    identity: str | None = Field(None, description="SHA-256 of content, preparation, order and labels")


class DataSection(Section):
    """Which samples were used for what."""

    calibration: DataSource | None = Field(description="what scales and scores were measured on")
    held_out: DataSource | None = Field(description="what fidelity was measured on")
    held_out_from: str | None = Field(None, description="where the held-out samples come from, in words")


class SizeSection(Section):
    """Files on disk."""

    basis: Literal["measured"] = Field("measured", description="sizes are of the files as they lie on disk")
    dense_bytes: int = Field(ge=0, description="the input model, external data included")
    compressed_bytes: int = Field(ge=0, description="the compressed model, external data included")
    compressed_percent: float = Field(ge=0, description="compressed of dense")


class FlopsSection(Section):
    """Work per inference at the opt shapes; a multiply-add counts as two."""

    basis: Literal["counted"] = Field("counted", description="from shapes and masks; no device was timed")
    batch: int = Field(ge=1, description="samples per inference at the opt shapes")
    linear_dense_flops: int = Field(ge=0, description="sum of 2·M·K·N over all linear layers")
    linear_remaining_flops: int = Field(ge=0, description="the same without what masks and dead structure save")
    attention_flops: int = Field(ge=0, description="matmuls of two activations; no mask changes them")
    linear_remaining_fraction: float = Field(ge=0, le=1, description="what --flops counts: over linear layers")
    model_remaining_fraction: float = Field(ge=0, le=1, description="what --flops-of model counts: attention too")


class LayerSparsity(Section):
    """Which zeros a layer got, and why."""

    asked: str = Field(description="auto, none, 2:4 or block")
    pattern: Pattern = Field(description="what it got")
    zeros_percent: float = Field(ge=0, le=100, description="of the weight's entries, by the mask, counted")
    method: str | None = Field(None, description="score that the mask was chosen by")
    reason: str = Field(description="why this and not more")


class LayerRecovery(Section):
    """What was done to the surviving weights; errors are relative, measured on the samples that the reason names."""

    method: Literal["none", "reconstruct"] = Field(description="none: the weights are the dense ones under the mask")
    fits: str | None = Field(None, description="what of the dense model the new weights fit; null: nothing was fitted")
    ridge: float | None = Field(None, description="strength of the pull to the old weights, in mean input energies")
    error_before: float | None = Field(None, description="squared error of what is fitted, relative, before it")
    error_after: float | None = Field(None, description="the same after it")
    reason: str = Field(description="why this")


class LayerBlocks(Section):
    """A layer's δ-curve, raw as in Eq. 11 of the LSP paper, in units of the objective, and the point chosen on it."""

    basis: Literal["estimated"] = Field("estimated", description="δ is to second order, of this layer alone")
    total: int = Field(ge=0, description="blocks of the weight, counted")
    removed: int = Field(ge=0, description="blocks that were removed, counted")
    predicted_delta: float = Field(description="δ at the chosen point")
    curve_removed: list[int] = Field(description="blocks removed at points of the curve, from 0 to all")
    curve_delta: list[float] = Field(description="δ at these points")


class LayerPrecision(Section):
    """Which element type a layer got, and why."""

    asked: str = Field(description="auto, fp32, fp16, bf16 or int8")
    dtype: str = Field(description="what the compressed model says")
    sqnr_db: float | None = Field(None, description="signal to noise of the layer's output in int8, measured")
    reason: str = Field(description="why this and not less")


class LayerExecution(Section):
    """What multiplies a layer's matrices; times are of a model of this layer alone, at the opt shapes."""

    kernel: str = Field(
        description="engine: its own MatMul; block_sparse: lsp::BlockSparseLinear; gather: stock operators that skip "
        "zero blocks; qgemm: ONNX Runtime's int8 form"
    )
    times_us: dict[str, float] = Field(description="what each way to run it takes, measured on this machine")
    threads: int | None = Field(description="that they were measured with; null: not measured")
    reason: str = Field(description="why this")


class AttentionExecution(Section):
    """What computes attention, in all layers of the network."""

    kernel: str = Field(description="engine: the operators as exported; lsp: lsp::Attention")
    compute: str = Field(description="what its products are computed in")
    times_us: dict[str, float] = Field(
        description="what each way takes in all layers that the operator computes, measured on this machine"
    )
    threads: int | None = Field(description="that they were measured with; null: not measured")
    left: dict[str, str] = Field(description="why others stay as exported, by the name of their Softmax or Attention")
    reason: str = Field(description="why this")


class LinearTimeSection(Section):
    """What the linear layers take together: sums over layers, each timed by itself at the opt shapes."""

    basis: Literal["measured"] = Field("measured", description="on this machine, shape by shape")
    batch: int = Field(ge=1, description="samples per inference at the opt shapes")
    threads: int = Field(ge=1, description="CPU threads")
    dense_ms: float = Field(ge=0, description="all layers dense, in float32, in the engine's own MatMul")
    compressed_ms: float = Field(ge=0, description="all layers the way that the plan runs them")


class LayerStructure(Section):
    """What zeros left dead in a layer: neurons, heads, or all of it; removed from the graph where they could be."""

    K: int = Field(ge=0, description="rows of W that are left in the compressed model; 0 if the layer is gone")
    N: int = Field(ge=0, description="columns of W that are left; 0 if the layer is gone")
    note: str = Field(description="what went and why, and which rows and columns of zeros stay")


class EngineLayer(Section):
    """What the engine made of a layer, from the builder's own table."""

    precision: str | None = Field(None, description="what it computes in; null where unknown")
    layer: str | None = Field(None, description="name of the engine's layer after fusion")
    kind: str | None = Field(None, description="the builder's word for it: gemm, kgen, MatMulIntegerToFloat, ...")
    tactic: str | None = Field(None, description="the builder's choice of kernel, where it names one")
    uses_two_four: bool | None = Field(None, description="whether a 2:4 kernel was chosen; null where not said")
    matches_request: bool | None = Field(None, description="whether it computes in what was asked; null: unknown")
    note: str | None = Field(None, description="what differs, or why it is unknown")


class LayerRow(Section):
    """One linear layer: y [M, N] = x [M, K] · W [K, N]."""

    name: str = Field(description="of its node in the canonical form of the model")
    role: str = Field(description="qkv, proj, fc1, fc2, patch, head or other")
    block: int | None = Field(None, description="transformer block, from 0")
    K: int = Field(description="rows of W")
    N: int = Field(description="columns of W")
    M: int = Field(description="rows of x at the opt shapes")
    flops: int = Field(description="2·M·K·N, dense, counted")
    sparsity: LayerSparsity = Field(description="its zeros")
    recovery: LayerRecovery = Field(description="its surviving weights")
    blocks: LayerBlocks | None = Field(None, description="what removing blocks does; null: not analysed")
    structure: LayerStructure | None = Field(None, description="whole rows and columns of zeros; null: there are none")
    precision: LayerPrecision = Field(description="its element type")
    execution: LayerExecution = Field(description="what was chosen to run it")
    engine: EngineLayer = Field(description="what the engine really runs")
    time_ms: float | None = Field(
        None, description="on the target, of a model of this layer alone, measured; null: not measured"
    )

    @property
    def gone(self) -> bool:
        """Whether the compressed model does not have the layer any more."""
        return self.structure is not None and self.structure.K == 0


class PruningSection(Section):
    """How zeros were chosen. What concerns blocks alone is null where none were analysed."""

    basis: Literal["estimated"] = Field("estimated", description="the damage is predicted, to second order")
    asked: str = Field(description="auto, 2:4 or block")
    method: str | None = Field(None, description="score that the masks were chosen by")
    objective: str | None = Field(None, description="what was differentiated: loss, top1, pseudo or output")
    samples: int | None = Field(None, description="calibration samples it was measured on")
    kappa: float | None = Field(None, description="κ of the empirical Fisher")
    allocator: str | None = Field(None, description="exact or lsp")
    search: str | None = Field(None, description="one-shot or gradual")
    measure: str | None = Field(
        None, description="what the budget counts: flops, latency_us, energy_uj, parameters or bytes"
    )
    keep_fraction: float | None = Field(None, description="of the dense model's measure that the budget leaves")
    predicted_damage: float | None = Field(
        None,
        description="what one shot at this budget is expected to do before recovery, summed over layers, in units of "
        "the objective; estimated",
    )
    notes: list[str] = Field(default_factory=list, description="what to know of how this was found")


class AttentionBlock(Section):
    """Attention weights of one block; maps are base64 of uint8 [heads, rows, columns], 255 the tile's darkest."""

    name: str = Field(description="of the Softmax in the dense model")
    query: Literal["class token", "mean over all tokens"] = Field(description="which query the weights are of")
    rows: int = Field(ge=1, description="of a map: the patch grid, or one row of all tokens")
    columns: int = Field(ge=1, description="of a map")
    heads_dense: int = Field(ge=0, description="heads of the dense model")
    heads_compressed: int = Field(ge=0, description="heads of the compressed model; 0: the attention is gone")
    inactive_dense: list[int] = Field(description="heads, from 0, that attend to all tokens alike, dense model")
    inactive_compressed: list[int] = Field(description="the same of the compressed model")
    dense: str = Field(description="maps of the dense model")
    compressed: str = Field(description="maps of the compressed model")


class AttentionSection(Section):
    """What the heads attend to on one held-out sample, before and after."""

    basis: Literal["measured"] = Field("measured", description="both models ran, in ONNX Runtime, in float32")
    blocks: list[AttentionBlock] = Field(description="in graph order; of windowed attention the first window")


class FidelitySection(Section):
    """The compressed model's answers against the dense model's, on the held-out samples.

    Points are percentage points of top-1, positive where the compressed model is worse.
    """

    basis: Literal["measured"] = Field("measured", description="both models ran, in ONNX Runtime, in float32")
    samples: int = Field(ge=1, description="held-out samples, counted")
    top1_dense_percent: float | None = Field(None, description="dense model's top-1; null without labels")
    top1_compressed_percent: float | None = Field(None, description="compressed model's top-1; null without labels")
    top5_dense_percent: float | None = Field(None, description="dense model's top-5; null without labels")
    top5_compressed_percent: float | None = Field(None, description="compressed model's top-5; null without labels")
    agreement_percent: float | None = Field(None, description="samples for which both models give the same class")
    cosine: float = Field(description="mean cosine similarity of the outputs, -1 to 1")
    sqnr_db: float = Field(description="signal to quantization noise of the outputs")
    non_finite_samples: int = Field(0, ge=0, description="samples for which the compressed model gave NaN or infinity")
    expected_drop_points: float | None = Field(
        None,
        description="an expectation, not a count of answers: 100 · mean(p_dense - p_compressed), each model's softmax "
        "at the dense model's answer; null without class scores",
    )
    expected_drop_low_points: float | None = Field(None, description="lower end of its 95 % interval")
    expected_drop_high_points: float | None = Field(None, description="upper end of its 95 % interval")
    measured_drop_points: float | None = Field(None, description="top-1 lost, by the labels; null without")
    measured_drop_low_points: float | None = Field(None, description="lower end of its 95 % interval, paired")
    measured_drop_high_points: float | None = Field(None, description="upper end of its 95 % interval, paired")
    only_dense_right: int | None = Field(None, description="samples that only the dense model gets right, counted")
    only_compressed_right: int | None = Field(None, description="samples that only the compressed one gets right")


class BudgetSection(Section):
    """The loss budget and whether it was kept."""

    max_drop_points: float = Field(description="--max-drop, or its default")
    typed: bool = Field(description="whether it was typed: then it bounds the total, else what auto adds")
    measure: Literal["expected", "measured"] = Field(description="which drop decides")
    drop_points: float = Field(description="the deciding drop, of the final model")
    low_points: float | None = Field(None, description="lower end of its 95 % interval")
    high_points: float | None = Field(None, description="upper end of its 95 % interval")
    met: bool = Field(description="whether drop_points is within max_drop_points, typed or not")
    warning: str | None = Field(None, description="set where the interval is wider than the budget")


class ProfileRow(Section):
    """Measured latency of one model."""

    basis: Literal["measured"] = Field("measured", description="wall clock of real inferences")
    label: Literal["dense", "compressed"] = Field(description="which model ran")
    device: str = Field(description="what it ran on")
    what: str = Field(description="which form of the model ran, and what its time says about the target")
    batch: int = Field(ge=1, description="samples per inference")
    threads: int | None = Field(None, ge=1, description="CPU threads")
    latency_min_ms: float = Field(ge=0, description="of one inference of the whole batch")
    latency_median_ms: float = Field(ge=0, description="of one inference of the whole batch")
    latency_p90_ms: float = Field(ge=0, description="of one inference of the whole batch")
    latency_p99_ms: float = Field(ge=0, description="of one inference of the whole batch")
    spread_percent: float = Field(ge=0, description="interquartile range of the latency, of its median")
    throughput_per_s: float = Field(ge=0, description="samples per second: batch / median latency")
    runs: int = Field(ge=1, description="timed inferences behind these figures")
    blocks: int = Field(ge=1, description="blocks they ran in, alternating with the other model's")
    discarded_blocks: int = Field(0, ge=0, description="blocks left out because other programs took CPU time")
    warm_up_seconds: float = Field(ge=0, description="run before the first timed inference")
    governor: str | None = Field(None, description="frequency governor of the CPU; null where it cannot be read")


class SpeedupRow(Section):
    """How many times faster the compressed model is than the dense one, round by round of one run."""

    basis: Literal["measured"] = Field("measured", description="from the block medians of each round")
    device: str = Field(description="what both ran on; not the target unless that is cpu")
    batch: int = Field(ge=1, description="samples per inference")
    median_ratio: float = Field(gt=0, description="dense latency / compressed latency, median over rounds")
    low_ratio: float = Field(gt=0, description="of the round where it gained least")
    high_ratio: float = Field(gt=0, description="of the round where it gained most")
    rounds: int = Field(ge=1, description="rounds of alternating blocks")


class PowerRow(Section):
    """Measured power and energy of one model; an inference is one call with its whole batch."""

    label: Literal["dense", "compressed"] = Field(description="which model ran")
    batch: int = Field(ge=1, description="samples per inference")
    power_w: float = Field(description="mean over all windows")
    power_low_w: float = Field(description="of the window with the least")
    power_high_w: float = Field(description="of the window with the most")
    net_power_w: float = Field(description="the mean less idle power")
    energy_per_inference_j: float = Field(description="energy over inferences")
    net_energy_per_inference_j: float = Field(description="the same, idle power subtracted for as long as it took")
    inferences_per_s: float = Field(description="in the windows")
    windows: int = Field(ge=1, description="windows behind these figures, alternating with the other model's")
    window_seconds: float = Field(description="mean length of a window")
    readings: int = Field(description="of the sensor, in all windows together")
    state: dict[str, str] = Field(
        default_factory=dict, description="clocks, limits, power mode, as the meter told last"
    )


class PowerSection(Section):
    """Power and energy."""

    basis: Literal["measured", "not measured"] = Field("not measured", description="whether a power meter was read")
    note: str = Field("not measured", description="why there is no figure; empty where there is")
    meter: str | None = Field(None, description="what was read")
    covers: str | None = Field(None, description="what the energy is of, and what is left out")
    caveat: str | None = Field(None, description="what a reader of this meter must know; null: nothing")
    regime: str | None = Field(None, description="back-to-back, or a fixed rate of requests")
    idle_before_w: float | None = Field(
        None, description="both models loaded, nothing running, before the first window"
    )
    idle_after_w: float | None = Field(None, description="the same after the last window")
    rows: list[PowerRow] = Field(default_factory=list, description="dense and compressed, in windows of one run")


class EngineSection(Section):
    """The engine for the target, or why there is none; the whole layer table is in the engine's sidecar."""

    built: bool = Field(description="whether an engine was built")
    not_built_reason: str | None = Field(None, description="why not, and what to run where")
    backend: str | None = Field(None, description="its builder")
    file: str | None = Field(None, description="its path in the output folder")
    sha256: str | None = Field(None, description="of its file")
    size_bytes: int | None = Field(None, description="of its file, measured")
    compute_capability: str | None = Field(None, description="of the GPU that it is built for")
    versions: dict[str, str] = Field(default_factory=dict, description="of builder and runtime")
    build_seconds: float | None = Field(None, description="time to build, measured on this host")
    layer_counts: dict[str, int] = Field(
        default_factory=dict, description="layers after fusion, by kind and precision, counted"
    )
    warnings: list[str] = Field(default_factory=list, description="what the builder said")


class HostSection(Section):
    """The machine that this report was made on, which is not the target unless that is cpu."""

    cpu: str = Field(description="CPU model")
    threads: int = Field(ge=1, description="threads used")
    platform: str = Field(description="operating system and machine")
    versions: dict[str, str] = Field(default_factory=dict, description="of Python and the libraries that matter")


class RunSection(Section):
    """What the run itself took."""

    basis: Literal["measured"] = Field("measured", description="wall clock and resident memory of this run")
    stage_seconds: dict[str, float] = Field(default_factory=dict, description="wall clock of each stage, in order")
    peak_memory_bytes: int | None = Field(None, description="largest resident set of this process or a builder's")


class OutputFile(Section):
    """A file in the output folder."""

    name: str = Field(description="path in the output folder")
    what: str = Field(description="what it holds")
    size_bytes: int | None = Field(None, description="measured; null for the report itself")
