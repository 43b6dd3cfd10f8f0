"""The CPU kernels of BlockSparseLinear, on every instruction set that this machine has, against NumPy in float64."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import native_kernels
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_kernels import FLOAT32, INT8, KernelError, Linear, ThreadPool, canonical_values, random_blocks

from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear
from lsp_deploy.plugins.block_sparse.reference import block_sparse_linear

ISAS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon_dot", "neon", "portable")
FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SETTINGS = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATE = {
    "none": lambda v: v,
    "gelu": lambda v: 0.5 * v * (1 + _erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> str:
    if request.param not in native_kernels.isas(kernels):
        pytest.skip("not on this CPU")
    return request.param


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """A layer's sizes, blocks and epilogue, and how many threads run it."""
    edge = st.sampled_from([1, 2, 5, 8, 16, 16, 24, 32, 32, 48, 64])
    return {
        "M": draw(st.sampled_from([1, 2, 5, 13, 14, 15, 29, 57, 197])),
        "K": draw(st.integers(1, 150)),
        "N": draw(st.integers(1, 150)),
        "block": (draw(edge), draw(edge)),
        "density": draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])),
        "activation": draw(st.sampled_from(sorted(ACTIVATE))),
        "residual": draw(st.booleans()),
        "threads": draw(st.sampled_from([0, 1, 2, 3])),
        "tell_threads": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def pool_of(problem: dict) -> ThreadPool | None:
    threads = problem["threads"]
    return ThreadPool(threads, tell=problem["tell_threads"], backwards=threads == 3) if threads else None


