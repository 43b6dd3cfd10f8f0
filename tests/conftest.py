"""Settings that hold for every test."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run: a change is judged by itself. New examples are searched for on purpose, with
# --hypothesis-profile=search (docs/contributing.md), and what they find becomes a test or a repair.
settings.register_profile("same", derandomize=True)
settings.register_profile("search")
settings.load_profile("same")
