"""In which order channels should stand, for the pattern of zeros that is to come."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Arrangement", "arranged"]

Arrangement = Literal["sorted", "interleaved"]
"""sorted: the most important first, so that blocks of unimportant ones can go; interleaved: in every four, two of the
more important half and two of the other, so that 2:4 can drop those."""


def arranged(importance: torch.Tensor, arrangement: Arrangement) -> torch.Tensor:
    """Return channel indices in the order in which they should stand; of equal importance the lower comes first.

    Args:
        importance: [channels].
        arrangement: what the order is for. Channels that make no four stay at the end when interleaved.
    """
    order = torch.argsort(importance, descending=True, stable=True)
    if arrangement == "sorted":
        return order
    fours = len(order) // 4
    top, bottom = order[: 2 * fours].reshape(fours, 2), order[len(order) - 2 * fours :].flip(0).reshape(fours, 2)
    rest = order[2 * fours : len(order) - 2 * fours]
    return torch.cat([torch.cat([top, bottom], dim=1).flatten(), rest])