def quantized(x: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """As the operator is defined: in float32, with a reciprocal that is rounded first."""
    reciprocal = np.float32(1) / np.float32(scale)
    return np.clip(np.rint((x.astype(np.float32) - np.float32(offset)) * reciprocal), -128, 127)


@pytest.mark.parametrize("type_name", FLOATS)
@given(problem=problems())
@SETTINGS
def test_float_layers(kernels: ctypes.CDLL, isa: str, type_name: str, problem: dict) -> None:
    generator = np.random.default_rng(problem["seed"])
    M, K, N, block, activation = (problem[name] for name in ("M", "K", "N", "block", "activation"))
    mask, col_ptr, k_idx, elements = random_blocks(generator, K, N, block, problem["density"])
    weight = (generator.standard_normal((K, N)) * elements).astype(FLOATS[type_name])
    x = generator.standard_normal((M, K)).astype(np.float32)
    bias = generator.standard_normal(N).astype(np.float32)
    residual = generator.standard_normal((M, N)).astype(np.float32) if problem["residual"] else None
    linear = Linear(
        kernels, K=K, N=N, block=block, col_ptr=col_ptr, k_idx=k_idx, values=canonical_values(weight, mask, block),
        bias=bias, scale=np.ones(N, np.float32), activation=activation, isa=isa,
    )  # fmt: skip
    sums = x.astype(FLOATS[type_name]).astype(np.float64) @ weight.astype(np.float64) + bias
    expected = ACTIVATE[activation](sums) + (0 if residual is None else residual)
    result = linear(x, residual, pool_of(problem))
    assert np.abs(result - expected).max() <= TOLERANCE[type_name] * max(1.0, np.abs(sums).max())


@given(problem=problems(), x_int8=st.booleans(), y_int8=st.booleans())
@SETTINGS
def test_int8_layers(kernels: ctypes.CDLL, isa: str, problem: dict, x_int8: bool, y_int8: bool) -> None:
    generator = np.random.default_rng(problem["seed"])
    M, K, N, block, activation = (problem[name] for name in ("M", "K", "N", "block", "activation"))
    mask, col_ptr, k_idx, elements = random_blocks(generator, K, N, block, problem["density"])
    weight = (generator.integers(-128, 128, (K, N)) * elements).astype(np.int8)
    x_scale, x_offset = 0.0123, 0.0 if x_int8 else -0.4
    scale = (generator.random(N) * 1e-4 + 1e-5).astype(np.float32)
    bias = generator.standard_normal(N).astype(np.float32)
    residual = generator.standard_normal((M, N)).astype(np.float32) if problem["residual"] else None
    if x_int8:
        x = generator.integers(-128, 128, (M, K)).astype(np.int8)
        q = x.astype(np.float64)
    else:
        x = (generator.standard_normal((M, K)) * 0.7).astype(np.float32)
        q = quantized(x, x_scale, x_offset).astype(np.float64)
    sums = (q @ weight.astype(np.float64)) * scale + bias
    expected = ACTIVATE[activation](sums) + (0 if residual is None else residual)
    out_scale, out_offset = (float(np.abs(expected).max()) / 100 + 1e-3, 0.05) if y_int8 else (0.0, 0.0)
    linear = Linear(
        kernels, K=K, N=N, block=block, col_ptr=col_ptr, k_idx=k_idx, values=canonical_values(weight, mask, block),
        bias=bias, scale=scale, activation=activation, isa=isa, x_type=INT8 if x_int8 else FLOAT32, x_scale=x_scale,
        x_offset=x_offset, out_type=INT8 if y_int8 else FLOAT32, out_scale=out_scale, out_offset=out_offset,
    )  # fmt: skip
    result = linear(x, residual, pool_of(problem))
    slack = 1e-5 * max(1.0, np.abs(sums).max())
    if y_int8:
        # What lies in the middle of two steps may fall on either side.
        exact = np.clip((expected - out_offset) / out_scale, -128, 127)
        assert np.abs(result - exact).max() <= 0.5 + slack / out_scale
    else:
        assert np.abs(result - expected).max() <= slack


@given(K=st.integers(1, 300), N=st.integers(1, 80), M=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@SETTINGS
def test_int8_sums_are_exact(kernels: ctypes.CDLL, isa: str, K: int, N: int, M: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    mask, col_ptr, k_idx, elements = random_blocks(generator, K, N, (16, 16), 0.7)
    extreme = np.array([-128, -127, 127], np.int8)
    weight = generator.choice(extreme, (K, N)) * elements.astype(np.int8)
    x = generator.choice(extreme, (M, K))
    linear = Linear(
        kernels, K=K, N=N, block=(16, 16), col_ptr=col_ptr, k_idx=k_idx,
        values=canonical_values(weight, mask, (16, 16)), bias=np.zeros(N, np.float32), scale=np.ones(N, np.float32),
        x_type=INT8, x_scale=1.0, isa=isa,
    )  # fmt: skip
    np.testing.assert_array_equal(linear(x), (x.astype(np.int64) @ weight.astype(np.int64)).astype(np.float32))


def test_float_x_is_quantized_to_the_letter(kernels: ctypes.CDLL, isa: str) -> None:
    """With an identity matrix the sums are the quantized x, ties, limits and NaN included."""
    K, scale, offset = 64, 0.1, 0.35
    x = np.concatenate([np.arange(-150, 150) * 0.05, [1e30, -1e30, np.inf, -np.inf, np.nan], np.zeros(15)])
    x = x.astype(np.float32).reshape(-1, K)
    linear = Linear(
        kernels, K=K, N=K, block=(K, K), col_ptr=np.array([0, 1]), k_idx=np.array([0]), values=np.eye(K, dtype=np.int8),
        bias=np.zeros(K, np.float32), scale=np.ones(K, np.float32), x_scale=scale, x_offset=offset, isa=isa,
    )  # fmt: skip
    np.testing.assert_array_equal(linear(x), np.nan_to_num(quantized(x, scale, offset), nan=-128))


def test_float_x_is_rounded_to_bfloat16_to_the_letter(kernels: ctypes.CDLL, isa: str) -> None:
    """To the nearest, even in the middle. Each row has one x that is not 0, for a NaN spreads over its row."""
    steps = np.arange(1.0, 1.0 + 2**-5, 2**-9)  # every other one is in the middle between two
    values = np.concatenate([steps, -steps, [1e30, np.inf, -np.inf, np.nan, 3.3895e38]]).astype(np.float32)
    x = np.zeros((len(values), 16), np.float32)
    x[:, 3] = values
    weight = np.zeros((16, 16), ml_dtypes.bfloat16)
    weight[3, 5] = 1
    linear = Linear(
        kernels, K=16, N=16, block=(16, 16), col_ptr=np.array([0, 1]), k_idx=np.array([0]), values=weight,
        bias=np.zeros(16, np.float32), scale=np.ones(16, np.float32), isa=isa,
    )  # fmt: skip
    np.testing.assert_array_equal(linear(x)[:, 5], values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_over_their_whole_range(kernels: ctypes.CDLL, isa: str, activation: str) -> None:
    """Also what is far below zero, where the result is small: to 1e-5 of itself down to 1e-6, then to 1e-11."""
    x = np.concatenate([np.linspace(-12, 12, 4000), [-1e4, -100, 100, 1e4, 3e38, -3e38], np.zeros(26)])
    x = x.astype(np.float32).reshape(-1, 16)
    linear = Linear(
        kernels, K=16, N=16, block=(16, 16), col_ptr=np.array([0, 1]), k_idx=np.array([0]),
        values=np.eye(16, dtype=np.float32), bias=np.zeros(16, np.float32), scale=np.ones(16, np.float32),
        activation=activation, isa=isa,
    )  # fmt: skip
    with np.errstate(over="ignore"):
        expected = ACTIVATE[activation](x.astype(np.float64))
    np.testing.assert_allclose(linear(x), expected, rtol=5e-6, atol=1e-11)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu"])
def test_what_is_no_number_stays_none(kernels: ctypes.CDLL, isa: str, activation: str) -> None:
    x = np.zeros((2, 40), np.float32)
    x[1, 3] = np.nan
    y = a_layer(kernels, activation=activation, isa=isa)(x)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1, :16]).all()


@pytest.mark.parametrize("type_name", [*FLOATS, "int8"])
def test_large_layers_are_divided_over_threads(kernels: ctypes.CDLL, type_name: str) -> None:
    """Several parts, row groups and panel groups, with ragged edges: the same result as on one thread, bit for bit."""
    generator = np.random.default_rng(7)
    M, K, N, block = 1000, 2100, 1000, (32, 32)
    mask, col_ptr, k_idx, _ = random_blocks(generator, K, N, block, 0.1)
    weight = generator.integers(-127, 128, (K, N)).astype({**FLOATS, "int8": np.int8}[type_name])
    x = generator.standard_normal((M, K)).astype(np.float32)
    residual = generator.standard_normal((M, N)).astype(np.float32)
    linear = Linear(
        kernels, K=K, N=N, block=block, col_ptr=col_ptr, k_idx=k_idx, values=canonical_values(weight, mask, block),
        bias=np.zeros(N, np.float32), scale=np.ones(N, np.float32), x_scale=0.03 if type_name == "int8" else 0.0,
    )  # fmt: skip
    alone = linear(x, residual)
    for threads in (2, 3):
        pool = ThreadPool(threads, backwards=threads == 3)
        np.testing.assert_array_equal(linear(x, residual, pool), alone)
        assert pool.tasks > 2 * threads


def test_no_rows(kernels: ctypes.CDLL) -> None:
    assert a_layer(kernels)(np.empty((0, 40), np.float32)).shape == (0, 30)


def a_layer(kernels: ctypes.CDLL, **changes: object) -> Linear:
    """A layer of 40 x 30 in blocks of 16 x 16, of which three survive."""
    description = {
        "K": 40, "N": 30, "block": (16, 16), "col_ptr": np.array([0, 2, 3]), "k_idx": np.array([0, 2, 1]),
        "values": np.ones((3, 16, 16), np.float32), "bias": np.zeros(30, np.float32), "scale": np.ones(30, np.float32),
    }  # fmt: skip
    return Linear(kernels, **{**description, **changes})


# As much as a file of 3 MB can ask for.
HUGE_GRID = {
    "K": 2**24, "N": 2**18, "block": (1, 2**18), "col_ptr": np.zeros(2, np.int64), "k_idx": np.zeros(0, np.int64),
    "values": np.zeros((1, 1, 2**18), np.float32),
}  # fmt: skip
INT8_VALUES = {"values": np.ones((3, 16, 16), np.int8)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"K": 0}, "K is 0, not within 1 to"),
        ({"N": -3}, "N is -3"),
        ({"block": (0, 16)}, "block_k is 0"),
        ({"block": (16, 2**40)}, "block_n is 1099511627776"),
        (HUGE_GRID, "is too large for one layer"),
        ({"K": 32}, "k_idx[1] is 2, not within 0 to 1"),
        ({"N": 33}, "col_ptr has 3 entries, not 4"),
        ({"col_ptr": np.array([0, 3])}, "col_ptr has 2 entries, not 3"),
        ({"col_ptr": np.array([1, 2, 3])}, "col_ptr starts with 1"),
        ({"col_ptr": np.array([0, 4, 3])}, "col_ptr[2] is less than the one before"),
        ({"col_ptr": np.array([0, 2, 4])}, "k_idx has 3 entries, but col_ptr ends with 4"),
        ({"k_idx": np.array([0, 3, 1])}, "k_idx[1] is 3, not within 0 to 2"),
        ({"k_idx": np.array([0, -1, 1])}, "k_idx[1] is -1"),
        ({"k_idx": np.array([2, 2, 1])}, "k_idx[1] does not ascend"),
        ({"values": np.ones((2, 16, 16), np.float32)}, "values has 512 elements, not 3 blocks of 16 x 16"),
        ({"x_type": INT8}, "x is int8, but values are not"),
        ({"x_type": 7}, "x has element type 7"),
        ({"out_type": 10}, "out_type is 10"),
        ({"values_type": 10}, "values have element type 10"),
        ({"x_scale": 0.5}, "only int8 has a scale"),
        ({**INT8_VALUES}, "x_scale is 0, but int8 needs a scale"),
        ({**INT8_VALUES, "x_scale": -1.0}, "x_scale is -1"),
        ({**INT8_VALUES, "x_scale": math.nan}, "x_scale is nan"),
        ({**INT8_VALUES, "x_scale": 1e-45}, "too small"),
        ({**INT8_VALUES, "x_scale": 1.0, "x_offset": math.inf}, "x_offset is inf"),
        ({**INT8_VALUES, "x_scale": 1.0, "K": 131072, "block": (131072, 16)}, "int8 sums fit 32 bits up to 131071"),
        ({"out_type": INT8}, "out_scale is 0"),
        ({"out_offset": 0.5}, "only int8 has an offset"),
        ({"isa": "mmx"}, "isa=mmx is not a known instruction set"),
    ],
)
def test_what_is_refused(kernels: ctypes.CDLL, changes: dict, reason: str) -> None:
    a_layer(kernels)
    with pytest.raises(KernelError) as refused:
        a_layer(kernels, **changes)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_block_survives(kernels: ctypes.CDLL, isa: str) -> None:
    bias = np.arange(30, dtype=np.float32)
    linear = a_layer(
        kernels, col_ptr=np.array([0, 0, 0]), k_idx=np.empty(0), values=np.zeros((1, 16, 16), np.float32), bias=bias,
        isa=isa,
    )  # fmt: skip
    np.testing.assert_array_equal(linear(np.ones((3, 40), np.float32)), np.tile(bias, (3, 1)))


