"""Decisions: how much each layer is compressed, within budgets, and why."""
