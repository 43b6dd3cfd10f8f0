"""Bases that cost less, in which the network computes the same: in torch, and in ONNX Runtime by way of the plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from exports import export_clip, export_family, export_huggingface_vit, export_segmentation_vit, export_timm  # noqa: E402
from graphs import graph, run  # noqa: E402
from networks import digits_network, moved_network, network_of, outputs_of_plan, plan_of  # noqa: E402

from lsp_deploy.allocation.masks import block_mask  # noqa: E402
from lsp_deploy.bases.change import change_bases  # noqa: E402
from lsp_deploy.bases.heads import concentrate_qk, concentrate_v, find_attentions  # noqa: E402
from lsp_deploy.bases.neurons import find_mlps, order_neurons  # noqa: E402
from lsp_deploy.bases.order import arranged  # noqa: E402
from lsp_deploy.bases.profile import profile_activations  # noqa: E402
from lsp_deploy.bases.rotation import rotation, why_not_rotatable  # noqa: E402
from lsp_deploy.bases.streams import find_streams  # noqa: E402
from lsp_deploy.passes.canonicalize import canonicalize  # noqa: E402
from lsp_deploy.search.network import Network  # noqa: E402
from lsp_deploy.sensitivity.feeds import tensor_feeds  # noqa: E402
from lsp_deploy.sensitivity.objectives import make_objective  # noqa: E402

EXPORTS = {
    "vit": lambda: export_family("vit_tiny_patch16_224"),
    "deit distilled": lambda: export_family("deit_tiny_distilled_patch16_224"),
    "cait": lambda: export_family("cait_xxs24_224"),
    "beit": lambda: export_family("beit_base_patch16_224"),
    "hugging face": export_huggingface_vit,
    "swin": lambda: export_family("swin_tiny_patch4_window7_224"),
    "segmentation": export_segmentation_vit,
    "eva02": lambda: export_family("eva02_tiny_patch14_224"),
    "clip": export_clip,
    "levit": lambda: export_family("levit_128s"),
    "mobilevit": lambda: export_family("mobilevit_xxs"),
    "convnext": lambda: export_family("convnext_atto"),
    "mean pooling": lambda: export_timm("vit_tiny_patch16_224", depth=2, image_size=64, class_token=False,
                                          global_pool="avg"),
}  # fmt: skip


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.sampled_from(["sorted", "interleaved"]))
def test_an_arrangement_is_an_order_of_all_channels(values: list[int], arrangement: str) -> None:
    order = arranged(torch.tensor(values, dtype=torch.float64), arrangement)
    assert sorted(order.tolist()) == list(range(len(values)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_sorted_puts_the_most_important_first_and_equals_in_their_order(values: list[int]) -> None:
    order = arranged(torch.tensor(values, dtype=torch.float64), "sorted").tolist()
    assert order == sorted(range(len(values)), key=lambda index: (-values[index], index))


@given(st.integers(1, 41), st.integers(0, 2**31))
def test_interleaved_gives_every_four_two_of_the_better_half(size: int, seed: int) -> None:
    importance = torch.from_numpy(np.random.default_rng(seed).permutation(size).astype(float))
    order = arranged(importance, "interleaved").tolist()
    fours, rest = size // 4, size % 4
    better = set(torch.argsort(importance, descending=True)[: 2 * fours].tolist())
    worse = set(torch.argsort(importance)[: 2 * fours].tolist())
    for four in range(fours):
        here = set(order[4 * four : 4 * four + 4])
        assert len(here & better) == 2 and len(here & worse) == 2
    assert len(order[4 * fours :]) == rest


@settings(max_examples=40)
@given(st.integers(2, 24), st.integers(0, 2**31), st.sampled_from(["sorted", "interleaved"]))
def test_a_rotation_is_orthogonal_and_keeps_the_ones(d: int, seed: int, arrangement: str) -> None:
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((2 * d, d)))
    R = rotation(rows.T @ rows, arrangement)
    torch.testing.assert_close(R.T @ R, torch.eye(d, dtype=R.dtype), rtol=0, atol=1e-9)
    torch.testing.assert_close(R.sum(dim=0), torch.ones(d, dtype=R.dtype), rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_a_rotation_concentrates_what_lies_in_few_directions(seed: int, rank: int) -> None:
    d = 48
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((400, rank)) @ generator.standard_normal((rank, d))
    rows -= rows.mean(axis=1, keepdims=True)  # what a LayerNorm gives has no mean
    moment = torch.from_numpy(rows.T @ rows)
    R = rotation(moment, "sorted")
    energy = (R * (moment @ R)).sum(dim=0)
    assert (energy.diff() <= 1e-9 * energy[0]).all()
    assert energy[: 2 * rank].sum() / energy.sum() > 0.9
    plain = moment.diagonal().sort(descending=True).values
    assert plain[: 2 * rank].sum() / plain.sum() < 0.6
    # Nothing more can be in k orthogonal directions than the k largest eigenvalues hold.
    assert energy[:rank].sum() <= torch.linalg.eigvalsh(moment)[-rank:].sum() * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "norms", "readers", "writers", "constants", "scales"),
    [
        ("vit", 5, 5, 5, 2, 0),  # class token and positions
        ("deit distilled", 5, 6, 5, 3, 0),  # two heads
        ("cait", 9, 13, 9, 2, 8),  # LayerScale everywhere
        ("beit", 5, 5, 5, 1, 4),  # LayerScale; the mean over tokens in front of the last LayerNorm
        ("hugging face", 5, 9, 5, 2, 0),  # q, k and v of their own
        ("segmentation", 5, 5, 5, 2, 0),  # the reader at the end is a convolution
        ("eva02", 5, 5, 5, 2, 0),
    ],
)
def test_the_stream_of_a_plain_transformer_is_found_whole(
    name: str, norms: int, readers: int, writers: int, constants: int, scales: int
) -> None:
    network = moved_network(EXPORTS[name]())
    (stream,), _ = find_streams(network.model.graph, network.layers)
    found = (len(stream.norms), len(stream.readers), len(stream.writers), len(stream.constants))
    assert found == (norms, readers, writers, constants)
    assert sum(scale is not None for _, scale in stream.writers) == scales
    assert why_not_rotatable(network, stream) is None


def test_of_swin_the_last_stage_alone_can_turn() -> None:
    network = moved_network(EXPORTS["swin"]())
    (stream,), reasons = find_streams(network.model.graph, network.layers)
    assert stream.channels == 192
    assert {layer.role for layer, _ in stream.readers} == {"qkv", "fc1", "head"}
    assert any("takes the channels apart" in reason for reason in reasons)  # patch merging


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("levit", None),  # it has batch normalization, and no LayerNorm at all
        ("mobilevit", "takes the channels apart"),
        ("convnext", "looks at single channels"),  # depthwise convolutions
    ],
)
def test_streams_that_something_looks_into_are_refused(name: str, why: str | None) -> None:
    network = moved_network(EXPORTS[name]())
    streams, reasons = find_streams(network.model.graph, network.layers)
    assert streams == []
    assert (why is None and not reasons) or any(str(why) in reason for reason in reasons)


BLOCK = """
    s = MatMul(x, v)  n = LayerNormalization(s, g, b)  a = MatMul(n, w)  c = Add(a, e)  r = Relu(c)
    d = MatMul(r, u)  t = Add(s, d)  m = LayerNormalization(t, g, b)