def test_narrow_blocks_get_narrow_panels(kernels: ctypes.CDLL) -> None:
    """AVX-512 has panels of two widths: 32 columns are faster, but would join blocks of 16."""
    if "avx512" not in native_kernels.isas(kernels):
        pytest.skip("not on this CPU")
    generator = np.random.default_rng(0)
    names = []
    for edge in (32, 16):
        mask, col_ptr, k_idx, _ = random_blocks(generator, 512, 512, (edge, edge), 0.5)
        values = canonical_values(np.ones((512, 512), np.float32), mask, (edge, edge))
        zeros = np.zeros(512, np.float32)
        block = (edge, edge)
        layer = Linear(
            kernels, K=512, N=512, block=block, col_ptr=col_ptr, k_idx=k_idx, values=values, bias=zeros, scale=zeros
        )
        names.append(layer.kernel)
    assert [name.split("x")[-1] for name in names] == ["32", "16"]


def test_the_environment_caps_the_instruction_set(native_library: Path, kernels: ctypes.CDLL) -> None:
    def kernel_or_reason(value: str) -> str:
        code = (
            "import sys, ctypes; sys.path[:0] = sys.argv[1:3]; import native_kernels, importlib\n"
            "test = importlib.import_module('test_linear_kernels')\n"
            "try: print(test.a_layer(native_kernels.load(sys.argv[3])).kernel)\n"
            "except native_kernels.KernelError as refused: print(refused)\n"
        )
        here = Path(__file__).parent
        return subprocess.run(
            [sys.executable, "-c", code, str(here.parent), str(here), str(native_library)],
            env={**os.environ, "LSP_ISA": value}, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    usable = native_kernels.isas(kernels)
    assert kernel_or_reason("portable").startswith("portable ")
    assert kernel_or_reason("") == a_layer(kernels).kernel
    assert kernel_or_reason("sse9") == f"LSP_ISA=sse9 is not a known instruction set; usable here: {' '.join(usable)}"
    missing = next(name for name in ISAS if name not in usable)
    assert kernel_or_reason(missing) == f"LSP_ISA={missing}: this CPU cannot run it, only: {' '.join(usable)}"


@pytest.mark.parametrize("type_name", [*FLOATS, "int8"])
def test_agrees_with_the_reference(kernels: ctypes.CDLL, isa: str, type_name: str) -> None:
    """The operator's own definition in NumPy, which ONNX Runtime's and TensorRT's operators are compared with."""
    generator = np.random.default_rng(3)
    M, K, N, block = 21, 96, 80, (32, 16)
    mask, col_ptr, k_idx, _ = random_blocks(generator, K, N, block, 0.5)
    weight = (generator.standard_normal((K, N)) * 40).astype({**FLOATS, "int8": np.int8}[type_name])
    x = generator.standard_normal((M, K)).astype(np.float32)
    residual = generator.standard_normal((M, N)).astype(np.float32)
    bias = generator.standard_normal(N).astype(np.float32)
    values, scale = canonical_values(weight, mask, block), np.full(N, 1e-3 if type_name == "int8" else 1, np.float32)
    x_scale, x_offset = (0.03, 0.2) if type_name == "int8" else (0.0, 0.0)
    operator = BlockSparseLinear(
        K=K, N=N, block_k=block[0], block_n=block[1], col_ptr=tuple(map(int, col_ptr)), k_idx=tuple(map(int, k_idx)),
        activation="gelu", x_scale=x_scale, x_offset=x_offset,
    )  # fmt: skip
    linear = Linear(
        kernels, K=K, N=N, block=block, col_ptr=col_ptr, k_idx=k_idx, values=values, bias=bias, scale=scale,
        activation="gelu", x_scale=x_scale, x_offset=x_offset, isa=isa,
    )  # fmt: skip
    expected = block_sparse_linear(operator, x, values, bias, scale, residual)
    assert np.abs(linear(x, residual) - expected).max() <= 1e-5 * np.abs(expected).max()
