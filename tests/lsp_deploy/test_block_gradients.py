"""Contributions of blocks: equal to gradients of single samples, whatever the graph, the batches and interruptions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lsp_deploy.allocation.masks import block_sums
from lsp_deploy.data import open_dataset
from lsp_deploy.errors import UserError
from lsp_deploy.linear_layers import LinearLayer, linear_layers
from lsp_deploy.model import load_model, resolve_shapes

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import export_clip, export_family  # noqa: E402
from graphs import graph  # noqa: E402

from lsp_deploy.autodiff.module import OnnxModule  # noqa: E402
from lsp_deploy.passes.canonicalize import canonicalize  # noqa: E402
from lsp_deploy.sensitivity import block_gradients as passes  # noqa: E402
from lsp_deploy.sensitivity.analysis import analyse, default_kappa  # noqa: E402
from lsp_deploy.sensitivity.gradient_files import GradientFiles  # noqa: E402
from lsp_deploy.sensitivity.layer_rows import find_layouts  # noqa: E402
from lsp_deploy.sensitivity.objectives import make_objective  # noqa: E402

DIGITS = Path(__file__).parents[2] / "lsp_deploy" / "assets" / "digits_vit.onnx"


@dataclass
class Case:
    """A model with random data."""

    model: ir.Model
    samples: int
    batch: int = 1

    def __post_init__(self) -> None:
        shapes = resolve_shapes(self.model, None, batch=self.batch)
        self.layers = linear_layers(self.model, shapes)
        dtypes = {value.name: value.dtype.numpy() for value in self.model.graph.inputs}
        self.dataset = open_dataset("random", shapes=shapes, dtypes=dtypes, preprocess=None, samples=self.samples)

    def analyse(self, cache: Path, block: tuple[int, int] = (16, 16), **options):
        return analyse(
            self.model, self.layers, self.dataset, block=block, model_sha256="of the file", cache=cache, **options
        )

    def check(self, cache: Path, block: tuple[int, int], objective: str, **options) -> None:
        """Compare with autograd's gradients of one sample at a time."""
        result = self.analyse(cache, block, objective=objective, **options)
        module = OnnxModule(self.model)
        function = make_objective(objective, self.model)
        taylor = {layer.name: 0.0 for layer in self.layers}
        for index in range(self.samples):
            module.zero_grad()
            filled = [index] * self.batch
            outputs = module({name: torch.from_numpy(value) for name, value in self.dataset.feeds(filled).items()})
            function({name: value[:1] for name, value in outputs.items()}, np.array([index])).backward()
            for layer in self.layers:
                product = _product(module, layer)
                expected = block_sums(product, block).reshape(-1)
                found = result.layers[layer.name].gradients.contributions[index]
                # float32 rounds relative to what is added up, not to the sum.
                scale = block_sums(np.abs(product), block).max()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(scale, 1e-3))
                sizes = block_sums(np.ones_like(product), block).reshape(-1)
                taylor[layer.name] += block_sums(np.abs(product), block).reshape(-1) / sizes / self.samples
        for layer in self.layers:
            gathered = result.layers[layer.name].gradients
            np.testing.assert_allclose(gathered.taylor, taylor[layer.name], rtol=1e-3, atol=1e-9)
            norms = block_sums(np.square(layer.weight()), block).reshape(-1)
            np.testing.assert_allclose(gathered.square_norms, norms, rtol=1e-5)


def _product(module: OnnxModule, layer: LinearLayer) -> np.ndarray:
    """W ∘ gradient of the weight, [K, N]; shared weights hold the sum over their uses."""
    weight = module.weights[layer.weight_root]
    product = (weight.grad * weight).detach().numpy()
    if layer.node.op_type == "Conv" or layer.node.attributes.get_int("transB", 0):
        return product.reshape(layer.N, layer.K).T
    return product.reshape(layer.K, layer.N)


def digits(samples: int = 5) -> Case:
    return Case(load_model(DIGITS), samples)


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (48, 20), (1, 7), (1000, 1000)])
def test_equal_gradients_of_single_samples(block: tuple[int, int], tmp_path: Path) -> None:
    digits().check(tmp_path, block, "top1", batch_size=2)


@pytest.mark.parametrize("family", ["swin_tiny_patch4_window7_224", "mobilevit_xxs", "convnext_atto"])
def test_equal_gradients_of_single_samples_in_other_families(family: str, tmp_path: Path) -> None:
    model = canonicalize(load_model(export_family(family)), max_opset=22)
    Case(model, 3).check(tmp_path, (16, 16), "top1", batch_size=2)


