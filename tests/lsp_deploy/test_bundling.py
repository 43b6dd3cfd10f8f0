"""`lsp-deploy bundle`: what is in the archive, what is not, and which models and devices it is for."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from block_sparse_cases import case
from graphs import assert_same_outputs

from lsp_deploy.bundle.anonymity import PathRemover
from lsp_deploy.bundling import bundle_model
from lsp_deploy.compress import RunOptions, compress
from lsp_deploy.demo import copy_demo
from lsp_deploy.errors import UserError
from lsp_deploy.model import load_model, save_model
from lsp_deploy.passes.raise_opset import RaiseOpsetPass
from lsp_deploy.plan import load_plan
from lsp_deploy.plugins.block_sparse.operator import from_node
from lsp_deploy.recipe import Recipe

SHAPES = {f"{bound}_shapes": f"x:{batch}x3x40" for bound, batch in (("min", 1), ("opt", 2), ("max", 4))}
SCRIPTS = {"build.sh", "profile.sh", "measure.py", "ina3221.py", "README.md", "bundle.json", "SHA256SUMS", "model.onnx"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def out(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was given absolute paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsp_deploy.steps.measuring.PROFILE_SECONDS", 0.1)
        patch.setenv("LSP_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        data = {"calibration_data": str(demo.with_name("calibration.npz")), "samples": 16}
        shapes = {"min_shapes": "pixel_values:1x1x8x8", "max_shapes": "pixel_values:16x1x8x8"}
        recipe = Recipe(target="agx-orin", precision="fp16", sparsity="none", **data, **shapes)
        folder = demo.parent / "out"
        command = f"compress {demo} --target agx-orin --calibration-data={data['calibration_data']} -o {folder}"
        compress(demo, recipe, RunOptions(folder, command=command))
    return folder


def unpacked(bundle: Path, folder: Path) -> Path:
    if bundle.name.endswith(".zst"):
        content = zstandard.ZstdDecompressor().stream_reader(bundle.open("rb")).read()
    else:
        content = bundle.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def operator_model(folder: Path, dtype: str = "float16") -> Path:
    """A model of one block-sparse operator, its values in the layout of CPUs."""
    types = {"x_type": dtype, "out_type": dtype}
    path = folder / "operator.onnx"
    save_model(case(dtype, **types).model(), path)
    return path


@pytest.mark.parametrize("name", ["b.tar.zst", "b.tar.gz", "b.tgz"])
def test_the_same_content_gives_the_same_bytes(demo, tmp_path, name):
    first = bundle_model(demo, "agx-orin", tmp_path / "a" / name, {})
    second = bundle_model(demo, "agx-orin", tmp_path / "b" / name, {})
    assert first.path.read_bytes() == second.path.read_bytes()
    assert set(first.files) == SCRIPTS
    subprocess.run(["tar", "-tf", first.path], check=True, capture_output=True)


def test_entries_are_sorted_and_of_nobody_and_no_date(demo, tmp_path):
    bundle = bundle_model(demo, "agx-orin", tmp_path / "b.tar.gz", {})
    with tarfile.open(bundle.path) as archive:
        entries = archive.getmembers()
    assert [entry.name for entry in entries] == sorted(bundle.files)
    for entry in entries:
        assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, 0, "", "")
        assert entry.mode == (0o755 if entry.name.endswith(".sh") else 0o644)


def test_sha256sum_checks_every_file(out, tmp_path):
    bundle = bundle_model(out, "agx-orin", tmp_path / "b.tar.zst", {})
    folder = unpacked(bundle.path, tmp_path / "b")
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == len(bundle.files) - 1


def test_no_file_names_a_path_of_this_machine(out, demo, tmp_path):
    folder = unpacked(bundle_model(out, "agx-orin", tmp_path / "b.tar.zst", {}).path, tmp_path / "b")
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"plan.json", "recipe.toml", "report.json", "report.html"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        for private in (demo.parent, Path.cwd(), Path.home()):
            assert str(private).encode() + b"/" not in content, path
    assert load_plan(folder / "report" / "plan.json").recipe["calibration_data"] == "calibration.npz"
    report = json.loads((folder / "report" / "report.json").read_text())
    command = f"compress {demo.name} --target agx-orin --calibration-data=calibration.npz -o out"
    assert report["command"] == command
    assert command in (folder / "report" / "report.html").read_text()


def test_a_run_brings_its_shapes_and_how_images_become_inputs(out, tmp_path):
    run = shutil.copytree(out, tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    report["data"]["calibration"]["preprocess"] = "resized to 8 pixels"
    (run / "report.json").write_text(json.dumps(report))
    folder = unpacked(bundle_model(run, "agx-orin", tmp_path / "b.tar.zst", {}).path, tmp_path / "b")
    description = json.loads((folder / "bundle.json").read_text())
    assert description["shapes"]["max"] == {"pixel_values": [16, 1, 8, 8]}
    readme = (folder / "README.md").read_text()
    assert "batches of 1 to 16" in readme and "`pixel_values` | float32 |" in readme
    assert "How an image becomes an input: resized to 8 pixels." in readme
    assert not (folder / "plugin").exists() and "plugin" not in readme


def test_what_an_exporter_wrote_beside_the_graph_stays_behind(demo, tmp_path):
    model = load_model(demo)
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/ann/secret/train.py", line 3'
    model.metadata_props["classes"] = "digits"
    save_model(model, tmp_path / "model.onnx")
    packed = bundle_model(tmp_path / "model.onnx", "agx-orin", tmp_path / "b.tar.gz", {})
    folder = unpacked(packed.path, tmp_path / "b")
    assert b"/home/ann" not in (folder / "model.onnx").read_bytes()
    assert load_model(folder / "model.onnx").metadata_props == {"classes": "digits"}


def test_a_later_opset_becomes_one_that_the_device_takes(demo, tmp_path, capsys):
    model = load_model(demo)
    RaiseOpsetPass(21)(model)
    save_model(model, tmp_path / "new.onnx")
    folder = unpacked(bundle_model(tmp_path / "new.onnx", "agx-orin", tmp_path / "b.tar.gz", {}).path, tmp_path / "b")
    packed = load_model(folder / "model.onnx")
    assert packed.opset_imports[""] <= 20
    assert "opset 21 became" in capsys.readouterr().out
    assert_same_outputs(load_model(demo), packed)


def test_operators_come_with_the_plugins_sources_and_in_its_layout(tmp_path):
    bundle = bundle_model(operator_model(tmp_path), "agx-orin", tmp_path / "b.tar.gz", SHAPES)
    assert bundle.plugin
    folder = unpacked(bundle.path, tmp_path / "b")
    (node,) = load_model(folder / "model.onnx").graph
    assert from_node(node).layout == "bsl16.v1"
    for source in ("tensorrt/CMakeLists.txt", "cuda/CMakeLists.txt", "cuda/include/lsp_cuda.h", "cuda/src/plan.cpp"):
        assert (folder / "plugin" / source).is_file()
    assert not [name for name in bundle.files if "emulation" in name or "__pycache__" in name]
    script = (folder / "build.sh").read_text()
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in script and "--dynamicPlugins=build/liblsp_block_sparse.so" in script


def test_operators_for_a_cpu_are_refused(tmp_path):
    path = operator_model(tmp_path, "float32")
    with pytest.raises(UserError, match="made for a CPU: layer is an operator that TensorRT has no plugin for"):
        bundle_model(path, "agx-orin", tmp_path / "b.tar.gz", SHAPES)
    assert not (tmp_path / "b.tar.gz").exists()


def test_a_plan_for_another_target_is_said(out, tmp_path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text('base = "agx-orin"\n')
    bundle_model(out, str(mine), tmp_path / "b.tar.gz", {})
    assert "was compressed for agx-orin-64gb" in capsys.readouterr().err


def test_a_report_of_another_version_stays_behind_and_is_said(out, tmp_path, capsys):
    older = tmp_path / "older"
    shutil.copytree(out, older)
    (older / "report.json").write_text('{"format": "lsp-deploy.report.v0"}')
    bundle_model(older, "agx-orin", tmp_path / "b.tar.gz", {})
    assert "is not a report of this version" in capsys.readouterr().err
    folder = unpacked(tmp_path / "b.tar.gz", tmp_path / "unpacked")
    assert (folder / "report" / "plan.json").is_file() and not (folder / "report" / "report.json").exists()


@pytest.mark.parametrize(
    ("target", "name", "says"),
    [
        ("h100", "b.tar.zst", "lsp-deploy build"),
        ("cpu", "b.tar.zst", "lsp-deploy build"),
        ("agx-orin", "b.zip", "names no archive"),
    ],
)
def test_what_cannot_be_packed(demo, tmp_path, target, name, says):
    with pytest.raises(UserError, match=says):
        bundle_model(demo, target, tmp_path / name, {})
    assert not list(tmp_path.iterdir())


def test_only_paths_are_shortened():
    recipe = {"calibration_data": "/data/val/images", "labels": "sets/val.csv", "exclude": "/blocks/blocks.1/.*"}
    command = "compress /home/ann/vit.onnx --exclude /blocks/blocks.1/.* --labels=sets/val.csv -o out/a sets/b"
    remove = PathRemover(recipe, command, [Path("/home/ann/work"), Path("/blocks")])
    assert remove(recipe) == {"calibration_data": "images", "labels": "val.csv", "exclude": "/blocks/blocks.1/.*"}
    assert remove(command) == "compress vit.onnx --exclude /blocks/blocks.1/.* --labels=val.csv -o a b"
    assert remove(["read /home/ann/work/sets/val.csv.", 3, None]) == ["read val.csv.", 3, None]
    assert remove("/blocks/blocks.0/attn/MatMul") == "/blocks/blocks.0/attn/MatMul"
    assert remove("/data/val/images/1.png, not /srv/data/val/images") == "images/1.png, not /srv/data/val/images"
    assert remove("/home/ann/other.onnx") == "other.onnx"
