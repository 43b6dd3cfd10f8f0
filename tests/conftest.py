"""Settings that hold for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# None is timed: another machine may be slow, or busy.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# The same examples on every run: a change is judged by itself. New examples are searched for on purpose, with
# --hypothesis-profile=search (docs/contributing.md), and what they find becomes a test or a repair.
settings.register_profile("same", untimed, derandomize=True)
settings.register_profile("search", untimed)
settings.load_profile("same")
