"""ONNX models in and out through onnx_ir: checked, functions inlined, every node named."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnx_ir.passes.common import InlinePass

from lsp_deploy.errors import UserError
from lsp_deploy.files import atomic_path, write_bytes
from lsp_deploy.graph.model_checks import check_external_data, check_structure, check_weights

__all__ = [
    "MAX_OPSET",
    "MIN_OPSET",
    "input_shapes",
    "load_model",
    "model_bytes",
    "resolve_shapes",
    "save_model",
    "with_batch",
]

MIN_OPSET, MAX_OPSET = 13, 23

# Files of recent onnx releases claim an IR version that runtimes refuse; that of opset 23 is enough for all we take.
_MAX_IR_VERSION = 11

# A protobuf message holds less than 2 GiB; the graph itself needs some of it.
EXTERNAL_THRESHOLD = 1_900_000_000

# onnx_ir warns on stderr about undefined values and the like; `load_model` raises for them.
logging.getLogger("onnx_ir").setLevel(logging.ERROR)


def load_model(path: Path) -> ir.Model:
    """Load an ONNX file, checked and with functions inlined.

    External weights stay memory-mapped. Every node gets a unique, non-empty name, derived from its operator and
    position where the file has none.

    Raises:
        UserError: missing, empty, truncated or not ONNX; opset outside 13 to 23; weights with NaN or infinity;
            external data that is missing, too short or outside the model's folder.
    """
    model = _parse(path)
    _check_opset(model, path)
    check_structure(model, path)
    check_external_data(model, path)
    _inline(model, path)
    check_weights(model, path)
    model.ir_version = min(model.ir_version, _MAX_IR_VERSION)
    _name_nodes(model)
    return model


def save_model(model: ir.Model, path: Path, *, external_threshold: int = EXTERNAL_THRESHOLD) -> None:
    """Write `model` to `path` atomically.

    Weights of more than `external_threshold` bytes in all go to `<name>.data` beside it; that file is written first.
    The model in memory stays as it is.

    Raises:
        UserError: the folder cannot be written to, or the model reads its weights from the file to be written.
    """
    tensors = [tensor for tensor in _initializers(model) if tensor is not None]
    if sum(tensor.nbytes for tensor in tensors) <= external_threshold:
        write_bytes(path, model_bytes(model))
        return
    data = path.with_name(f"{path.name}.data")
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor) and data.exists() and data.samefile(tensor.path):
            raise UserError(f"cannot write {data}: the model's own weights are read from it; choose another -o folder")
    with atomic_path(path) as temporary:
        # Small tensors stay inside: shape inference must see shapes and axes.
        ir.save(model, temporary, format="protobuf", external_data=data.name, size_threshold_bytes=1024)


def model_bytes(model: ir.Model) -> bytes:
    """Serialize `model` to one ONNX message, external weights included; the same model gives the same bytes.

    Raises:
        UserError: the weights do not fit in one message (2 GB); `save_model` splits them off.
    """
    size = sum(tensor.nbytes for tensor in _initializers(model) if tensor is not None)
    if size > EXTERNAL_THRESHOLD:
        raise UserError(f"a model with {size / 1e9:.1f} GB of weights does not fit in one ONNX message (2 GB)")
    with _weights_in_memory(model):
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def input_shapes(model: ir.Model) -> dict[str, tuple[int | str, ...]]:
    """Return the shape of each graph input that is not an initializer; a str is a symbolic dimension ("?" unnamed).

    Raises:
        UserError: an input is not a tensor or declares no shape.
    """
    shapes: dict[str, tuple[int | str, ...]] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.shape is None or not isinstance(value.type, ir.TensorType):
            raise UserError(f"input {value.name} declares no tensor shape; export the model with one")
        shapes[str(value.name)] = tuple(_dimension(dimension) for dimension in value.shape)
    return shapes


def resolve_shapes(
    model: ir.Model, given: Mapping[str, Sequence[int]] | None, *, batch: int, flag: str = "--shapes"
) -> dict[str, tuple[int, ...]]:
    """Return concrete shapes of all inputs.

    What is `given` wins; a dimension of the same symbolic name in another input takes the same size; a dynamic first
    dimension becomes `batch`. `flag` is what the user gives shapes with.

    Raises:
        UserError: a given shape that does not fit, or any other dynamic dimension that is not given.
    """
    declared = input_shapes(model)
    given = given or {}
    symbols: dict[str, int] = {}
    for name, sizes in given.items():
        if name not in declared:
            raise UserError(f"the model has no input {name}; its inputs are {', '.join(declared)}")
        symbols.update(_match(name, declared[name], sizes))
    return {
        name: tuple(given[name]) if name in given else _sizes(name, shape, symbols, batch, flag)
        for name, shape in declared.items()
    }


def with_batch(model: ir.Model, shapes: Mapping[str, Sequence[int]], batch: int) -> dict[str, tuple[int, ...]]:
    """Return `shapes`, by input name, with another batch where the model leaves the first dimension open."""
    declared = input_shapes(model)
    return {
        name: (batch, *shape[1:]) if isinstance(next(iter(declared.get(name, ())), None), str) else tuple(shape)
        for name, shape in shapes.items()
    }


def _parse(path: Path) -> ir.Model:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the .onnx file in it")
    if not path.exists():
        raise UserError(f"no such file: {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; export the model again")
    if path.stat().st_size >= 1 << 31:
        raise UserError(f"{path} is larger than 2 GB, which no ONNX file can be; export it with external data")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX model, or is cut off: its content cannot be parsed") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise UserError(f"{path} is not an ONNX model, or is cut off: it holds no graph or no opset")
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        raise UserError(f"{path} is not a valid ONNX model: {_first_cause(error)}") from error
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    return model


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _check_opset(model: ir.Model, path: Path) -> None:
    opset = model.opset_imports.get("")
    if opset is None:
        raise UserError(f"{path} names no opset of standard operators; export it with opset {MIN_OPSET} to {MAX_OPSET}")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UserError(f"{path} has opset {opset}; export it with one from {MIN_OPSET} to {MAX_OPSET}")


def _inline(model: ir.Model, path: Path) -> None:
    try:
        InlinePass()(model)
    except (ir.passes.PassError, ir.passes.PreconditionError, ValueError) as error:
        raise UserError(f"{path} has functions that cannot be inlined: {error.__cause__ or error}") from error
    try:
        model.graph.sort()
    except ValueError as error:
        raise UserError(f"{path} is not a valid ONNX model: its graph contains a cycle") from error


def _name_nodes(model: ir.Model) -> None:
    nodes = list(model.graph.all_nodes())
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for position, node in enumerate(nodes):
        name = node.name or f"{node.op_type}_{position}"
        while name in seen or (name in taken and name != node.name):
            name = f"{name}_{position}"
        node.name = name
        seen.add(name)


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol | None]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            yield value.const_value


@contextmanager
def _weights_in_memory(model: ir.Model) -> Iterator[None]:
    """Show external weights as arrays (still memory-mapped) while the model is serialized."""
    external: list[tuple[ir.Value, ir.ExternalTensor]] = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    try:
        for value, tensor in external:
            value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, shape=tensor.shape, name=tensor.name)
        yield
    finally:
        for value, tensor in external:
            value.const_value = tensor


def _dimension(dimension: int | ir.SymbolicDim) -> int | str:
    if isinstance(dimension, int):
        return dimension if dimension > 0 else "?"
    return dimension.value or "?"


def _match(name: str, declared: Sequence[int | str], sizes: Sequence[int]) -> dict[str, int]:
    """Return the sizes that `sizes` gives to symbolic dimensions."""
    shown = "x".join(str(dimension) for dimension in declared)
    typed = "x".join(str(size) for size in sizes)
    fits = len(sizes) == len(declared) and all(
        size > 0 and dimension in (size, *([dimension] if isinstance(dimension, str) else []))
        for size, dimension in zip(sizes, declared, strict=True)
    )
    if not fits:
        raise UserError(f"shape {typed} does not fit input {name}, which is {shown}")
    return {
        dimension: size
        for dimension, size in zip(declared, sizes, strict=True)
        if isinstance(dimension, str) and dimension != "?"
    }


def _sizes(name: str, shape: Sequence[int | str], symbols: Mapping[str, int], batch: int, flag: str) -> tuple[int, ...]:
    sizes = []
    for axis, dimension in enumerate(shape):
        size = dimension if isinstance(dimension, int) else symbols.get(dimension, batch if axis == 0 else None)
        if size is None:
            example = "x".join(str(other if isinstance(other, int) else symbols.get(other, "?")) for other in shape)
            raise UserError(
                f"input {name} has a dynamic dimension {axis} ({dimension}); give its shape: {flag} {name}:{example}, "
                "with a number for each ?"
            )
        sizes.append(size)
    return tuple(sizes)
