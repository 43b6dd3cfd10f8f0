"""The verb `sensitivity` from end to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from lsp_deploy.files import sha256_of
from lsp_deploy.plan import load_plan

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import export_timm  # noqa: E402

DATA = ("--calibration-data", "calibration.npz")
ONE_THREAD = ("--jobs", 1)
LABELS = ("--labels", "calibration_labels.csv")


def result_of(folder: Path | str) -> tuple[dict, dict[str, np.ndarray]]:
    description = json.loads((Path(folder) / "sensitivity.json").read_text())
    with np.load(Path(folder) / "sensitivity.npz", allow_pickle=False) as arrays:
        return description, {name: arrays[name] for name in arrays.files}


def brute_force(model: Path, feeds: np.ndarray, labels: np.ndarray, layer: dict, block: tuple[int, int], kappa: float):
    """The order and curve of one layer, in float64, from the weight's own gradients of one sample after the other."""
    from lsp_deploy.autodiff.module import OnnxModule
    from lsp_deploy.model import load_model
    from lsp_deploy.passes.canonicalize import canonicalize

    module = OnnxModule(canonicalize(load_model(model), max_opset=20)).double()
    parameter = module.weights[layer["weight"]]
    gradients = []
    for image, label in zip(feeds, labels, strict=True):
        module.zero_grad()
        logits = module({module.input_names[0]: torch.from_numpy(image[None]).double()})["logits"]
        torch.nn.functional.cross_entropy(logits, torch.tensor([label])).backward()
        gradients.append(as_matrix(parameter.grad, layer))
    W, G = as_matrix(parameter.detach(), layer), np.stack(gradients)
    block_of = (np.arange(W.shape[0]) // block[0])[:, None] * -(-W.shape[1] // block[1]) + np.arange(
        W.shape[1]
    ) // block[1]
    score = np.abs(G * W).mean(axis=0)
    means = [score[block_of == index].mean() for index in range(block_of.max() + 1)]
    order = np.argsort(means, kind="stable")
    delta = []
    for count in range(len(order) + 1):
        change = np.where(np.isin(block_of, order[:count]), -W, 0)
        projections = (G * change).sum(axis=(1, 2))
        delta.append(projections.mean() + 0.5 * (kappa * (change**2).sum() + (projections**2).mean()))
    return order, np.array(delta)


def as_matrix(tensor: torch.Tensor, layer: dict) -> np.ndarray:
    array = tensor.numpy().astype(np.float64)
    return array if array.shape == (layer["K"], layer["N"]) else array.reshape(layer["N"], layer["K"]).T


@pytest.mark.parametrize("block", [(16, 16), (24, 40)])
def test_equals_a_brute_force_computation(run, bare: Path, block: tuple[int, int]) -> None:
    arguments = ("--block", f"{block[0]}x{block[1]}", "--samples", 40, "-o", "out")
    assert run("sensitivity", bare.name, *DATA, *LABELS, *ONE_THREAD, *arguments).code == 0
    description, arrays = result_of("out")
    assert description["objective"] == "loss"
    assert description["samples"] == 40
    assert description["model_sha256"] == sha256_of(bare)
    assert isinstance(description["smoothing"], str)
    from lsp_deploy.model import load_model
    from lsp_deploy.steps.calibration import open_named

    dataset, _ = open_named(
        load_model(bare),
        {"pixel_values": (1, 1, 8, 8)},
        "calibration.npz",
        preprocess=None,
        labels="calibration_labels.csv",
        label_column=None,
        samples=40,
        seed=0,
    )
    feeds, labels = dataset.feeds(range(40))["pixel_values"], dataset.labels
    for name in list(description["layers"])[:3] + list(description["layers"])[-1:]:
        layer = description["layers"][name]
        order, delta = brute_force(bare, feeds, labels, layer, block, description["kappa"])
        np.testing.assert_array_equal(arrays[f"{name}.order"], order)
        assert arrays[f"{name}.order"].dtype == np.int64
        assert arrays[f"{name}.delta"].dtype == np.float64
        np.testing.assert_allclose(arrays[f"{name}.delta"], delta, rtol=1e-5, atol=1e-6 * np.abs(delta).max())


