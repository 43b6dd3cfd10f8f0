"""Reconstruction: exact solves, targets that can be undone, and a whole network that loses less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.allocation.masks import block_mask
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import export_family  # noqa: E402

from lsp_deploy.autodiff.module import OnnxModule  # noqa: E402
from lsp_deploy.reconstruction.moments import Moments  # noqa: E402
from lsp_deploy.reconstruction.network import Batch, reconstruct  # noqa: E402
from lsp_deploy.reconstruction.parameters import LayerParameters  # noqa: E402
from lsp_deploy.reconstruction.ridge import solve_ridge  # noqa: E402
from lsp_deploy.reconstruction.targets import fit_target  # noqa: E402
from lsp_deploy.reconstruction.two_four import two_four_support  # noqa: E402

DIGITS = Path(__file__).parents[2] / "lsp_deploy" / "assets"


def moments_of(x: np.ndarray, y: np.ndarray, weight: np.ndarray, *, bias: bool) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], bias=bias)
    moments.add(*(torch.from_numpy(value.astype(np.float32)) for value in (x, y, weight)))
    return moments


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([(4, 3), (1, 1), (12, 2)]))
def test_each_column_is_the_minimum_of_its_ridge_problem(seed: int, bias: bool, block: tuple[int, int]) -> None:
    generator = np.random.default_rng(seed)
    K, N = 10, 7
    x, y = generator.standard_normal((40, K)), generator.standard_normal((40, N))
    weight = generator.random(40)
    mask = block_mask(generator.random((K, N)).astype(np.float32), block, 0.5)
    prior = generator.standard_normal((K + bias, N))
    moments = moments_of(x, y, weight, bias=bias)
    theta = solve_ridge(moments, torch.from_numpy(prior), mask, 0.3).numpy()
    ridge = 0.3 * float((weight[:, None] * x**2).sum(axis=0).mean())
    inputs = np.column_stack([x, np.ones(40)]) if bias else x
    alive = np.vstack([mask, np.ones((int(bias), N), bool)])
    np.testing.assert_array_equal(theta[~alive], 0)
    # At the minimum the gradient over the surviving weights is zero.
    gradient = inputs.T @ (weight[:, None] * (inputs @ theta - y)) + ridge * (theta - prior)
    assert np.abs(gradient[alive]).max(initial=0) < 1e-4 * np.abs(inputs.T @ (weight[:, None] * y)).max()


def test_error_is_that_of_the_weighted_tokens() -> None:
    generator = np.random.default_rng(0)
    x, y, theta = generator.standard_normal((30, 5)), generator.standard_normal((30, 4)), generator.random((5, 4))
    weight = generator.random(30)
    expected = (weight[:, None] * (x @ theta - y) ** 2).sum() / (weight[:, None] * y**2).sum()
    assert moments_of(x, y, weight, bias=False).error(torch.from_numpy(theta)) == pytest.approx(expected, rel=1e-5)


def test_two_four_masks_cost_less_than_magnitude_under_correlated_inputs() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 6)) @ generator.standard_normal((6, 16)) + 0.3 * generator.standard_normal(
        (400, 16)
    )
    weight = generator.standard_normal((16, 9))
    hessian = x.T @ x
    found = two_four_support(torch.from_numpy(weight), torch.from_numpy(hessian))
    assert (found.reshape(4, 4, 9).sum(axis=1) == 2).all()
    by_size = np.abs(weight).reshape(4, 4, 9)
    magnitude = np.zeros_like(by_size, bool)
    np.put_along_axis(magnitude, np.argsort(-by_size, axis=1)[:, :2], True, axis=1)

    def cost(mask: np.ndarray) -> float:
        moments = moments_of(x, x @ weight, np.ones(400), bias=False)
        return moments.error(solve_ridge(moments, torch.zeros(16, 9, dtype=torch.float64), mask, 1e-6))

    assert cost(found) < 0.8 * cost(magnitude.reshape(16, 9))


class Digits:
    """The embedded model with some of its calibration images, in batches of which the last is padded."""

    def __init__(self) -> None:
        self.model = canonicalize(load_model(DIGITS / "digits_vit.onnx"), max_opset=20)
        self.layers = [layer for layer in linear_layers(self.model) if layer.role in ("qkv", "proj", "fc1", "fc2")]
        images = np.load(DIGITS / "calibration.npz")
        self.name = str(self.model.graph.inputs[0].name)
        self.images = torch.from_numpy(images[images.files[0]][:60].astype(np.float32))
        held_out = np.arange(60) % 5 == 0
        self.batches = [
            Batch({self.name: self.images[part]}, ~held_out[part], held_out[part])
            for part in np.split(np.arange(60), 2)
        ]

    def loss(self, module: OnnxModule, dense: OnnxModule) -> float:
        with torch.no_grad():
            answers = [net({self.name: self.images})["logits"].log_softmax(1) for net in (module, dense)]
        return float(torch.nn.functional.kl_div(*answers, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("pattern", ["block", "2:4"])
def test_a_network_loses_less_and_keeps_its_zeros(pattern: str) -> None:
    digits = Digits()
    dense, masked, solved = (OnnxModule(digits.model) for _ in range(3))
    masks = {layer.name: block_mask(np.abs(layer.weight()), (16, 16), 0.5) for layer in digits.layers}
    two_four = {layer.name for layer in digits.layers} if pattern == "2:4" else set()
    fits = reconstruct(dense, solved, digits.layers, digits.batches, masks={} if two_four else masks, two_four=two_four)
    for layer in digits.layers:
        parameters, fit = LayerParameters(layer, masked), fits[layer.name]
        theta = parameters.read()
        theta[: layer.K] *= torch.from_numpy(fit.mask)
        parameters.write(theta)
        written = LayerParameters(layer, solved).read()[: layer.K].numpy()
        np.testing.assert_array_equal(written[~fit.mask], 0)
        assert fit.mask.mean() == pytest.approx(0.5, abs=0.01)
        assert fit.error_after <= fit.error_before or not fit.accepted
        assert fit.fits == ("residual stream" if layer.role in ("proj", "fc2") else "layer output")
    assert digits.loss(solved, dense) < 0.6 * digits.loss(masked, dense)


def test_a_solve_that_held_out_samples_do_not_like_is_not_taken() -> None:
    digits = Digits()
    dense, solved = OnnxModule(digits.model), OnnxModule(digits.model)
    layer = digits.layers[0]
    noise = Batch({digits.name: torch.randn(30, *digits.images.shape[1:])}, np.ones(30, bool), np.zeros(30, bool))
    judge = Batch({digits.name: digits.images}, np.zeros(60, bool), np.ones(60, bool))
    mask = np.ones((layer.K, layer.N), bool)
    mask[:8] = False
    fits = reconstruct(dense, solved, [layer], [noise, judge], masks={layer.name: mask})
    if not fits[layer.name].accepted:
        theta = LayerParameters(layer, OnnxModule(digits.model)).read()
        theta[:8] = 0
        torch.testing.assert_close(LayerParameters(layer, solved).read(), theta, rtol=1e-6, atol=1e-6)
    assert fits[layer.name].error_after <= fits[layer.name].error_before or not fits[layer.name].accepted


@pytest.mark.parametrize(
    "family", ["swin_tiny_patch4_window7_224", "cait_xxs24_224", "deit_tiny_distilled_patch16_224"]
)
def test_the_way_to_the_residual_add_is_undone(family: str) -> None:
    """Fed what `wanted` says in place of the layer's output, the pruned network gives the dense stream."""
    model = canonicalize(load_model(export_family(family)), max_opset=20)
    layers = [layer for layer in linear_layers(model) if layer.residual is not None and layer.role in ("proj", "fc2")]
    dense, pruned = OnnxModule(model), OnnxModule(model)
    for layer in layers[:1]:
        parameters = LayerParameters(layer, pruned)
        parameters.write(parameters.read() * 0.5)
    shape = [2, *(int(size) for size in list(model.graph.inputs[0].shape)[1:])]
    feeds = {str(model.graph.inputs[0].name): torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    undone = 0
    with torch.no_grad():
        for layer in layers:
            target = fit_target(layer, residual=True)
            before, whole = pruned.start(feeds), dense.start(feeds)
            before.advance(str(layer.node.name), after=False)
            whole.advance(target.dense_node, after=True)
            stream = whole.values[target.dense_value]
            found = target.wanted(before, stream)
            if found is None:
                continue
            undone += 1
            before.advance(target.output_node, after=True)
            before.values[target.output] = found[0]
            before.advance(str(target.residual_node), after=True)
            torch.testing.assert_close(before.values[target.residual_output], stream, rtol=1e-3, atol=1e-3)
    assert undone == len(layers) > 0
