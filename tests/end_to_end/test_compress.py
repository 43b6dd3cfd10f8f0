"""The main job from end to end, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image

from lsp_deploy.data import load_preprocess
from lsp_deploy.files import sha256_of
from lsp_deploy.model import load_model
from lsp_deploy.plan import load_plan
from lsp_deploy.plugins.block_sparse.operator import from_node

DATA = ("--calibration-data", "calibration.npz", "--labels", "calibration_labels.csv")


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_the_bare_command_does_the_main_job(run, demo: Path) -> None:
    before = sha256_of(demo)
    result = run("compress", demo.name, "--target", "a100")
    assert result.code == 0, result.err
    out = demo.parent / f"{demo.stem}-a100"
    assert {"model.onnx", "plan.json", "plan.safetensors", "report.json", "report.html"} <= {
        p.name for p in out.iterdir()
    }
    assert sha256_of(demo) == before
    plan = load_plan(out / "plan.json")
    pruned = [layer for layer in plan.layers if layer.sparsity.pattern == "2:4"]
    assert pruned
    assert all(layer.role in ("qkv", "proj", "fc1", "fc2") for layer in pruned)
    for layer in pruned:
        mask = plan.masks[layer.name]
        assert (mask.reshape(layer.K // 4, 4, layer.N).sum(axis=1) == 2).all()
    report = json.loads((out / "report.json").read_text())
    assert report["fidelity"]["top1_dense_percent"] > 95
    assert not list(out.glob(".*")), "temporary files are left"


def test_int8_weights_keep_the_zeros_of_the_mask(run, demo: Path) -> None:
    assert run("compress", demo.name, "--target", "a100", "--precision", "int8", "--no-build").code == 0
    out = demo.parent / f"{demo.stem}-a100"
    plan = load_plan(out / "plan.json")
    integers = [w for w in weights_of(out / "model.onnx").values() if w.dtype == np.int8 and w.ndim == 2]
    quantized = [layer for layer in plan.layers if layer.precision.dtype == "int8"]
    assert len(quantized) == len(plan.weight_scales)
    # TensorRT wants q, k and v apart.
    assert len(integers) == sum(3 if layer.role == "qkv" else 1 for layer in quantized)
    by_shape = sorted((w.shape, int((w != 0).sum())) for w in integers)
    assert all(nonzero <= shape[0] * shape[1] // 2 for shape, nonzero in by_shape)


def test_preprocessing_that_was_typed_stays_with_the_model(run, bare: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("L", (8, 8), 40 * number).save(images / f"{number}.png")
    asked = ("--sparsity", "none", "--precision", "fp16", "--calibration-data", images, "--preprocess", "none")
    assert run("compress", bare.name, "--target", "a100", "--no-build", *asked).code == 0
    out = bare.parent / f"{bare.stem}-a100"
    written = load_model(out / "model.onnx")
    assert load_preprocess(None, written.metadata_props, (8, 8)) == (
        load_preprocess("none", {}, (8, 8))[0],
        "model metadata",
    )
    replayed = ("--plan", out / "plan.json", "-o", tmp_path / "again")
    assert run("compress", bare.name, "--target", "a100", "--no-build", *replayed).code == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def test_inputs_and_outputs_keep_names_order_shapes_and_types(run, demo: Path) -> None:
    assert run("compress", demo.name, "--target", "a100", "--no-build").code == 0

    def signature(path: Path) -> list[tuple[str, str, list[object]]]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return [(v.name, v.type, v.shape) for v in [*session.get_inputs(), *session.get_outputs()]]

    assert signature(demo.parent / f"{demo.stem}-a100" / "model.onnx") == signature(demo)


def test_io_types_target_gives_16_bit_inputs_and_outputs(run, demo: Path) -> None:
    assert run("compress", demo.name, "--target", "a100", "--no-build", "--io-types", "target").code == 0
    session = onnxruntime.InferenceSession(demo.parent / f"{demo.stem}-a100" / "model.onnx")
    assert {v.type for v in [*session.get_inputs(), *session.get_outputs()]} == {"tensor(float16)"}


def test_same_command_same_bytes(run, demo: Path) -> None:
    for out in ("a", "b"):
        assert run("compress", demo.name, "--target", "a100", "--no-build", "-o", out).code == 0
    for name in ("model.onnx", "plan.json", "plan.safetensors"):
        assert sha256_of(Path("a") / name) == sha256_of(Path("b") / name)


def test_a_plan_replays_to_the_same_bytes(run, demo: Path) -> None:
    assert run("compress", demo.name, "--target", "a100", "--no-build", "-o", "a").code == 0
    (demo.parent / "lsp-deploy.toml").unlink()
    result = run("compress", demo.name, "--target", "a100", "--no-build", "-o", "b", "--plan", "a/plan.json")
    assert result.code == 0, result.err
    assert sha256_of(Path("a/model.onnx")) == sha256_of(Path("b/model.onnx"))


def test_a_plan_without_tensors_says_what_is_missing(run, demo: Path) -> None:
    assert run("compress", demo.name, "--target", "a100", "--no-build", "-o", "a").code == 0
    Path("a/plan.safetensors").unlink()
    result = run("compress", demo.name, "--target", "a100", "--no-build", "-o", "b", "--plan", "a/plan.json", "--force")
    assert result.code == 0, result.err
    assert "plan.safetensors is missing" in result.err
    assert load_plan(Path("b/plan.json")).masks


def test_without_data_the_first_line_says_so_and_nothing_is_pruned(run, bare: Path) -> None:
    result = run("compress", bare.name, "--target", "a100", "--no-build")
    assert result.code == 0, result.err
    assert "synthetic" in result.out.splitlines()[0]
    out = bare.parent / f"{bare.stem}-a100"
    plan = load_plan(out / "plan.json")
    assert not plan.masks
    assert all("real images" in layer.sparsity.reason or "left dense" in layer.sparsity.reason for layer in plan.layers)
    assert "synthetic" in json.loads((out / "report.json").read_text())["notes"][0]


@pytest.mark.parametrize("named", ["synthetic", "random"])
def test_typed_sparsity_is_carried_out_on_any_data(run, bare: Path, named: str) -> None:
    arguments = ("--calibration-data", named, "--sparsity", "2:4", "--no-build")
    assert run("compress", bare.name, "--target", "a100", *arguments).code == 0
    plan = load_plan(bare.parent / f"{bare.stem}-a100" / "plan.json")
    assert all(
        (layer.sparsity.pattern == "2:4") == (layer.role in ("qkv", "proj", "fc1", "fc2")) for layer in plan.layers
    )


def test_block_sparsity_reaches_the_flops_target(run, bare: Path) -> None:
    arguments = ("--sparsity", "block", "--block", "16x16", "--flops", "0.7", "--no-build")
    result = run("compress", bare.name, "--target", "a100", *DATA, *arguments)
    assert result.code == 0, result.err
    out = bare.parent / f"{bare.stem}-a100"
    report = json.loads((out / "report.json").read_text())
    dense = sum(layer["flops"] for layer in report["layers"])
    unmasked = sum(layer["flops"] * (1 - layer["sparsity"]["zeros_percent"] / 100) for layer in report["layers"])
    assert unmasked / dense == pytest.approx(0.7, abs=0.03)
    # Masks that leave neurons or heads dead save what else these have, too.
    assert report["flops"]["linear_remaining_fraction"] <= unmasked / dense + 1e-6
    lost = [layer for layer in report["layers"] if layer["sparsity"]["pattern"] == "block"]
    assert lost and {layer["execution"]["kernel"] for layer in lost} == {"block_sparse"}
    model = ir.load(out / "model.onnx")
    operators = {node.name: from_node(node) for node in model.graph if node.op_type == "BlockSparseLinear"}
    assert {layer["name"] for layer in lost if layer["structure"] is None} <= set(operators)
    assert {operator.layout for operator in operators.values()} == {"bsl16.v1"}
    assert not any("ordinary MatMuls" in warning for warning in report["warnings"])


def test_max_drop_typed_and_missed_exits_1_with_all_files(run, bare: Path) -> None:
    arguments = ("--sparsity", "block", "--block", "16x16", "--flops", "0.1", "--max-drop", "0.5", "--no-build")
    result = run("compress", bare.name, "--target", "a100", *DATA, *arguments)
    assert result.code == 1
    assert "--max-drop 0.5 was not met" in result.err
    assert (bare.parent / f"{bare.stem}-a100" / "report.html").exists()


def test_a_drop_of_typed_choices_alone_exits_0(run, bare: Path) -> None:
    arguments = ("--sparsity", "block", "--block", "16x16", "--flops", "0.1", "--no-build")
    assert run("compress", bare.name, "--target", "a100", *DATA, *arguments).code == 0


def test_flops_that_two_four_cannot_reach_exit_1(run, bare: Path) -> None:
    result = run("compress", bare.name, "--target", "a100", *DATA, "--sparsity", "2:4", "--flops", "0.2", "--no-build")
    assert result.code == 1
    assert "--flops 0.2 was not met" in result.err


def test_dry_run_writes_nothing(run, demo: Path) -> None:
    before = sorted(p.name for p in demo.parent.iterdir())
    result = run("compress", demo.name, "--target", "a100", "--dry-run")
    assert result.code == 0, result.err
    assert "2:4" in result.out
    assert sorted(p.name for p in demo.parent.iterdir()) == before


def test_json_is_alone_on_stdout(run, demo: Path) -> None:
    result = run("compress", demo.name, "--target", "a100", "--no-build", "--json")
    assert json.loads(result.out)["format"] == "lsp-deploy.report.v1"


def test_another_recipes_result_is_refused_without_force(run, demo: Path) -> None:
    first = ("compress", demo.name, "--target", "a100", "--no-build", "-o", "out")
    assert run(*first).code == 0
    assert run(*first).code == 0, "the same recipe may run again"
    other = run(*first, "--precision", "fp16")
    assert other.code == 2
    assert "--force" in other.err
    assert run(*first, "--precision", "fp16", "--force").code == 0


def test_saved_recipe_replays(run, demo: Path) -> None:
    arguments = ("compress", demo.name, "--target", "a100", "--no-build")
    assert run(*arguments, "--precision", "fp16", "--save-recipe", "saved.toml", "-o", "a").code == 0
    assert run("compress", demo.name, "--recipe", "saved.toml", "--no-build", "-o", "b").code == 0
    assert sha256_of(Path("a/model.onnx")) == sha256_of(Path("b/model.onnx"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_typed_precision_is_what_the_plan_holds(run, demo: Path, precision: str) -> None:
    assert run("compress", demo.name, "--target", "a100", "--no-build", "--precision", precision).code == 0
    plan = load_plan(demo.parent / f"{demo.stem}-a100" / "plan.json")
    for layer in plan.layers:
        inside = layer.role in ("qkv", "proj", "fc1", "fc2")
        assert layer.precision.dtype == ("fp16" if precision == "int8" and not inside else precision)


def test_the_host_is_a_target(run, demo: Path) -> None:
    result = run("compress", demo.name, "--target", "cpu", "--sparsity", "none")
    assert result.code == 0, result.err
    assert list((demo.parent / f"{demo.stem}-cpu" / "engines").glob("onnxruntime-cpu.engine"))


def test_a_target_that_no_builder_here_serves_exits_0_and_says_what_to_run(run, demo: Path) -> None:
    result = run("compress", demo.name, "--target", "agx-orin")
    assert result.code == 0, result.err
    report = json.loads(next(demo.parent.glob("*/report.json")).read_text())
    assert report["engine"]["built"] is False
    assert "trtexec" in report["engine"]["not_built_reason"]


def test_underscores_in_flags(run, demo: Path) -> None:
    assert run("compress", demo.name, "--target", "a100", "--no_build", "--max_drop", "50").code == 0


def test_the_sm80_engine_is_built_with_its_sidecar(run, demo: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert run("compress", demo.name, "--target", "a100", "--precision", "int8").code == 0
    engines = demo.parent / f"{demo.stem}-a100" / "engines"
    engine = engines / "tensorrt_rtx-a100.engine"
    sidecar = json.loads(Path(f"{engine}.json").read_text())
    assert sidecar["sha256"] == sha256_of(engine)
    plan = load_plan(engines.parent / "plan.json")
    asked = sum(layer.precision.dtype == "int8" for layer in plan.layers)
    assert sum(layer["kind"] == "gemm" and layer["precision"] == "int8" for layer in sidecar["layers"]) == asked


@pytest.fixture
def paying_target(bare: Path) -> str:
    """A target on which 2:4 pays for layers as small as the embedded model's."""
    toml = 'base = "a100"\nname = "tiny"\n[pays]\nsparse24_min_k = 16\nsparse24_min_n = 16\nsource = "a test"\n'
    Path("tiny.toml").write_text(toml)
    return "./tiny.toml"