def test_layers_are_those_of_a_plan(run, bare: Path) -> None:
    assert run("sensitivity", bare.name, *DATA, *ONE_THREAD, "--samples", 4, "-o", "out").code == 0
    assert run("compress", bare.name, "--target", "a100", "--no-build", "-o", "compressed").code == 0
    plan = load_plan(Path("compressed") / "plan.json")
    description, arrays = result_of("out")
    assert list(description["layers"]) == [layer.name for layer in plan.layers]
    assert set(arrays) == {f"{layer.name}.{what}" for layer in plan.layers for what in ("order", "delta")}
    for layer in plan.layers:
        blocks = -(-layer.K // 32) * -(-layer.N // 32)
        assert sorted(arrays[f"{layer.name}.order"]) == list(range(blocks))
        assert arrays[f"{layer.name}.delta"].shape == (blocks + 1,)
        assert arrays[f"{layer.name}.delta"][0] == 0


def test_a_second_run_reads_the_cache_and_kappa_is_not_part_of_it(run, bare: Path, monkeypatch) -> None:
    command = ("sensitivity", bare.name, *DATA, *ONE_THREAD, "--samples", 12, "-o", "out")
    assert run(*command).code == 0
    first = result_of("out")
    (Path("out") / "sensitivity.npz").unlink()

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("the gradients were computed again")

    monkeypatch.setattr("lsp_deploy.sensitivity.block_gradients._run", never)
    assert run(*command).code == 0
    again = result_of("out")
    assert first[0] == again[0]
    for name, array in first[1].items():
        np.testing.assert_array_equal(array, again[1][name])
    assert run(*command, "--kappa", 1).code == 0
    assert result_of("out")[0]["kappa"] == 1


def test_json_is_alone_on_stdout(run, bare: Path) -> None:
    result = run("sensitivity", bare.name, *DATA, *ONE_THREAD, "--samples", 4, "--json")
    assert json.loads(result.out) == result_of(f"{bare.stem}-sensitivity")[0]


def test_processes_of_torchrun_give_the_same_curves(run, bare: Path) -> None:
    command = ("sensitivity", bare.name, *DATA, *LABELS, *ONE_THREAD, "--block", "16x16", "--samples", 50)
    assert run(*command, "-o", "one", "--cache", "cache-of-one").code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-I", "-m", "lsp_deploy", *map(str, command), "-o", "two", "--cache", "cache-of-two"],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "blocks" in printed[0]
    assert not printed[1]
    (cached,) = Path("cache-of-two").iterdir()
    assert [part.name for part in cached.iterdir()] == ["0-50"]
    (one, arrays), (two, others) = result_of("one"), result_of("two")
    assert two["kappa"] == pytest.approx(one["kappa"], rel=1e-12)
    for name, array in arrays.items():
        np.testing.assert_allclose(others[name], array, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--block", "0x16"), "--block"),
        (("--block", "16"), "--block"),
        (("--objective", "loss"), "--labels"),
        (("--objective", "nothing"), "--objective"),
        (("--kappa", "-1"), "--kappa"),
        (("--kappa", "nan"), "--kappa"),
        (("--samples", "0"), "--samples"),
        (("--shapes", "nonsense"), "--shapes"),
        (("--device", "cuda"), "cuda"),
        (("--calibration-data", "nowhere.npz"), "nowhere.npz"),
        (("-o", "calibration.npz"), "calibration.npz"),
        (("--cache", "calibration.npz/below"), "calibration.npz"),
    ],
)
def test_bad_flags(run, bare: Path, arguments: tuple[str, ...], fragment: str) -> None:
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    given = () if "--calibration-data" in arguments else DATA
    result = run("sensitivity", bare.name, *given, "--samples", 4, *arguments)
    assert result.code == 2, (result.out, result.err)
    lines = [line for line in result.err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    assert fragment in lines[0]


def test_without_torch_the_extra_is_named(run, bare: Path, monkeypatch) -> None:
    monkeypatch.setattr("lsp_deploy.analysing.find_spec", lambda name: None)
    result = run("sensitivity", bare.name, *DATA)
    assert result.code == 2
    assert "pip install 'lsp-deploy[torch]'" in result.err
    assert not Path(f"{bare.stem}-sensitivity").exists()


def test_a_ragged_head_of_1000_classes(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = export_timm("vit_tiny_patch16_224", depth=1, image_size=64, num_classes=1000)
    arguments = ("--calibration-data", "random", "--samples", 3, "--block", "64x64", "-o", "out")
    assert run("sensitivity", model, *ONE_THREAD, *arguments).code == 0
    description, arrays = result_of("out")
    name, head = list(description["layers"].items())[-1]
    assert (head["K"], head["N"], head["blocks"]) == (192, 1000, 3 * 16)
    assert np.isfinite(arrays[f"{name}.delta"]).all()
    assert description["objective"] == "top1"


def test_a_16_bit_model_is_analysed_in_float32(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = export_timm("vit_tiny_patch16_224", depth=1, image_size=64, dtype="fp16")
    result = run("sensitivity", model, *ONE_THREAD, "--calibration-data", "random", "--samples", 3, "-o", "out")
    assert result.code == 0, result.err
    assert all(np.isfinite(array).all() for array in result_of("out")[1].values())


def write_dense_model(path: Path) -> None:
    """Two inputs; a class map [batch, classes, height, width] and token features [batch, tokens, channels]."""
    random = np.random.default_rng(0)
    weights = {"W": (12, 5), "V": (3, 12)}
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        dense (float[batch, 16, 12] tokens, float[batch, 16, 3] extra)
            => (float[batch, 5, 4, 4] map, float[batch, 16, 12] features) {
          added = MatMul(extra, V)
          features = Add(tokens, added)
          scores = MatMul(features, W)
          turned = Transpose<perm = [0, 2, 1]>(scores)
          map = Reshape(turned, shape)
        }"""
    )
    for name, size in weights.items():
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(random.standard_normal(size).astype(np.float32), name)
        )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 5, 4, 4], np.int64), "shape"))
    for number, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.save(proto, path)


@pytest.mark.parametrize("objective", [None, "top1", "pseudo"])
def test_a_dense_model_with_several_inputs_and_outputs(run, tmp_path: Path, monkeypatch, objective) -> None:
    monkeypatch.chdir(tmp_path)
    write_dense_model(Path("dense.onnx"))
    random = np.random.default_rng(1)
    np.savez("data.npz", tokens=random.standard_normal((9, 16, 12)), extra=random.standard_normal((9, 16, 3)))
    np.savez("labelled.npz", **np.load("data.npz"), labels=np.arange(9))
    data = "data.npz" if objective else "labelled.npz"
    arguments = ("--calibration-data", data, "--block", "4x3", "-o", "out")
    chosen = () if objective is None else ("--objective", objective)
    result = run("sensitivity", "dense.onnx", *ONE_THREAD, *arguments, *chosen)
    assert result.code == 0, result.err
    description, arrays = result_of("out")
    assert description["objective"] == (objective or "output")
    assert ("labels are not used" in result.err) == (objective is None)
    assert {name.rpartition(".")[0] for name in arrays} == {"MatMul_0", "MatMul_2"}
    assert arrays["MatMul_2.delta"][-1] != 0
