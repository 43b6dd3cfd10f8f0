"""Several processes, started by torchrun, that share the samples of one analysis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lsp_deploy.errors import UserError

__all__ = ["Team", "join_processes"]


@dataclass(frozen=True)
class Team:
    """One process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine: which GPU is its own."""
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, samples: int, batch_size: int, rank: int | None = None) -> range:
        """Return the samples of a process (this one if None), cut between batches so that none differs."""
        rank = self.rank if rank is None else rank
        batches = -(-samples // batch_size)
        first, last = (batches * index // self.size * batch_size for index in (rank, rank + 1))
        return range(min(first, samples), min(last, samples))

    def agree(self, value: bool) -> bool:
        """Return what the first process says."""
        if self.size == 1:
            return value
        message = torch.tensor([int(value)])
        dist.broadcast(message, 0)
        return bool(message.item())

    def send(self, array: NDArray[Any]) -> None:
        """Send an array to the first process, which takes it with `receive`."""
        dist.send(torch.from_numpy(np.array(array)), 0)

    def receive(self, shape: tuple[int, ...], dtype: type[np.generic], rank: int) -> NDArray[Any]:
        """Take an array from a process."""
        array = np.empty(shape, dtype)
        dist.recv(torch.from_numpy(array), rank)
        return array


@contextmanager
def join_processes() -> Iterator[Team]:
    """Join the processes that torchrun started, for as long as the block lasts; one alone otherwise.

    What is exchanged lies in the memory of the host, so it goes through gloo on GPUs too.

    Raises:
        UserError: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are not as torchrun sets them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    try:
        dist.init_process_group("gloo")
        numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes do not find each other ({error}); start them with torchrun --no-python lsp-deploy"
        ) from error
    try:
        yield Team(*numbers)
    finally:
        dist.destroy_process_group()
