"""The network and the shapes that it is built for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsp_deploy.engines.protocol import BuildOptions

__all__ = ["add_profile", "network_flags", "shape_refusal"]


def network_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network: each tensor has the element type that the model gives it.

    The flag is bit 1 in TensorRT 10 and bit 0 in 11, where another flag is gone and typing is always strong.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def shape_refusal(network: Any, options: BuildOptions) -> str | None:
    """Say why the given shapes do not fit the network's inputs, or None where they do."""
    shapes = _input_shapes(network)
    for name in (*options.min_shapes, *options.opt_shapes, *options.max_shapes):
        if name not in shapes:
            return f"shapes are given for {name}, but the inputs are {', '.join(shapes)}"
    for name, shape in shapes.items():
        bounds = _bounds(options, name)
        if bounds is None:
            if -1 in shape:
                return f"input {name} is dynamic, {_text(shape)}, and has no shapes to build for"
            continue
        for bound in bounds:
            if len(bound) != len(shape) or any(d not in (-1, size) for d, size in zip(shape, bound, strict=True)):
                return f"input {name} is {_text(shape)}, which {_text(bound)} does not fit"
        if not all(low <= opt <= high for low, opt, high in zip(*bounds, strict=True)):
            low, opt, high = (_text(bound) for bound in bounds)
            return f"input {name}: min {low}, opt {opt} and max {high} are not in ascending order"
    return None


def add_profile(builder: Any, network: Any, config: Any, options: BuildOptions) -> None:
    """Give `config` one optimization profile with the bounds of every dynamic input; none where all are fixed."""
    shapes = _input_shapes(network)
    if not any(-1 in shape for shape in shapes.values()):
        return
    profile = builder.create_optimization_profile()
    for name in shapes:
        bounds = _bounds(options, name)
        if bounds is not None:
            profile.set_shape(name, *bounds)
    config.add_optimization_profile(profile)


def _input_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {value.name: tuple(value.shape) for value in (network.get_input(i) for i in range(network.num_inputs))}


def _bounds(options: BuildOptions, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    opt = options.opt_shapes.get(name)
    if opt is None:
        return None
    return options.min_shapes.get(name, opt), opt, options.max_shapes.get(name, opt)


def _text(shape: Sequence[int]) -> str:
    return "x".join("?" if size == -1 else str(size) for size in shape)
