"""Blocks are timed one by one, on what they read in the network."""

from __future__ import annotations

import torch

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.stages.block_times import time_blocks


def test_all_candidates_are_timed() -> None:
    network, x = ResNet20(width=4), torch.randn(3, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    times = time_blocks(network, x, repeats=2)
    assert set(times.seconds) == {block.name for block in times.found.candidates}
    assert min(*times.seconds.values(), times.network) > 0.0
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
