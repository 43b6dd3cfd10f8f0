"""The network that is pruned: weights by name, masks, what is changed, and its samples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import export_family, export_segmentation_vit  # noqa: E402
from graphs import graph, run  # noqa: E402
from networks import digits_network, moved_network, network_of, outputs_of_plan, plan_of  # noqa: E402

from lsp_deploy.allocation.masks import block_mask  # noqa: E402
from lsp_deploy.errors import UserError  # noqa: E402
from lsp_deploy.linear_layers import LinearLayer  # noqa: E402
from lsp_deploy.passes.canonicalize import canonicalize  # noqa: E402
from lsp_deploy.search.gradients import (  # noqa: E402
    mean_magnitude,
    network_gradients,
    removal_damages,
    token_weights,
)
from lsp_deploy.search.network import Network  # noqa: E402
from lsp_deploy.sensitivity.feeds import real_samples, tensor_feeds  # noqa: E402
from lsp_deploy.sensitivity.objectives import make_objective  # noqa: E402

INSIDE = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def half_masks(network: Network, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        layer.name: block_mask(generator.random((layer.K, layer.N)).astype(np.float32), (16, 16), 0.5)
        for layer in network.layers
        if layer.role in INSIDE and layer.name not in network.not_writable
    }


def named(
    nodes: str, *, y: str = "float[B, 5, 8] y", x: str = "float[B, 5, 8] x", **sizes: tuple[int, ...]
) -> ir.Model:
    generator = np.random.default_rng(0)
    weights = {name: (generator.standard_normal(size) / 2).astype(np.float32) for name, size in sizes.items()}
    model = graph(nodes, x=x, y=y, weights=weights)
    for node in model.graph:
        node.name = node.outputs[0].name
    return canonicalize(model, max_opset=17)


def test_nothing_is_changed_at_first() -> None:
    network = digits_network()
    assert not any(network.is_changed(layer.name) for layer in network.layers)
    assert network.changed_constants() == {}
    plan = plan_of(network)
    assert not plan.weights and not plan.biases and not plan.constants


def test_the_model_that_was_given_is_never_changed() -> None:
    network = digits_network(samples=16)
    given = {name: value.const_value.numpy().copy() for name, value in network.model.graph.initializers.items()}
    model = network.model
    again = Network(model, {str(model.graph.inputs[0].name): (8, 1, 8, 8)}, network.dataset)
    again.mask(half_masks(again))
    again.reconstruct(half_masks(again), {layer.name for layer in again.layers if layer.role in INSIDE})
    again.current_layers()
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), given[name])


def test_masks_zero_the_pruned_network_alone_and_reset_brings_it_back() -> None:
    network = digits_network()
    masks = half_masks(network)
    network.mask(masks)
    for layer in network.current_layers():
        theta, dense = network.theta(layer.name), network.dense_theta(layer.name)
        mask = torch.from_numpy(masks.get(layer.name, np.ones((layer.K, layer.N), bool)))
        assert torch.equal(theta[: layer.K], dense[: layer.K] * mask)
        assert torch.equal(theta[layer.K :], dense[layer.K :])  # the bias stays
        assert network.is_changed(layer.name) == (layer.name in masks)
        np.testing.assert_allclose(layer.weight(), theta[: layer.K].float().numpy())
    network.reset()
    assert not any(network.is_changed(layer.name) for layer in network.layers)


@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "cait_xxs24_224"])
def test_the_plan_gives_in_onnx_runtime_what_torch_computes(family: str) -> None:
    network = moved_network(export_family(family))
    masks = half_masks(network)
    network.reconstruct(masks, masks.keys())
    feeds = network.dataset.feeds([0, 1])
    with torch.no_grad():
        expected = network.pruned(tensor_feeds(network.dataset, np.arange(2), "cpu"))
    (got,) = outputs_of_plan(network.model, plan_of(network), feeds)
    scale = float(expected["logits"].abs().max())
    np.testing.assert_allclose(got, expected["logits"].numpy(), rtol=0, atol=2e-4 * scale)
    assert np.abs(got - run(network.model, feeds)[0]).max() > 1e-2 * scale


def test_constants_are_named_by_node_and_input() -> None:
    network = moved_network(export_family("vit_tiny_patch16_224"))
    norm = next(node for node in network.model.graph if node.op_type == "LayerNormalization")
    network.set_constant(norm, 1, network.constant(norm, 1) * 2)
    changed = network.changed_constants()
    assert list(changed) == [f"{norm.name}:1"]
    np.testing.assert_allclose(changed[f"{norm.name}:1"], network.constant(norm, 1).numpy())
    network.reset()
    plan = plan_of(network)
    feeds = network.dataset.feeds([0])
    assert np.abs(outputs_of_plan(network.model, plan, feeds)[0] - run(network.model, feeds)[0]).max() > 1e-3


def test_what_shares_a_weight_cannot_be_written_and_keeps_it() -> None:
    model = named("a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  y = MatMul(c, v)", w=(8, 8), v=(8, 8))
    network = network_of(model)
    assert set(network.not_writable) == {"a", "c"}
    assert network.reconstruct({}, {"a", "c", "y"}).keys() <= {"y"}
    assert not network.is_changed("a")


def test_biases_that_are_stored_once_are_each_layers_own() -> None:
    model = named(
        "a = MatMul(x, w)  b = Add(a, e)  c = Relu(b)  d = MatMul(c, v)  y = Add(d, f)",
        w=(8, 8), v=(8, 8), e=(8,), f=(8,),
    )  # fmt: skip
    for name in ("e", "f"):
        model.graph.initializers[name].const_value = ir.tensor(np.zeros(8, np.float32), name=name)
    network = network_of(canonicalize(model, max_opset=17))
    theta = network.theta("a")
    theta[-1] = 1.0
    network.set_theta("a", theta)
    assert float(network.theta("d")[-1].abs().max()) == 0
    assert network.is_changed("a") and not network.is_changed("d")


def test_held_out_samples_judge_and_are_never_fitted() -> None:
    network = digits_network(samples=23)
    fitted = np.concatenate([batch.fitted for batch in network.batches])
    judged = np.concatenate([batch.held_out for batch in network.batches])
    assert len(fitted) == 23
    assert not (fitted & judged).any() and (fitted | judged).all()
    assert judged.sum() == 5


def test_a_fixed_batch_is_filled_up_and_the_filling_counts_for_nothing() -> None:
    model = named(
        "a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, v)",
        x="float[4, 5, 8] x", y="float[4, 5, 8] y", w=(8, 16), v=(16, 8),
    )  # fmt: skip
    network = network_of(model, samples=6, fixed_batch=True)
    assert network.batch_size == 4
    assert [batch.fitted.sum() + batch.held_out.sum() for batch in network.batches] == [4, 2]
    assert all(len(next(iter(batch.feeds.values()))) == 4 for batch in network.batches)
    whole = network_of(named(
        "a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, v)", w=(8, 16), v=(16, 8)
    ), samples=6)  # fmt: skip
    masks = {"a": np.arange(16)[None, :] % 2 * np.ones((8, 1)) > 0}
    solved = [one.reconstruct(masks, {"a", "y"}) and one.theta("y") for one in (network, whole)]
    torch.testing.assert_close(solved[0], solved[1], rtol=1e-4, atol=1e-5)
    objective = make_objective("output", model, None, seed=0)
    scores = [network_gradients(one, objective, (4, 4)).scores for one in (network, whole)]
    for name in ("a", "y"):
        np.testing.assert_allclose(scores[0][name], scores[1][name], rtol=1e-4)


def test_gradients_are_those_of_the_network_as_it_stands() -> None:
    network = digits_network(samples=12)
    objective = make_objective("top1", network.model, None, seed=0)
    dense = network_gradients(network, objective, (16, 16), contributions=True)
    masks = half_masks(network)
    network.mask(masks)
    pruned = network_gradients(network, objective, (16, 16), contributions=True)
    for layer in network.layers:
        assert dense.blocks[layer.name].contributions.shape == (12, len(dense.scores[layer.name]))
        np.testing.assert_allclose(
            dense.scores[layer.name], np.abs(dense.blocks[layer.name].contributions).mean(axis=0), rtol=1e-5
        )
    for name, mask in masks.items():
        grid = mask[::16, ::16].reshape(-1)
        assert (pruned.scores[name][~grid] == 0).all()
        assert pruned.scores[name][grid].sum() > 0  # but what only dead neurons read
        assert (dense.scores[name] > 0).all()
    again = network_gradients(network, objective, (16, 16), contributions=True)
    for name in pruned.scores:
        np.testing.assert_array_equal(again.scores[name], pruned.scores[name])


def test_token_weights_of_both_passes_agree_and_average_one() -> None:
    network = digits_network(samples=11)
    objective = make_objective("top1", network.model, None, seed=0)
    alone, beside = token_weights(network, objective), network_gradients(network, objective, (16, 16)).token_weights
    assert alone.keys() == beside.keys()
    for name, weights in alone.items():
        np.testing.assert_allclose(weights, beside[name], rtol=1e-4)
        assert weights.mean() == pytest.approx(1, rel=1e-5)
    last = next(layer for layer in reversed(network.layers) if layer.role == "fc2")
    assert alone[last.name].max() > 5 * alone[last.name].min()  # the head reads one token


def test_the_damage_of_a_removal_is_the_first_order_change_of_it_alone() -> None:
    network = digits_network(samples=9)
    objective = make_objective("top1", network.model, None, seed=0)
    masks = half_masks(network)
    damages = removal_damages(network, objective, masks)
    blocks = network_gradients(network, objective, (16, 16), contributions=True).blocks
    assert damages.keys() == masks.keys()
    for name, mask in masks.items():
        gone = ~mask[::16, ::16].reshape(-1)
        expected = np.abs(blocks[name].contributions[:, gone].sum(axis=1)).mean()
        assert damages[name] == pytest.approx(expected, rel=1e-3)


def test_mean_magnitude_is_that_however_many_samples_there_are() -> None:
    contributions = np.random.default_rng(0).standard_normal((150, 7)).astype(np.float32)
    np.testing.assert_allclose(mean_magnitude(contributions), np.abs(contributions).mean(axis=0), rtol=1e-5)


def test_a_dense_prediction_model_has_networks_too() -> None:
    network = moved_network(export_segmentation_vit(), samples=2)
    objective = make_objective("output", network.model, None, seed=0)
    gradients = network_gradients(network, objective, (16, 16))
    assert all(np.isfinite(scores).all() for scores in gradients.scores.values())
    assert len(gradients.scores) == len(network.layers)


def first_mlp(network: Network) -> tuple[LinearLayer, LinearLayer]:
    return next((one, other) for one, other in pairwise(network.layers) if (one.role, other.role) == ("fc1", "fc2"))


def test_a_layer_in_front_of_one_that_is_gone_is_solved_with_all_tokens_alike() -> None:
    network = digits_network(16)
    first, second = first_mlp(network)
    masks = {second.name: np.zeros((second.K, second.N), bool)}
    network.mask(masks)
    weights = token_weights(network, make_objective("top1", network.model))
    assert not weights[first.name].any()
    network.reset()
    fits = network.reconstruct(masks, [first.name, second.name], token_weights=weights)
    network.reset()
    alike = network.reconstruct(masks, [first.name, second.name])
    torch.testing.assert_close(fits[first.name].theta, alike[first.name].theta)


@pytest.mark.parametrize("two_four", [False, True])
def test_a_layer_that_nothing_arrives_at_keeps_its_weights(two_four: bool) -> None:
    network = digits_network(16)
    first, second = first_mlp(network)
    theta = torch.zeros_like(network.theta(first.name))
    theta[first.K] = -100.0  # a GELU gives zero
    network.set_theta(first.name, theta)
    before = network.theta(second.name)[: second.K]
    fit = network.reconstruct({}, [second.name], two_four=[second.name] if two_four else ())[second.name]
    kept = torch.from_numpy(fit.mask)
    torch.testing.assert_close(fit.theta[: second.K][kept], before[kept])


def test_activations_that_are_not_finite_are_bad_input() -> None:
    network = digits_network(16)
    first, second = first_mlp(network)
    network.set_theta(first.name, network.theta(first.name) * float("inf"))
    with pytest.raises(UserError, match="NaN or infinite"):
        network.reconstruct({}, [second.name])


def test_filling_is_left_out_of_what_has_a_row_for_each_sample() -> None:
    outputs = {"logits": torch.zeros(4, 10), "scale": torch.tensor(14.3), "table": torch.zeros(7, 2)}
    shapes = {name: tuple(value.shape) for name, value in real_samples(outputs, 3, 4).items()}
    assert shapes == {"logits": (3, 10), "scale": (), "table": (7, 2)}
