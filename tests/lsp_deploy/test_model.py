from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lsp_deploy.errors import UserError
from lsp_deploy.model import input_shapes, load_model, model_bytes, resolve_shapes, save_model

WEIGHT = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)


def make_proto(weight: np.ndarray = WEIGHT, opset: int = 17, names: tuple[str, str] = ("", "")) -> onnx.ModelProto:
    """x [n, 16] -> MatMul -> Relu -> y."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name=names[0]),
            helper.make_node("Relu", ["a"], ["y"], name=names[1]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def write_external(path: Path, location: str, *, size: int = WEIGHT.nbytes, offset: int = 0) -> None:
    """Write the model of `make_proto` with its weight at `location`."""
    proto = make_proto()
    (tensor,) = proto.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def run(content: bytes | Path, x: np.ndarray) -> np.ndarray:
    source = str(content) if isinstance(content, Path) else content
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(path)
    message = str(error.value)
    assert path.name in message
    for fragment in fragments:
        assert fragment in message


# --- files that are not usable models


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "no.onnx", "no such file")
    (tmp_path / "empty.onnx").touch()
    refused(tmp_path / "empty.onnx", "empty")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "folder")


def test_fifo_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")


@pytest.mark.parametrize(
    "content",
    [b"this is not a model\n" * 20, b'{"ir_version": 8}', b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(99)],
    ids=["text", "json", "png", "zip"],
)
def test_other_formats(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    refused(path, "not an ONNX model")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = make_proto().SerializeToString()
    path = tmp_path / "cut.onnx"
    for size in (1, 2, 3, 10, len(content) // 2, *range(len(content) - 40, len(content))):
        path.write_bytes(content[:size])
        refused(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_no_bytes_give_an_empty_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(content)
    refused(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_models_load_whole_or_not_at_all(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    weight = np.ones((16, 2), np.float32)
    content = bytearray(make_proto(weight).SerializeToString())
    for position, byte in changes:
        content[position % len(content)] = byte
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    try:
        model = load_model(path)
    except UserError as error:
        assert path.name in str(error)
    else:
        assert onnx.ModelProto.FromString(model_bytes(model)).graph.node


@pytest.mark.parametrize("field", ["node", "output", "input"])
def test_graph_without_nodes_outputs_or_inputs(tmp_path: Path, field: str) -> None:
    proto = make_proto()
    proto.graph.ClearField(field)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path)


def test_undefined_values(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = make_proto()
    proto.graph.node[1].input[0] = "nothing"
    path.write_bytes(proto.SerializeToString())
    refused(path, "Relu", "nothing")
    proto = make_proto()
    proto.graph.output[0].name = "nowhere"
    path.write_bytes(proto.SerializeToString())
    refused(path, "nowhere")


def test_cycle(tmp_path: Path) -> None:
    proto = make_proto()
    proto.graph.node[0].input[0] = "y"
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, "cycle")


@pytest.mark.parametrize(("opset", "good"), [(12, False), (13, True), (23, True), (24, False)])
def test_opset(tmp_path: Path, opset: int, good: bool) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make_proto(opset=opset).SerializeToString())
    if good:
        assert load_model(path).opset_imports[""] == opset
    else:
        refused(path, f"opset {opset}", "13 to 23")


def test_data_that_does_not_fit_its_shape(tmp_path: Path) -> None:
    proto = make_proto()
    proto.graph.initializer[0].dims[0] = 1 << 40
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, "w", "shape")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: type) -> None:
    weight = WEIGHT.astype(dtype)
    weight[3, 5] = value
    path = tmp_path / "model.onnx"
    path.write_bytes(make_proto(weight).SerializeToString())
    refused(path, "NaN" if np.isnan(value) else "infinity", "w")


def test_not_finite_in_a_constant_node(tmp_path: Path) -> None:
    proto = make_proto()
    proto.graph.ClearField("initializer")
    bad = WEIGHT.copy()
    bad[0, 0] = np.nan
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(bad)))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, "NaN")


def test_attention_masks_may_hold_minus_infinity(tmp_path: Path) -> None:
    proto = make_proto()
    mask = np.triu(np.full((64, 64), -np.inf, np.float32), 1)
    proto.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "mask" in load_model(path).graph.initializers


# --- external data


def test_external_data_stays_on_disk(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(12) + WEIGHT.tobytes())
    write_external(tmp_path / "model.onnx", "weights.bin", offset=12)
    model = load_model(tmp_path / "model.onnx")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert type(tensor).__name__ == "ExternalTensor"
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)
    x = np.ones((2, 16), np.float32)
    np.testing.assert_allclose(run(model_bytes(model), x), np.maximum(x @ WEIGHT, 0), rtol=1e-5)
    assert type(model.graph.initializers["w"].const_value).__name__ == "ExternalTensor"


def test_external_data_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.bin").write_bytes(WEIGHT.tobytes())
    write_external(tmp_path / "model.onnx", "data/weights.bin")
    assert load_model(tmp_path / "model.onnx")


def test_external_data_with_a_relative_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    write_external(tmp_path / "model.onnx", "weights.bin")
    monkeypatch.chdir(tmp_path)
    model = load_model(Path("model.onnx"))
    monkeypatch.chdir("/")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


@pytest.mark.parametrize("where", ["above", "absolute", "inside and out"])
def test_external_data_outside_the_folder(tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    location = {"above": "../outside.bin", "absolute": str(outside), "inside and out": "../folder/../outside.bin"}[
        where
    ]
    write_external(folder / "model.onnx", location)
    refused(folder / "model.onnx", "outside the model's folder")


def test_external_data_through_links_that_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "sub").symlink_to(tmp_path)
    for location in ("link.bin", "sub/outside.bin"):
        write_external(folder / "model.onnx", location)
        refused(folder / "model.onnx", "link", "folder")


def test_external_data_with_several_hard_links(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "weights.bin").hardlink_to(tmp_path / "outside.bin")
    write_external(folder / "model.onnx", "weights.bin")
    refused(folder / "model.onnx", "hard links")


def test_download_caches_keep_model_and_data_behind_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_external(blobs / "1a", "model.onnx_data")
    (blobs / "2b").write_bytes(WEIGHT.tobytes())
    (snapshot / "model.onnx").symlink_to(blobs / "1a")
    (snapshot / "model.onnx_data").symlink_to(blobs / "2b")
    tensor = load_model(snapshot / "model.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


@pytest.mark.parametrize(
    ("content", "offset", "size", "fragment"),
    [
        (None, 0, WEIGHT.nbytes, "missing"),
        (WEIGHT.tobytes()[:-1], 0, WEIGHT.nbytes, "too short"),
        (WEIGHT.tobytes(), 4, WEIGHT.nbytes, "too short"),
        (WEIGHT.tobytes(), -4, WEIGHT.nbytes, "not a valid"),
        (WEIGHT.tobytes(), 0, WEIGHT.nbytes - 4, "needs"),
    ],
)
def test_external_data_that_is_not_all_there(
    tmp_path: Path, content: bytes | None, offset: int, size: int, fragment: str
) -> None:
    if content is not None:
        (tmp_path / "weights.bin").write_bytes(content)
    write_external(tmp_path / "model.onnx", "weights.bin", offset=offset, size=size)
    refused(tmp_path / "model.onnx", fragment)


# --- what loading makes of a model


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("", ""), ["MatMul_0", "Relu_1"]), (("a", "a"), ["a", "a_1"]), (("Relu_1", ""), ["Relu_1", "Relu_1_1"])],
)
def test_nodes_get_unique_stable_names(tmp_path: Path, names: tuple[str, str], expected: list[str]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make_proto(names=names).SerializeToString())
    assert [node.name for node in load_model(path).graph] == expected


def test_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Twice",
        ["v"],
        ["z"],
        [helper.make_node("Add", ["v", "v"], ["z"])],
        [helper.make_opsetid("", 17)],
    )
    proto = make_proto()
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Twice", "local"
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.functions.append(function)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    model = load_model(path)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert not model.functions
    x = np.ones((3, 16), np.float32)
    np.testing.assert_allclose(run(model_bytes(model), x), 2 * (x @ WEIGHT), rtol=1e-5)


def test_recent_files_run_in_this_runtime(tmp_path: Path) -> None:
    proto = make_proto()
    proto.ir_version = 14
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert run(model_bytes(load_model(path)), np.ones((1, 16), np.float32)).shape == (1, 64)


# --- saving


def test_round_trip_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    first.write_bytes(make_proto(names=("a", "b")).SerializeToString())
    save_model(load_model(first), second)
    again = tmp_path / "again.onnx"
    save_model(load_model(second), again)
    assert second.read_bytes() == again.read_bytes() == model_bytes(load_model(second))
    x = np.ones((2, 16), np.float32)
    np.testing.assert_array_equal(run(first, x), run(second, x))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.onnx", "first.onnx", "second.onnx"]


def test_large_models_go_to_external_data(tmp_path: Path) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "out" / "model.onnx"
    target.parent.mkdir()
    source.write_bytes(make_proto().SerializeToString())
    model = load_model(source)
    save_model(model, target, external_threshold=1000)
    assert sorted(file.name for file in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert target.stat().st_size < 1000
    assert (target.parent / "model.onnx.data").read_bytes() == WEIGHT.tobytes()
    x = np.ones((2, 16), np.float32)
    np.testing.assert_array_equal(run(target, x), run(source, x))
    assert type(model.graph.initializers["w"].const_value).__name__ != "ExternalTensor"
    np.testing.assert_array_equal(run(model_bytes(load_model(target)), x), run(source, x))


def test_saving_never_overwrites_the_weights_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes(WEIGHT.tobytes())
    write_external(path, "model.onnx.data")
    before = path.read_bytes()
    with pytest.raises(UserError, match="own weights"):
        save_model(load_model(path), path, external_threshold=1000)
    assert path.read_bytes() == before
    assert (tmp_path / "model.onnx.data").read_bytes() == WEIGHT.tobytes()


def test_unwritable_folder(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(make_proto().SerializeToString())
    with pytest.raises(UserError, match="cannot write"):
        save_model(load_model(source), tmp_path / "no" / "model.onnx")
    with pytest.raises(UserError, match="cannot write"):
        save_model(load_model(source), tmp_path / "no" / "model.onnx", external_threshold=1000)


# --- shapes


def load_with_inputs(tmp_path: Path, **shapes: list[int | str | None]):
    names = list(shapes)
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None) for name in names],
    )
    path = tmp_path / "shapes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return load_model(path)


def test_dynamic_batch(tmp_path: Path) -> None:
    model = load_with_inputs(tmp_path, x=["batch", 3, 8, 8], m=[None, 5])
    assert input_shapes(model) == {"x": ("batch", 3, 8, 8), "m": ("?", 5)}
    assert resolve_shapes(model, None, batch=8) == {"x": (8, 3, 8, 8), "m": (8, 5)}
    assert resolve_shapes(model, {"x": [4, 3, 8, 8]}, batch=8)["x"] == (4, 3, 8, 8)


def test_a_symbol_has_one_size(tmp_path: Path) -> None:
    model = load_with_inputs(tmp_path, x=["batch", 3], ids=["batch", "length"])
    shapes = resolve_shapes(model, {"ids": [2, 77]}, batch=8)
    assert shapes == {"x": (2, 3), "ids": (2, 77)}


def test_initializers_are_not_inputs(tmp_path: Path) -> None:
    proto = make_proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 64]))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert list(input_shapes(load_model(path))) == ["x"]


def test_other_dynamic_dimensions_must_be_given(tmp_path: Path) -> None:
    model = load_with_inputs(tmp_path, x=["batch", 3, "height", 8])
    with pytest.raises(UserError, match=r"input x .*2 \(height\); give its shape: --shapes x:\?x3x\?x8, with a number"):
        resolve_shapes(model, None, batch=8)


@pytest.mark.parametrize("given", [{"x": [1, 4, 8, 8]}, {"x": [1, 3, 8]}, {"x": [0, 3, 8, 8]}, {"z": [1]}])
def test_given_shapes_must_fit(tmp_path: Path, given: dict[str, list[int]]) -> None:
    model = load_with_inputs(tmp_path, x=["batch", 3, 8, 8])
    with pytest.raises(UserError, match=r"does not fit input x, which is batchx3x8x8|no input z; its inputs are x"):
        resolve_shapes(model, given, batch=8)