"""
GENERATOR = np.random.default_rng(0)
WEIGHTS = {
    name: (GENERATOR.standard_normal(shape) / 3).astype(np.float32)
    for name, shape in {"v": (8, 8), "w": (8, 16), "e": (16,), "u": (16, 8), "h": (8, 8), "f": (8,), "g": (8,),
                        "b": (8,)}.items()
}  # fmt: skip


def small(end: str) -> Network:
    model = graph(f"{BLOCK} {end}", weights=WEIGHTS)
    for node in model.graph:
        node.name = node.outputs[0].name
    return network_of(canonicalize(model, max_opset=17))


def test_a_small_stream_turns() -> None:
    network = small("p = MatMul(m, h)  y = Add(p, f)")
    (stream,), reasons = find_streams(network.model.graph, network.layers)
    assert (len(stream.norms), len(stream.readers), len(stream.writers), reasons) == (2, 2, 2, [])


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("y = Identity(m)", "used as it is"),
        ("p = MatMul(m, h)  q = Add(p, f)  y = Add(q, t)", "seen from outside"),
        ("p = MatMul(m, h)  q = Add(p, f)  z = Relu(t)  y = Add(q, z)", "looks at single channels"),
        ("p = MatMul(m, h)  q = Add(p, f)  z = Mul(t, f)  y = Add(q, z)", "looks at single channels"),
        ("p = MatMul(m, h)  q = Add(p, f)  z = Softmax(m)  y = Add(q, z)", "looks at single channels"),
    ],
)
def test_a_stream_that_is_seen_keeps_its_basis(end: str, why: str) -> None:
    network = small(end)
    streams, reasons = find_streams(network.model.graph, network.layers)
    assert streams == []
    assert any(why in reason for reason in reasons), reasons


def test_a_reader_without_a_bias_cannot_take_an_offset() -> None:
    network = small("y = MatMul(m, h)")
    (stream,), _ = find_streams(network.model.graph, network.layers)
    assert "has no bias to take the offset" in str(why_not_rotatable(network, stream))


@pytest.mark.parametrize(
    ("name", "arrangement"),
    [
        *((name, "sorted") for name in EXPORTS if name not in ("levit", "mobilevit", "convnext")),
        ("vit", "interleaved"),
        ("cait", "interleaved"),
    ],
)
def test_outputs_stay_in_onnx_runtime(name: str, arrangement: str) -> None:
    network = moved_network(EXPORTS[name]())
    objective = make_objective("output", network.model, None, seed=0)
    feeds = network.dataset.feeds([0, 1, 2, 3])
    dense = run(network.model, feeds)
    notes = change_bases(network, objective, arrangement)
    assert notes[0].startswith("bases changed, outputs the same")
    # What CLIP normalizes last, layers without a bias read.
    assert ("residual stream" in notes[0]) == (name != "clip")
    assert any("would not have stayed the same" in note for note in notes) == (name == "eva02")
    plan = plan_of(network)
    assert plan.weights and plan.biases
    assert any(change > 0.05 for change in weight_changes(network, plan.weights))
    for expected, got in zip(dense, outputs_of_plan(network.model, plan, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-4 * np.abs(expected).max())


def weight_changes(network: Network, weights: dict[str, np.ndarray]) -> list[float]:
    """Return how far each weight is from the model's, as a part of its largest entry."""
    dense = {layer.name: layer.weight() for layer in network.layers}
    return [float(np.abs(weights[name] - dense[name]).max() / np.abs(dense[name]).max()) for name in weights]


