"""Which meter there is for what an engine runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lsp_deploy.engines.power.ina3221 import open_ina3221
from lsp_deploy.engines.power.meter import PowerMeter
from lsp_deploy.engines.power.nvml import open_nvml
from lsp_deploy.engines.power.rapl import open_rapl
from lsp_deploy.engines.power.recording import PowerRecorder
from lsp_deploy.errors import UserError

__all__ = ["Device", "find_meter", "power_recorder"]

Device = Literal["cpu", "gpu"]
_ROOT = Path("/")


@contextmanager
def power_recorder(device: Device, wanted: bool | None = None, root: Path = _ROOT) -> Iterator[PowerRecorder]:
    """Open the meter of `device` for as long as the context lasts.

    Args:
        device: what the engines run on.
        wanted: True: there must be a meter; None: where there is one; False: none.
        root: where sys, etc and var lie.

    Raises:
        UserError: a meter is wanted and there is none.
    """
    if wanted is False:
        yield PowerRecorder(None, "not measured: --no-power")
        return
    meter, reason = find_meter(device, root)
    if meter is None:
        if wanted:
            raise UserError(f"--power: {reason}; leave it out to measure without power")
        yield PowerRecorder(None, f"not measured: {reason}")
        return
    try:
        yield PowerRecorder(meter)
    finally:
        meter.close()


def find_meter(device: Device, root: Path = _ROOT) -> tuple[PowerMeter | None, str]:
    """Return the open meter of `device`, or None and why there is none; close it after use.

    On a Jetson it is the module's rails, whatever the engine runs on; else NVML for a GPU and RAPL for a CPU.
    """
    if any(root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon")):
        return open_ina3221(root)
    return open_nvml() if device == "gpu" else open_rapl(root / "sys")
