"""Settings that hold for every test."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run: a change is judged by itself. New examples are searched for on purpose, with
# --hypothesis-profile=search (docs/contributing.md), and what they find becomes a test or a repair.
# None is timed: another machine may be slow, or busy.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")
