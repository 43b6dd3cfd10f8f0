"""lsp::BlockSparseLinear in a model that is to be built: TensorRT takes it from a plugin."""

from __future__ import annotations

from typing import Any

from lsp_deploy.engines.tensorrt_common.configuration import NotInThisVersionError

__all__ = ["provide_operators"]

_WITHOUT_GPU = "tensorrt_rtx"
_REMARK = (
    "lsp::BlockSparseLinear is in the engine by its description only: to run it, name liblsp_block_sparse.so with "
    "--plugin (docs/tensorrt-plugin.md)"
)


def provide_operators(trt: Any) -> tuple[Any, list[str]]:
    """Make a plugin for the operator known where no library has brought one.

    Args:
        trt: the module, tensorrt or tensorrt_rtx; libraries of plugins are loaded.

    Returns:
        What must live while the engine is built, and what the user should know.

    Raises:
        NotInThisVersionError: the builder needs the library, since it runs what it builds.
    """
    from lsp_deploy.plugins.block_sparse.operator import OP_TYPE
    from lsp_deploy.plugins.tensorrt.python_plugin import is_known, register

    if is_known(trt):
        return None, []
    if trt.__name__ != _WITHOUT_GPU:
        raise NotInThisVersionError(
            f"the model holds lsp::{OP_TYPE}, and no plugin for it is loaded: build liblsp_block_sparse.so "
            "(docs/tensorrt-plugin.md) and name it with --plugin"
        )
    return register(trt), [_REMARK]
