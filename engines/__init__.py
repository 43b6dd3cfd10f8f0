"""Engines: everything that runs a model, and the measurements taken on it."""