@pytest.mark.parametrize("limit", [1, 1000, 20_000])
def test_pieces_give_the_same(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes._CHUNK_BYTES, "cpu", limit)
    digits().check(tmp_path, (24, 16), "top1", batch_size=3)


def weights(**sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def named(model: ir.Model) -> ir.Model:
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    return model


def test_gradients_of_a_shared_weight_add_up(tmp_path: Path) -> None:
    nodes = "a = MatMul(x, W) b = Tanh(a) c = MatMul(b, W) y = MatMul(c, V)"
    model = graph(nodes, x="float[n, 5, 8] x", y="float[n, 5, 3] y", weights=weights(W=(8, 8), V=(8, 3)))
    case = Case(named(model), 5)
    case.check(tmp_path, (4, 4), "output", batch_size=2)
    result = case.analyse(tmp_path, (4, 4), objective="output")
    assert result.layers["MatMul_0"].gradients is result.layers["MatMul_2"].gradients


def test_samples_that_take_turns_are_told_apart(tmp_path: Path) -> None:
    # torch's own attention runs with tokens first.
    nodes = """t = Transpose<perm = [1, 0, 2]>(x) a = MatMul(t, W) b = Tanh(a)
        c = MatMul(b, V) y = Transpose<perm = [1, 0, 2]>(c)"""
    model = graph(nodes, x="float[n, 5, 8] x", y="float[n, 5, 3] y", weights=weights(W=(8, 8), V=(8, 3)))
    case = Case(named(model), 5)
    feeds = {name: torch.from_numpy(value) for name, value in case.dataset.feeds([0, 1, 2]).items()}
    assert find_layouts(OnnxModule(case.model), case.layers, feeds) == {
        "MatMul_1": "samples inside",
        "MatMul_3": "samples inside",
    }
    case.check(tmp_path, (4, 4), "output", batch_size=3)


def test_samples_that_cannot_be_told_apart_are_taken_one_at_a_time(tmp_path: Path, capsys) -> None:
    nodes = """m = ReduceMean<axes = [0]>(x) s = Add(x, m) y = MatMul(s, V)"""
    model = graph(nodes, x="float[n, 5, 8] x", y="float[n, 5, 3] y", weights=weights(V=(8, 3)))
    Case(named(model), 4).check(tmp_path, (4, 4), "output")
    assert "one at a time" in capsys.readouterr().err


def test_a_model_that_compares_samples_sees_one_at_a_time(tmp_path: Path, capsys) -> None:
    Case(canonicalize(load_model(export_clip()), max_opset=22), 3).check(tmp_path, (16, 16), "output")
    assert "compare the samples of a batch: samples are taken one at a time" in capsys.readouterr().err


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    nodes = "a = MatMul(x, W) b = Tanh(a) y = MatMul(b, V)"
    model = graph(nodes, x="float[4, 5, 8] x", y="float[4, 5, 3] y", weights=weights(W=(8, 8), V=(8, 3)))
    Case(named(model), 6, batch=4).check(tmp_path, (4, 4), "output")


def test_a_layer_that_changes_nothing_has_no_contributions(tmp_path: Path) -> None:
    nodes = "a = MatMul(x, W) y = MatMul(x, V) i = Cast<to = 7>(a)"
    model = graph(
        nodes,
        x="float[n, 5, 8] x",
        y="float[n, 5, 3] y, int64[n, 5, 8] i",
        weights=weights(W=(8, 8), V=(8, 3)),
    )
    result = Case(named(model), 3).analyse(tmp_path, (4, 4), objective="output")
    assert not np.any(result.layers["MatMul_0"].gradients.contributions)
    assert np.any(result.layers["MatMul_1"].gradients.contributions)


def test_an_objective_that_no_layer_influences_is_refused(tmp_path: Path) -> None:
    nodes = "a = MatMul(x, W) i = Cast<to = 7>(a) y = Cast<to = 1>(i)"
    model = graph(nodes, x="float[n, 5, 8] x", y="float[n, 5, 8] y", weights=weights(W=(8, 8)))
    with pytest.raises(UserError, match="no linear layer influences"):
        Case(named(model), 3).analyse(tmp_path, (4, 4), objective="output")


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    nodes = "a = MatMul(x, W) b = Abs(a) c = Neg(b) y = Sqrt(c)"
    model = graph(nodes, x="float[n, 5, 8] x", y="float[n, 5, 8] y", weights=weights(W=(8, 8)))
    with pytest.raises(UserError, match="MatMul_0 is NaN or infinite"):
        Case(named(model), 3).analyse(tmp_path, (4, 4), objective="output")


def test_an_interrupted_pass_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_SAVE_SECONDS", 0.0)
    whole = digits(9).analyse(tmp_path / "whole", batch_size=2)
    run, seen = passes._run, []

    def stops(module, feeds, objective, indices) -> None:
        seen.append(indices.tolist())
        if len(seen) == 4:
            raise KeyboardInterrupt
        run(module, feeds, objective, indices)

    monkeypatch.setattr(passes, "_run", stops)
    with pytest.raises(KeyboardInterrupt):
        digits(9).analyse(tmp_path / "stopped", batch_size=2)
    resumed = digits(9).analyse(tmp_path / "stopped", batch_size=2)
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7], [6, 7], [8]]
    for name, layer in whole.layers.items():
        other = resumed.layers[name].gradients
        np.testing.assert_array_equal(other.contributions, layer.gradients.contributions)
        np.testing.assert_array_equal(other.taylor, layer.gradients.taylor)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first, second = GradientFiles(tmp_path, 4, [3]), GradientFiles(tmp_path, 4, [3])
    rows = np.ones((2, 3), np.float32)
    first.append(0, rows, np.ones(3))
    with pytest.raises(UserError, match="another run is writing"):
        second.append(0, rows, np.ones(3))
    first.append(0, rows, np.ones(3))
    first.save(4)
    first.close()
    assert GradientFiles(tmp_path, 4, [3]).complete
    np.testing.assert_array_equal(first.contributions(0), np.ones((4, 3)))


