"""`lower`, and what the other verbs do with a model that holds operators of ours."""

import json
import sys
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from block_sparse_cases import case

from lsp_deploy import console
from lsp_deploy.cli import main
from lsp_deploy.errors import UserError
from lsp_deploy.inspection import inspect_model
from lsp_deploy.lowering import lower_model
from lsp_deploy.model import save_model
from lsp_deploy.plugins import NativeLibrary

ONE = case("int8", K=768, N=768, block=(32, 64), zeros=0.9, activation="gelu", residual=False, outer=(2, 5))


@pytest.fixture
def verb(capsys, monkeypatch):
    """Run `lsp-deploy ARGUMENTS` in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lsp-deploy", *map(str, arguments)])
        console.configure(json=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def compressed(tmp_path):
    path = tmp_path / "small.onnx"
    save_model(ONE.model(), path)
    return path


def plain_session(path):
    """Return the output of a session as a user makes it."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, ONE.feeds())[0]


@pytest.mark.parametrize("form", ["matmul", "gather"])
@pytest.mark.parametrize("layout", ["canonical", "bsl16.v1"])
def test_lowered_models_run_anywhere(tmp_path, form, layout):
    save_model(ONE.in_layout(layout).model(), tmp_path / "small.onnx")
    stock = tmp_path / "stock.onnx"
    assert lower_model(tmp_path / "small.onnx", stock, form) == {"BlockSparseLinear": 1}
    proto = onnx.load(stock)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert sum(node.op_type == "MatMul" for node in proto.graph.node) > 1 or form == "matmul"
    expected = ONE.expected()
    np.testing.assert_allclose(plain_session(stock), expected, atol=1e-4 * np.abs(expected).max())


def test_the_verb(verb, compressed, tmp_path):
    code, out, err = verb("lower", compressed, "-o", tmp_path / "stock.onnx", "--form", "gather")
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'stock.onnx'}: 1 BlockSparseLinear replaced by stock ONNX operators\n"
    code, out, _ = verb("lower", compressed, "-o", tmp_path / "stock.onnx", "--json")
    assert code == 0
    assert json.loads(out) == {
        "output": str(tmp_path / "stock.onnx"),
        "form": "matmul",
        "replaced": {"BlockSparseLinear": 1},
    }


def test_the_input_is_not_overwritten(compressed):
    before = compressed.read_bytes()
    with pytest.raises(UserError, match="is the input model; choose another -o"):
        lower_model(compressed, compressed)
    assert compressed.read_bytes() == before


def test_an_unknown_form_is_refused(verb, compressed, tmp_path):
    code, _, err = verb("lower", compressed, "-o", tmp_path / "stock.onnx", "--form", "dense")
    assert code == 2 and "dense" in err
    assert not (tmp_path / "stock.onnx").exists()


def test_a_model_of_stock_operators_is_written_as_it_is(compressed, tmp_path):
    lower_model(compressed, tmp_path / "stock.onnx")
    assert lower_model(tmp_path / "stock.onnx", tmp_path / "again.onnx") == {}
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "stock.onnx").read_bytes()


def test_a_damaged_operator_is_refused(verb, compressed, tmp_path):
    proto = onnx.load(compressed)
    next(one for one in proto.graph.node[0].attribute if one.name == "k_idx").ints[0] = 99
    onnx.save(proto, compressed)
    code, _, err = verb("lower", compressed, "-o", tmp_path / "stock.onnx")
    assert code == 2
    assert err.startswith("error: layer is not a valid lsp::BlockSparseLinear: k_idx is not within")
    assert err.count("\n") == 1 and not (tmp_path / "stock.onnx").exists()


def test_inspect_shows_operators_as_linear_layers(compressed):
    found = inspect_model(compressed, {"x": (1, 5, 768)})
    (layer,) = found.layers
    assert (layer.name, layer.K, layer.N, layer.weight_bits, layer.activation_bits) == ("layer", 768, 768, 8, 8)
    assert (layer.pattern, layer.zero_block_shape) == ("block", [32, 64])
    assert layer.zero_blocks == pytest.approx(1 - ONE.operator.blocks / ONE.operator.mask.size, abs=1e-6)
    assert found.node_types == {"lsp::BlockSparseLinear": 1}
    assert found.opsets["lsp"] == 1


@pytest.mark.parametrize(
    "arguments", [("compress", "--target", "cpu"), ("sensitivity", "--calibration-data", "random")]
)
def test_what_is_compressed_already_is_not_analysed(verb, compressed, tmp_path, arguments):
    name, *flags = arguments
    code, _, err = verb(name, compressed, *flags, "-o", tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {compressed} is compressed already, it holds 1 operators")
    assert "lsp-deploy lower" in err and not list((tmp_path / "out").glob("*"))


def briefly(profile, engines, feeds, *, threads, **_):
    return profile(engines, feeds, threads=threads, duration=0.05, warm_up=0)


@pytest.mark.parametrize("native", [True, False])
def test_compare_and_profile_run_operators(verb, compressed, tmp_path, monkeypatch, native):
    from lsp_deploy.engines import own_operators, profiler

    monkeypatch.setattr(profiler, "profile", partial(briefly, profiler.profile))
    if not native:
        missing = NativeLibrary(None, "there is no compiler")
        monkeypatch.setattr(own_operators, "library", lambda: missing)
    elif own_operators.library().path is None:
        pytest.skip(str(own_operators.library().why))
    dense = tmp_path / "dense.onnx"
    lower_model(compressed, dense)
    sizes = ("--shapes", "x:1x5x768", "--batch", 1)
    code, out, err = verb("compare", dense, compressed, "--data", "random", *sizes, "--layers", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["fidelity"]["sqnr_db"] > 40
    assert [layer["name"] for layer in result["layers"]] == ["layer"]
    assert ("run as standard ones, which is slower: there is no compiler" in err) == (not native)
    code, out, err = verb("profile", compressed, *sizes, "--json")
    assert code == 0 and len(json.loads(out)["profiles"]) == 1
    assert ("run as standard ones, which is slower: there is no compiler" in err) == (not native)
