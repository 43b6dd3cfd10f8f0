"""The errors that end a command on purpose, and the exit code each stands for.

Anything else that reaches the top is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

__all__ = ["CheckFailedError", "UserError"]


class UserError(Exception):
    """Usage or input that cannot be worked with: one line saying what, where and what to do (exit code 2)."""


class CheckFailedError(Exception):
    """The work was done, but a check or budget was not met, or a builder failed (exit code 1)."""
