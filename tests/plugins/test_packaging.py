"""The native library as it is installed, found, registered and linked; and what is said where it is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import lsp_deploy.plugins
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.plugins import instruction_sets, library, register
from lsp_deploy.plugins.attention.operator import Attention, to_node

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def run(*command: object, **environment: str) -> str:
    texts = [str(word) for word in command]
    done = subprocess.run(texts, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, f"{' '.join(texts)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def attention_model() -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(["batch", 5, 24]), type=ir.TensorType(ir.DataType.FLOAT))
    node = to_node(Attention(2, 0.5, True), [x], name="attention")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17, "lsp": 1}, name="g")
    return ir.Model(graph, ir_version=9)


def test_this_installation_has_the_library_or_says_why_not():
    path, why = library()
    if path is None:
        assert why
        assert "\n" not in why
        assert not any((Path(folder) / "liblsp_ort.so").exists() for folder in lsp_deploy.plugins.__path__)
    else:
        assert why is None
        assert instruction_sets(path)[-1] == "portable"


def test_a_session_is_told_its_threads():
    if library().path is None:
        pytest.skip("no library")
    options = ort.SessionOptions()
    register(options)
    with pytest.raises(RuntimeError):
        options.get_session_config_entry("lsp.threads")  # ONNX Runtime chooses them
    options.intra_op_num_threads = 3
    register(options)
    assert options.get_session_config_entry("lsp.threads") == "3"


def test_a_library_that_cannot_be_loaded_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "liblsp_ort.so").write_text("of another machine")
    monkeypatch.setattr(lsp_deploy.plugins, "__path__", [str(tmp_path)])
    with pytest.raises(UserError, match=r"^Failed to load library .*liblsp_ort\.so.*; install lsp-deploy") as raised:
        register(ort.SessionOptions())
    assert "\n" not in str(raised.value)


def test_engines_run_the_operators(attention_model):
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    with OnnxRuntimeEngine.from_model(attention_model, threads=1) as engine:
        assert engine.run({"x": x})["y"].shape == (2, 5, 8)
        assert bool(engine.describe().warnings) == (library().path is None)


@pytest.mark.parametrize(("setting", "environment", "reason"), [
    ("-DLSP_NATIVE=OFF", {}, "lsp-deploy was installed with LSP_NATIVE=OFF, install it again without"),
    ("-DLSP_NATIVE=ON", {"CXX": "no-such-compiler"}, "no C++ compiler was there when lsp-deploy was installed, "
                                                     "add g++ or clang and install it again"),
])  # fmt: skip
def test_an_installation_without_the_library_says_why(tmp_path, monkeypatch, setting, environment, reason):
    needs("cmake")
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", generator, setting, **environment)
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "installed")
    installed = tmp_path / "installed/lsp_deploy/plugins"
    assert [path.name for path in installed.iterdir()] == ["liblsp_ort.missing"]
    monkeypatch.setattr(lsp_deploy.plugins, "__path__", [str(tmp_path / "sources"), str(installed)])
    assert library() == (None, reason)
    with pytest.raises(UserError, match=re.escape(reason)):
        register(ort.SessionOptions())


def test_sources_that_were_never_installed_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lsp_deploy.plugins, "__path__", [str(tmp_path)])
    assert library() == (None, "lsp-deploy was not installed by pip, which builds it")


def test_the_library_exports_and_needs_no_more_than_it_should(native_library):
    needs("nm", "readelf")
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", native_library).splitlines()}
    assert {name for name in exported if not name.startswith("lsp_")} == {"RegisterCustomOps"}
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", native_library))
    assert {name.partition(".")[0] for name in needed} <= {"libc", "libm", "libpthread", "ld-linux-x86-64"}


def test_the_interface_is_onnxruntimes(tmp_path):
    needs("c++")
    folder = ROOT / "plugins/onnxruntime/src/onnxruntime"
    defined = run("c++", "-std=c++17", "-dM", "-E", folder / "abi_check.cpp")
    if "ORT_API_VERSION" not in defined:
        pytest.skip("onnxruntime_c_api.h is not here; CPATH may name its folder")
    run("c++", "-std=c++17", "-fsyntax-only", folder / "abi_check.cpp")


def test_the_example_in_cpp_runs_a_model(tmp_path, native_library, attention_model):
    needs("cmake", "c++")
    wheel = Path(ort.__file__).parent / "capi"
    runtimes = list(wheel.glob("libonnxruntime.so.*"))
    if not runtimes:
        pytest.skip("this onnxruntime has no libonnxruntime.so")
    # The wheel has the library by its full version only; a program looks for its soname.
    soname = tmp_path / "libonnxruntime.so.1"
    soname.symlink_to(runtimes[0])
    run("cmake", "-S", ROOT / "docs/examples/cpp", "-B", tmp_path / "build", f"-DONNXRUNTIME_LIBRARY={soname}",
        f"-DONNXRUNTIME_INCLUDE={os.environ.get('CPATH') or HERE / 'onnxruntime_header'}")  # fmt: skip
    run("cmake", "--build", tmp_path / "build")
    path = tmp_path / "model.onnx"
    ir.save(attention_model, path)
    printed = run(tmp_path / "build/run_model", path, native_library, 2)
    assert [float(line) for line in printed.split()] == pytest.approx([1.0] * 8)  # attention of ones to ones
    attention_model.graph[0].attributes["num_heads"] = ir.AttrInt64("num_heads", 0)
    ir.save(attention_model, path)
    done = subprocess.run([tmp_path / "build/run_model", path, native_library], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'lsp::Attention "attention": num_heads is 0' in done.stderr
