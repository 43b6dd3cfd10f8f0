"""The CPU kernels of Attention, on every instruction set that this machine has, against the reference."""

from __future__ import annotations

import ctypes
from typing import Any

import native_kernels
import numpy as np
import pytest
from attention_kernels import AttentionKernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_kernels import KernelError, ThreadPool

from lsp_deploy.plugins.attention.operator import Attention
from lsp_deploy.plugins.attention.reference import attention

# A kernel of its own, or that of the next one in the list.
ISAS = ("avx512_bf16", "avx512", "avx2", "neon", "portable")
# bfloat16 differs where a probability lies so near the middle of two numbers that float32 rounds to the other one.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> str:
    if request.param not in native_kernels.isas(kernels):
        pytest.skip("not on this CPU")
    return request.param


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, and what is added to the scores."""
    heads = draw(st.integers(1, 4))
    repeats = draw(st.sampled_from([1, 1, 2, 3]))
    return {
        "B": repeats * draw(st.integers(1, 2)),
        "S": draw(st.sampled_from([1, 2, 3, 5, 6, 7, 16, 33, 49, 55, 100])),
        "T": draw(st.sampled_from([1, 2, 7, 15, 16, 17, 31, 48, 49, 63, 65, 130])),
        "heads": heads,
        "size": draw(st.sampled_from([1, 3, 8, 16, 17, 32, 33, 48, 64, 80, 100, 128])),
        "bias": (repeats, draw(st.sampled_from([1, heads]))) if draw(st.booleans()) else None,
        "masked": draw(st.booleans()),
        "threads": draw(st.sampled_from([0, 1, 3])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, compute: str) -> None:
    # Outputs are means of values of about 1, which may cancel: what is left is then as uncertain as they are.
    scale = max(np.abs(expected).max(), 1.0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[compute] * scale)


@pytest.mark.parametrize("compute", TOLERANCE)
@given(problem=problems())
@SETTINGS
def test_three_projections(kernels: ctypes.CDLL, isa: str, compute: str, problem: dict[str, Any]) -> None:
    random = np.random.default_rng(problem["seed"])
    B, S, T, heads, size = (problem[name] for name in ("B", "S", "T", "heads", "size"))
    # Wider than needed: rows do not follow each other.
    q, k, v = (random.standard_normal((B, rows, heads * size + 5)).astype(np.float32) for rows in (S, T, T))
    q, k, v = (x[..., 2 : 2 + heads * size] for x in (q, k, v))
    bias = None
    if problem["bias"] is not None:
        bias = random.standard_normal((*problem["bias"], S, T)).astype(np.float32)
        if problem["masked"]:
            bias[random.random(bias.shape) < 0.4] = -np.inf
            bias[..., T // 2] = 0  # no row is masked throughout
    pool = ThreadPool(problem["threads"], backwards=True) if problem["threads"] else None
    scale = 1.5 * size**-0.5
    actual = AttentionKernel(kernels, heads, size, scale=scale, compute=compute, isa=isa).run(
        q, k, v, bias=bias, pool=pool
    )
    assert_close(actual, attention(Attention(heads, scale, False, compute), q, k, v, bias=bias), compute)


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "size", "tokens"), [(3, 64, 197), (6, 32, 49), (2, 64, 577), (1, 128, 197), (1, 8, 1500)]
)
def test_fused_projection(kernels: ctypes.CDLL, isa: str, compute: str, heads: int, size: int, tokens: int) -> None:
    qkv = np.random.default_rng(0).standard_normal((2, tokens, 3 * heads * size)).astype(np.float32)
    kernel = AttentionKernel(kernels, heads, size, scale=size**-0.5, compute=compute, isa=isa)
    actual = kernel.run(qkv, pool=ThreadPool(2))
    assert_close(actual, attention(Attention(heads, size**-0.5, True, compute), qkv), compute)
    assert np.array_equal(actual, kernel.run(qkv)), "the number of threads changes nothing"


def test_threads_that_keep_packed_keys_see_every_run(kernels: ctypes.CDLL) -> None:
    random, pool = np.random.default_rng(0), ThreadPool(2)
    kernel = AttentionKernel(kernels, 2, 16)
    for tokens in (70, 70, 300, 5, 70):
        qkv = random.standard_normal((1, tokens, 96)).astype(np.float32)
        assert_close(kernel.run(qkv, pool=pool), attention(Attention(2, 0.125, True), qkv), "float32")


@pytest.mark.parametrize("compute", TOLERANCE)
def test_large_scores(kernels: ctypes.CDLL, isa: str, compute: str) -> None:
    """One key gets all the weight, scores as low as -1e6 none; nothing overflows."""
    qkv = np.random.default_rng(0).standard_normal((1, 40, 3 * 16)).astype(np.float32)
    actual = AttentionKernel(kernels, 1, 16, scale=1e5, compute=compute, isa=isa).run(qkv)
    scores = np.einsum("sd,td->st", qkv[0, :, :16].astype(np.float64), qkv[0, :, 16:32])
    best = scores.argmax(-1)
    np.testing.assert_allclose(actual[0], qkv[0, best, 32:], rtol=1e-5 if compute == "float32" else 1e-2)


@pytest.mark.parametrize("compute", TOLERANCE)
def test_nothing_to_attend_to_gives_nan_in_that_row_alone(kernels: ctypes.CDLL, isa: str, compute: str) -> None:
    qkv = np.random.default_rng(0).standard_normal((1, 20, 3 * 16)).astype(np.float32)
    bias = np.zeros((1, 1, 20, 20), np.float32)
    bias[..., 7, :] = -np.inf
    actual = AttentionKernel(kernels, 1, 16, compute=compute, isa=isa).run(qkv, bias=bias)
    expected = attention(Attention(1, 0.125, True, compute), qkv, bias=bias)
    assert np.array_equal(np.isnan(actual), np.isnan(expected)) and np.isnan(actual[0, 7]).all()
    assert_close(np.nan_to_num(actual), np.nan_to_num(expected), compute)


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("operand", range(3))
def test_what_is_no_number_stays_none(kernels: ctypes.CDLL, isa: str, compute: str, operand: int) -> None:
    parts = [np.ones((1, 20, 16), np.float32) for _ in range(3)]
    parts[operand][0, 3, 5] = np.nan
    actual = AttentionKernel(kernels, 1, 16, compute=compute, isa=isa).run(*parts)
    expected = attention(Attention(1, 0.125, False, compute), *parts)
    assert np.isnan(expected).any()
    assert np.array_equal(np.isnan(actual), np.isnan(expected))


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5)])
def test_without_queries_there_is_nothing_to_do(kernels: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    B, S, T = shape
    q, k, v = (np.ones((B, rows, 8), np.float32) for rows in (S, T, T))
    assert AttentionKernel(kernels, 1, 8).run(q, k, v).size == 0


def test_without_keys_it_says_so(kernels: ctypes.CDLL) -> None:
    q, k, v = (np.ones((1, rows, 8), np.float32) for rows in (3, 0, 0))
    with pytest.raises(KernelError, match="there are no keys to attend to"):
        AttentionKernel(kernels, 1, 8).run(q, k, v)


@pytest.mark.parametrize(
    ("heads", "size", "options", "reason"),
    [
        (0, 8, {}, "heads is 0, not a positive number"),
        (1, 0, {}, "head size 0 is not within 1 to 128"),
        (1, 129, {}, "head size 129 is not within 1 to 128"),
        (1, 8, {"scale": np.inf}, "scale is not finite"),
        (1, 8, {"compute": 10}, "compute type 10 is neither float32 nor bfloat16"),
        (1, 8, {"isa": "sse9"}, "isa=sse9 is not a known instruction set"),
    ],
)
def test_descriptions_that_are_refused(
    kernels: ctypes.CDLL, heads: int, size: int, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(KernelError, match=reason):
        AttentionKernel(kernels, heads, size, **options)


def test_a_bias_of_other_heads_is_refused(kernels: ctypes.CDLL) -> None:
    with pytest.raises(KernelError, match="a bias of 1 batches and 2 heads is none for 3 heads"):
        AttentionKernel(kernels, 3, 8).run(np.ones((1, 4, 72), np.float32), bias=np.ones((1, 2, 4, 4), np.float32))


def test_names_say_what_runs(kernels: ctypes.CDLL) -> None:
    assert AttentionKernel(kernels, 1, 8, isa="portable").name == "portable float32"
    rounded = AttentionKernel(kernels, 1, 8, isa="portable", compute="bfloat16").name
    assert rounded == "portable float32, rounded to bfloat16"
