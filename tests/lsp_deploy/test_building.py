"""`lsp-deploy build`: an engine where one can be built here, and else exit code 1 and what to run where."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from block_sparse_cases import case
from pass_models import layer
from pass_models import plan as plan_of

import lsp_deploy.engines.tensorrt.backend as tensorrt_backend
from lsp_deploy.building import shapes_for
from lsp_deploy.cli import main
from lsp_deploy.demo import copy_demo
from lsp_deploy.engines.protocol import BackendStatus, BuildOptions, EngineBuildError, EngineInfo, write_sidecar
from lsp_deploy.model import load_model, save_model
from lsp_deploy.passes.raise_opset import RaiseOpsetPass
from lsp_deploy.plan import save_plan


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model, in the working directory, on a machine without a GPU."""
    path = copy_demo(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorrt_backend, "first_gpu", lambda: None)
    return path.relative_to(tmp_path)


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def build(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lsp-deploy", "build", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return build


class FakeBackend:
    """Writes the name of its target, or refuses."""

    name = "tensorrt"

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.options: BuildOptions | None = None

    def serves(self, target) -> bool:
        return True

    def status(self, target=None) -> BackendStatus:
        return BackendStatus(can_build=True, can_run=True, version="10.3")

    def build(self, model_path, engine_path, target, options) -> EngineInfo:
        self.options = options
        if self.error:
            raise EngineBuildError(self.error)
        engine_path.write_text(target.name)
        return write_sidecar(EngineInfo(backend=self.name, target=target.name, warnings=["a warning"]), engine_path)


def use(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> FakeBackend:
    monkeypatch.setattr("lsp_deploy.engines.backends.backends", lambda: [backend])
    return backend


@pytest.mark.parametrize("target", ["agx-orin", "h100"])
def test_a_target_that_nothing_here_builds_for_exits_1_and_says_what_to_run(build, model, target):
    code, out, _ = build(model, "--target", target)
    assert code == 1
    assert f"--onnx={model.name} --saveEngine={model.stem}.engine" in out
    assert "--maxShapes=pixel_values:32x1x8x8" in out
    assert ("lsp-deploy bundle" in out) == (target == "agx-orin")
    assert not list(Path().glob("*.engine*"))


def test_the_device_needs_the_plugin_for_operators_of_ours(build, model):
    operator = case("float16", x_type="float16", out_type="float16").in_layout("bsl16.v1")
    save_model(operator.model(), Path("operator.onnx"))
    shapes = [word for bound in ("min", "opt", "max") for word in (f"--{bound}-shapes", "x:2x3x40")]
    code, out, _ = build("operator.onnx", "--target", "h100", *shapes)
    assert code == 1
    assert out.count("--dynamicPlugins=./liblsp_block_sparse.so") == 2  # to build, and to run


def test_the_commands_for_the_device_build_what_was_asked_for(build, model):
    Path("libmine.so").write_text("")
    options = ["--workspace-mb", 512, "--optimization-level", 2, "--timing-cache", "caches/t.cache", "--refittable"]
    compatible = ["--version-compatible", "--hardware-compatible", "ampere-plus"]
    code, out, _ = build(model, "--target", "h100", *options, *compatible, "--strip-weights", "--plugin", "libmine.so")
    assert code == 1
    building, running = (
        shlex.split(line) for line in out.replace("\\\n", " ").splitlines() if line.startswith("trtexec")
    )
    assert {
        *("--memPoolSize=workspace:512", "--builderOptimizationLevel=2", "--timingCacheFile=t.cache"),
        *("--refit", "--versionCompatible", "--hardwareCompatibilityLevel=ampere+", "--stripWeights"),
        "--dynamicPlugins=./libmine.so",
    } < set(building)
    assert {"--versionCompatible", "--refit", f"--refitFromOnnx={model.name}", "--dynamicPlugins=./libmine.so"} < set(
        running
    )


def test_the_commands_name_no_option_that_was_not_asked_for(build, model):
    _, out, _ = build(model, "--target", "h100")
    assert not any(
        word in out for word in ("--refit", "Compat", "--timingCache", "--memPool", "--builderOpt", "Plugins")
    )


def test_a_target_file_of_ones_own_is_as_good(build, model):
    Path("mine.toml").write_text('base = "agx-orin"\n')
    assert build(model, "--target", "./mine.toml")[0] == 1


def test_json_says_why_there_is_no_engine(build, model):
    code, out, _ = build(model, "--target", "agx-orin", "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["built"] is False and answer["engine"] is None
    assert "trtexec" in answer["commands"] and answer["commands"] in answer["not_built_reason"]


def test_this_cpu(build, model):
    code, out, _ = build(model, "--target", "cpu", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["engine"] == f"{model.stem}-onnxruntime-cpu.engine"
    assert Path(answer["engine"]).is_file() and answer["info"]["backend"] == "onnxruntime"


def test_an_a100_engine_without_a_gpu(build, model):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    shapes = ("--opt-shapes", "pixel_values:2x1x8x8", "--max-shapes", "pixel_values:4x1x8x8")
    code, _, err = build(model, "--target", "a100", "-o", "engines/mine.engine", *shapes)
    assert code == 0, err
    sidecar = json.loads(Path("engines/mine.engine.json").read_text())
    assert sidecar["compute_capability"] == "8.0"
    assert sidecar["options"]["max_shapes"] == {"pixel_values": [4, 1, 8, 8]}


def test_what_tensorrt_rtx_refuses_may_be_tried_with_tensorrt(build, model):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    code, out, _ = build(model, "--target", "t4")
    assert code == 1
    assert "FP32 GEMM is not supported" in out and "trtexec --onnx" in out


def test_a_builder_that_does_not_serve_the_target(build, model):
    code, out, _ = build(model, "--target", "a100", "--builder", "onnxruntime")
    assert code == 1
    assert "what builds for it is tensorrt_rtx, tensorrt" in out


def test_a_model_that_the_target_cannot_take_exits_1(build, model):
    loaded = load_model(model)
    RaiseOpsetPass(21)(loaded)
    save_model(loaded, Path("new.onnx"))
    code, out, _ = build("new.onnx", "--target", "agx-orin")
    assert code == 1
    assert "opset 21" in out


def test_options_reach_the_builder(build, model, monkeypatch):
    backend = use(monkeypatch, FakeBackend())
    Path("a.so").write_bytes(b"")
    flags = ("--workspace-mb", "512", "--optimization-level", "2", "--timing-cache", "t.cache", "--plugin", "a.so")
    code, out, err = build(model, "--target", "h100", *flags, "--version-compatible", "--refittable")
    assert code == 0 and "a warning" in err
    assert f"{model.stem}-tensorrt-h100.engine" in out
    options = backend.options
    assert options is not None
    assert (options.workspace_mb, options.optimization_level) == (512, 2)
    assert options.timing_cache == Path("t.cache") and options.plugins == (Path("a.so"),)
    assert options.version_compatible and options.refittable and not options.strip_weights
    assert options.opt_shapes == {"pixel_values": (8, 1, 8, 8)}


def test_two_four_kernels_are_for_models_with_two_four_zeros(build, model, monkeypatch):
    backend = use(monkeypatch, FakeBackend())
    build(model, "--target", "h100")
    assert backend.options is not None and not backend.options.sparse_weights
    loaded = load_model(model)
    weight = next(value for value in loaded.graph.initializers.values() if list(value.shape) == [64, 256])
    array = weight.const_value.numpy().copy()
    array[::2] = 0
    weight.const_value = ir.tensor(array, name=weight.name)
    save_model(loaded, Path("sparse.onnx"))
    build("sparse.onnx", "--target", "h100")
    assert backend.options.sparse_weights
    build("sparse.onnx", "--target", "h100", "--no-sparse-weights")
    assert not backend.options.sparse_weights


def test_a_builder_that_fails_exits_1_and_leaves_an_older_engine(build, model, monkeypatch):
    use(monkeypatch, FakeBackend(error="it does not like it"))
    Path("mine.engine").write_text("older")
    code, out, _ = build(model, "--target", "h100", "-o", "mine.engine")
    assert code == 1
    assert "it does not like it" in out
    assert Path("mine.engine").read_text() == "older"


def test_an_output_folder_has_a_place_for_engines_and_the_shapes_of_its_run(build, model, monkeypatch):
    use(monkeypatch, FakeBackend())
    folder = Path("out")
    folder.mkdir()
    model.rename(folder / "model.onnx")
    plan = plan_of(layer("fc", 4, 4))
    plan.recipe = {"opt_shapes": "pixel_values:2x1x8x8", "max_shapes": "pixel_values:4x1x8x8"}
    save_plan(plan, folder / "plan.json")
    assert build(folder, "--target", "h100")[0] == 0
    assert (folder / "engines" / "tensorrt-h100.engine").is_file()
    loaded = load_model(folder / "model.onnx")
    assert shapes_for(folder / "model.onnx", loaded, {}).max == {"pixel_values": (4, 1, 8, 8)}
    typed = {"max_shapes": "pixel_values:16x1x8x8"}
    assert shapes_for(folder / "model.onnx", loaded, typed).max == {"pixel_values": (16, 1, 8, 8)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "a1000"), "unknown target"),
        (("--target", "a100", "--min-shapes", "pixel_values=1"), "--min-shapes is written like"),
        (("--target", "a100", "--opt-shapes", "x:1x1"), "no input x"),
        (("--target", "a100", "--opt-shapes", "pixel_values:8x1x9x9"), "shape 8x1x9x9 does not fit"),
        (("--target", "a100", "--min-shapes", "pixel_values:9x1x8x8"), "min 9x1x8x8, opt 8x1x8x8 and max 32x1x8x8 are"),
        (("--target", "a100", "--plugin", "no.so"), "'no.so' does not exist"),
        (("--target", "cpu", "--refittable", "--no-sparse-weights"), "no --refittable, --sparse-weights"),
    ],
)
def test_what_is_typed_wrong_exits_2(build, model, arguments, says):
    code, _, err = build(model, *arguments)
    assert code == 2
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_size_that_the_model_leaves_open_is_asked_for_with_the_flag_of_this_verb(build, model):
    loaded = load_model(model)
    loaded.graph.inputs[0].shape = ir.Shape(["batch", 1, "h", 8])
    save_model(loaded, Path("open.onnx"))
    code, _, err = build("open.onnx", "--target", "h100")
    assert code == 2 and "give its shape: --opt-shapes pixel_values:?x1x?x8" in err


@pytest.mark.parametrize("flag", ["-o", "--timing-cache"])
@pytest.mark.parametrize("read", ["{model}", "weights.data", "libmine.so"])
def test_what_the_engine_is_built_from_is_not_written_over(build, model, monkeypatch, flag, read):
    use(monkeypatch, FakeBackend())
    Path("libmine.so").write_text("a library")
    ir.save(ir.load(model), "large.onnx", external_data="weights.data")
    written = Path(read.format(model="large.onnx"))
    before = written.read_bytes()
    code, _, err = build("large.onnx", "--target", "h100", "--plugin", "libmine.so", flag, written)
    assert code == 2 and f"{flag} {written} is a file that the engine is built from" in err
    assert written.read_bytes() == before


def test_a_folder_without_a_model_exits_2(build, model):
    Path("empty").mkdir()
    code, _, err = build("empty", "--target", "a100")
    assert code == 2 and "model.onnx" in err


def test_a_folder_that_cannot_be_made_exits_2(build, model):
    Path("file").write_text("")
    code, _, err = build(model, "--target", "cpu", "-o", "file/in/it.engine")
    assert code == 2
    assert err.startswith("error: cannot make the folder file/in: ") and len(err.strip().splitlines()) == 1