@pytest.mark.parametrize("change", ["block", "objective", "samples", "model", "weights"])
def test_what_differs_is_not_read_from_the_cache(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits(4).analyse(tmp_path, objective="top1")
    ran = []
    run = passes._run
    monkeypatch.setattr(passes, "_run", lambda *arguments: (ran.append(1), run(*arguments)))
    digits(4).analyse(tmp_path, objective="top1")
    assert not ran
    case = digits(3 if change == "samples" else 4)
    if change == "weights":  # outside the file, say
        value = case.layers[0].weight_value
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
    analyse(
        case.model,
        case.layers,
        case.dataset,
        block=(16, 32) if change == "block" else (16, 16),
        objective="output" if change == "objective" else "top1",
        model_sha256="of another file" if change == "model" else "of the file",
        cache=tmp_path,
    )
    assert ran


def test_kappa_makes_the_ridge_a_hundredth_of_the_diagonal(tmp_path: Path) -> None:
    result = digits().analyse(tmp_path)
    gathered = {name: layer.gradients for name, layer in result.layers.items()}
    ridge = result.kappa * sum(one.square_norms.sum() for one in gathered.values())
    diagonal = sum(np.square(one.contributions).mean(axis=0).sum() for one in gathered.values())
    assert ridge == pytest.approx(0.01 * diagonal, rel=1e-5)
    assert result.kappa == default_kappa(gathered)
    assert digits().analyse(tmp_path, kappa=3.0).kappa == 3


def test_curves_of_another_order_and_without_the_first_order_term(tmp_path: Path) -> None:
    layer = next(iter(digits().analyse(tmp_path).layers.values()))
    np.testing.assert_array_equal(layer.curve(), layer.delta)
    backwards = layer.curve(layer.order[::-1])
    assert backwards[-1] == pytest.approx(layer.delta[-1], rel=1e-9)
    second = layer.curve(first_order=False)
    assert (second >= 0).all()
    removed = np.concatenate(
        [[0], np.cumsum(layer.gradients.contributions.astype(np.float64).mean(axis=0)[layer.order])]
    )
    np.testing.assert_allclose(second - removed, layer.delta, rtol=1e-9, atol=1e-15)


def test_importance_of_equal_scores_follows_the_index(tmp_path: Path) -> None:
    model = graph(
        "y = MatMul(x, W)", x="float[n, 5, 8] x", y="float[n, 5, 6] y", weights={"W": np.zeros((8, 6), np.float32)}
    )
    result = Case(named(model), 3).analyse(tmp_path, (2, 2), objective="output")
    np.testing.assert_array_equal(result.layers["MatMul_0"].order, np.arange(12))
    np.testing.assert_array_equal(result.layers["MatMul_0"].delta, np.zeros(13))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same(tmp_path: Path) -> None:
    on_cpu = digits().analyse(tmp_path / "cpu")
    on_gpu = digits().analyse(tmp_path / "gpu", device="cuda")
    for name, layer in on_cpu.layers.items():
        scale = np.abs(layer.delta).max()
        np.testing.assert_allclose(on_gpu.layers[name].curve(layer.order), layer.delta, atol=1e-3 * scale)