def test_what_changes_outputs_is_taken_back() -> None:
    network = moved_network(EXPORTS["eva02"]())  # its q and k are turned by position, in pairs of channels
    notes = change_bases(network, make_objective("output", network.model, None, seed=0), "sorted")
    assert any("q and k of 2 attentions: the outputs would not have stayed the same" in note for note in notes), notes
    assert "v and proj of 2 attentions" in notes[0] and notes[0].endswith(", 1 residual stream")
    assert "q and k" not in notes[0]


def test_a_decomposition_that_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        network.set_dense_theta(layer.name, network.dense_theta(layer.name) * 2)
        raise torch.linalg.LinAlgError("did not converge")

    network = digits_network(8)
    layer = network.layers[0]
    monkeypatch.setattr("lsp_deploy.bases.change.concentrate_v", fail)
    before = network.dense_theta(layer.name)
    notes = change_bases(network, make_objective("top1", network.model), "interleaved")
    torch.testing.assert_close(network.dense_theta(layer.name).norm(), before.norm(), rtol=0.2, atol=0)
    assert any("v and proj" in note and "would not have stayed" in note for note in notes)


def test_a_shared_weight_is_never_touched() -> None:
    model = graph(
        """
        s = MatMul(x, v)  n = LayerNormalization(s, g, b)  a = MatMul(n, w)  r = Relu(a)  d = MatMul(r, u)
        t = Add(s, d)  m = LayerNormalization(t, g, b)  a2 = MatMul(m, w)  r2 = Relu(a2)  d2 = MatMul(r2, u)
        y = Add(t, d2)
        """,
        weights=WEIGHTS,
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    network = network_of(canonicalize(model, max_opset=17))
    assert len(network.not_writable) == 4
    assert all("shares its weight" in reason for reason in network.not_writable.values())
    change_bases(network, make_objective("output", network.model, None, seed=0), "sorted")
    assert plan_of(network).weights == {}
    assert network.changed_constants() == {}


def digits_profile(network: Network):
    attentions, mlps = find_attentions(network), find_mlps(network)
    profile = profile_activations(
        network,
        make_objective("top1", network.model, None, seed=0),
        inputs=[layer for one in attentions for layer, _ in (one.q, one.k, one.v)],
        channels=[mlp.second for mlp in mlps],
        norms=[],
    )
    return attentions, mlps, profile


def head_energies(network: Network, attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the energy of each channel's part in q kᵀ, and in v proj, [heads, channels], for rows x with ones."""
    theta, proj = network.dense_theta(attention.q[0].name), network.dense_theta(attention.proj.name)
    width = attention.proj.K // attention.heads
    q, k, v = ((x @ theta)[:, at].unflatten(1, (attention.heads, width)) for _, at in
               (attention.q, attention.k, attention.v))  # fmt: skip
    rows = proj[: attention.proj.K].unflatten(0, (attention.heads, width))
    return (
        q.square().sum(dim=0) * k.square().sum(dim=0),
        v.square().sum(dim=0) * rows.square().sum(dim=2),
    )


def test_heads_hold_their_energy_in_the_first_channels() -> None:
    network = digits_network()
    attentions, _, profile = digits_profile(network)
    assert len(attentions) == 4
    for attention in attentions:
        moment = profile.inputs[attention.q[0].name]
        values, vectors = torch.linalg.eigh(moment)
        x = (vectors * values.clamp_min(0).sqrt()).T  # rows of this second moment
        before = head_energies(network, attention, x)
        concentrate_qk(network, attention, profile.inputs)
        concentrate_v(network, attention, profile.inputs, "sorted")
        after = head_energies(network, attention, x)
        for old, new in zip(before, after, strict=True):
            half = old.shape[1] // 2
            share = [float((one[:, half:].sum(dim=1) / one.sum(dim=1)).mean()) for one in (old, new)]
            assert share[1] < 0.6 * share[0], share


def test_neurons_stand_in_the_order_of_what_losing_them_changes() -> None:
    network = digits_network()
    _, mlps, profile = digits_profile(network)
    assert len(mlps) == 4
    mlp = mlps[1]
    importance = profile.channels[mlp.second.name]
    before = network.dense_theta(mlp.first.name), network.dense_theta(mlp.second.name)
    order_neurons(network, mlp, importance, "sorted")
    order = arranged(importance, "sorted")
    assert torch.equal(network.dense_theta(mlp.first.name), before[0][:, order])
    assert torch.equal(network.dense_theta(mlp.second.name)[: mlp.second.K], before[1][order])
    assert torch.equal(network.dense_theta(mlp.second.name)[-1], before[1][-1])  # the bias


def test_channel_importance_is_the_first_order_change_of_losing_a_channel() -> None:
    network = digits_network(samples=3)
    objective = make_objective("top1", network.model, None, seed=0)
    layer = find_mlps(network)[0].second
    profile = profile_activations(network, objective, inputs=[], channels=[layer], norms=[])
    expected = torch.zeros(layer.K, dtype=torch.float64)
    for sample in range(3):
        kept = {}

        def hook(x: torch.Tensor, y: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            scale = torch.ones(layer.K, requires_grad=True)
            kept["scale"] = scale
            theta = network.dense_theta(layer.name).float()
            return (x * scale) @ theta[: layer.K] + (y - x @ theta[: layer.K]).detach()

        network.dense.hooks_by_node = {layer.name: hook}
        outputs = network.dense(tensor_feeds(network.dataset, np.array([sample]), "cpu"))
        objective(outputs, np.array([sample])).backward()
        expected += kept["scale"].grad.abs().double() / 3
    network.dense.hooks_by_node = {}
    torch.testing.assert_close(profile.channels[layer.name], expected, rtol=1e-3, atol=1e-6)


def test_zero_blocks_cost_less_in_the_new_bases() -> None:
    losses = []
    for change in (False, True):
        network = digits_network(samples=160)
        if change:
            change_bases(network, make_objective("top1", network.model, None, seed=0), "sorted")
        network.mask({
            layer.name: block_mask(np.abs(network.dense_theta(layer.name)[: layer.K].numpy()), (16, 16), 0.5)
            for layer in network.layers
            if layer.role in ("qkv", "proj", "fc1", "fc2")
        })  # fmt: skip
        feeds = tensor_feeds(network.dataset, np.arange(160), "cpu")
        with torch.no_grad():
            answers = [module(feeds)["logits"].log_softmax(1) for module in (network.pruned, network.dense)]
        losses.append(float(torch.nn.functional.kl_div(*answers, log_target=True, reduction="batchmean")))
    assert losses[1] < 0.7 * losses[0], losses


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