def test_auto_prunes_where_it_pays_and_stays_within_the_budget(run, bare: Path, paying_target: str) -> None:
    # Reconstructed, all 16 layers lose nothing here.
    arguments = (*DATA, "--max-drop", "3", "--recover", "none", "--no-build", "-o", "out")
    result = run("compress", bare.name, "--target", paying_target, *arguments)
    assert result.code == 0, result.err
    report = json.loads(Path("out/report.json").read_text())
    pruned = [layer for layer in report["layers"] if layer["sparsity"]["pattern"] == "2:4"]
    assert 0 < len(pruned) < 16
    assert report["budget"]["drop_points"] <= 3
    left = [layer["sparsity"]["reason"] for layer in report["layers"] if layer["sparsity"]["pattern"] == "dense"]
    assert any("would exceed 3 points of loss" in reason for reason in left)


def test_auto_stops_at_the_flops_target(run, bare: Path, paying_target: str) -> None:
    arguments = (*DATA, "--max-drop", "100", "--flops", "0.8", "--no-build", "-o", "out")
    assert run("compress", bare.name, "--target", paying_target, *arguments).code == 0
    report = json.loads(Path("out/report.json").read_text())
    assert 0.7 < report["flops"]["linear_remaining_fraction"] <= 0.8
    assert any("is met without it" in layer["sparsity"]["reason"] for layer in report["layers"])


def test_auto_without_real_images_prunes_nothing_even_where_it_pays(run, bare: Path, paying_target: str) -> None:
    assert run("compress", bare.name, "--target", paying_target, "--no-build", "-o", "out").code == 0
    assert not load_plan(Path("out/plan.json")).masks


def test_a_flops_target_that_blocks_cannot_reach_is_bad_input(run, bare: Path) -> None:
    result = run("compress", bare.name, "--target", "a100", *DATA, "--sparsity", "block", "--flops", "0.001")
    assert result.code == 2
    assert "cannot be reached" in result.err


def test_block_without_flops_goes_as_far_as_the_budget(run, bare: Path) -> None:
    arguments = ("--sparsity", "block", "--block", "16x16", "--max-drop", "5", "--no-build", "-o", "out")
    result = run("compress", bare.name, "--target", "a100", *DATA, *arguments)
    assert result.code == 0, result.err
    assert json.loads(Path("out/report.json").read_text())["flops"]["linear_remaining_fraction"] < 1
