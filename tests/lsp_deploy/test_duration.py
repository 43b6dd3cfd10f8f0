"""How long reconstruction is said to take: more work takes longer, and 2:4 longer than blocks."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

from networks import digits_network

from lsp_deploy.search.duration import in_words


def test_more_work_takes_longer() -> None:
    network = digits_network()
    network.pass_seconds = 1.0
    names = [layer.name for layer in network.layers if layer.role in ("qkv", "fc1", "fc2", "proj")]
    fewer = network.reconstruction_seconds(names[:2])
    assert 0.7 < fewer < 60
    network.pass_seconds = 100.0
    assert network.reconstruction_seconds(names) > 70


@pytest.mark.parametrize(("seconds", "words"), [(31.4, "31 s"), (99, "99 s"), (240, "4 min")])
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
