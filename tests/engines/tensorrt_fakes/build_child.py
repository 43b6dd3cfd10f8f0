"""The real build child with the fake TensorRT: what the tests start in its place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.argv[1:] = sys.argv[-1:]
runpy.run_module("lsp_deploy.engines.tensorrt_common.build_child", run_name="__main__")
