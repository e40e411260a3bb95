"""What techniques hold beside a fit's weights, gradients and optimizer state: live bytes, counted by operators."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.memory import LiveBytes
from torch import nn

from lightning_compress import GroupLassoCallback, IterativePruningCallback
from lightning_compress.baselines import Classifier, TensorLoader
from lightning_compress.channels.find import channel_groups
from lightning_compress.pruning.masked import MaskedParameters

WIDTH, DEPTH = 128, 12


@pytest.fixture(autouse=True, scope="module")
def earlier_tests_are_no_garbage() -> Iterator[None]:
    """What earlier tests hold is not looked through again before each test here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_collected() -> Iterator[None]:
    """What circles of references hold counts as held: when they are collected is chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def linear_net() -> nn.Sequential:
    """Every other hidden channel is so small that a group lasso takes it to zero at once."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, 10))
    with torch.no_grad():
        for parameter in net[:-1].parameters():
            parameter[::2] *= 1e-3
    return net


def bytes_per_weight(callbacks: list[Callback]) -> float:
    """Fit with momentum, and return the peak above the weights, which were there before, per weight."""
    torch.manual_seed(0)
    net = linear_net()
    module = Classifier(net, input_shape=(WIDTH,), optimizer="sgd")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = TensorLoader(torch.randn(8, WIDTH), torch.randint(10, (8,)), batch_size=4)
    count = sum(one.numel() for one in net.parameters())  # of before a cut
    with LiveBytes() as counted:
        trainer.fit(module, loader)
    return counted.most / count


def pruning(**options: Any) -> Callable[[], Callback]:
    return lambda: IterativePruningCallback(0.6, start_epoch=1.0, end_epoch=2.0, every_n_steps=1, **options)


TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "magnitude": pruning(),
    "l2": pruning(criterion="l2"),
    "regrow": pruning(regrow=True),
    "taylor": pruning(criterion="taylor"),
    "obd": pruning(criterion="obd"),
    "fisher": pruning(criterion="fisher"),
    "ewc": pruning(criterion="ewc"),
    "mas": pruning(criterion="mas"),
    "si": pruning(criterion="si"),
    "random": pruning(criterion="random"),
    "neurons": pruning(granularity="neuron"),
    "neurons, taylor": pruning(granularity="neuron", criterion="taylor"),
    "neurons, si": pruning(granularity="neuron", criterion="si"),
    "neurons, during_fit": pruning(granularity="neuron", shrink="during_fit"),
    "group lasso, proximal": lambda: GroupLassoCallback(1e-3, proximal=True),
    "group lasso, cut": lambda: GroupLassoCallback(0.5, granularity="group", proximal=True, shrink="on_fit_end"),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_holds_at_most_two_and_a_half_times_what_the_bare_fit_holds(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr("lightning_compress.core.masking._LARGE", 0)  # as layers of a million weights are masked
    bare = bytes_per_weight([])
    assert 7.5 < bare < 9.5  # gradients and momentum; the weights are not counted
    mine = bytes_per_weight([TECHNIQUES[name]()])
    assert 4 + mine <= 2.5 * (4 + bare)


def test_what_planning_tries_out_is_free_when_it_ends() -> None:
    net = linear_net()
    with LiveBytes() as counted:
        channel_groups(net, torch.zeros(2, WIDTH))
    count = sum(one.numel() for one in net.parameters())
    assert counted.most > 8 * count  # a copy in double precision
    assert counted.alive < count


def test_the_mask_of_a_large_layer_is_held_once() -> None:
    net = nn.Linear(1024, 1024, bias=False)
    net.weight.grad = torch.ones(1024, 1024)
    keep = torch.arange(2**20).view(1024, 1024) % 3 == 0
    with LiveBytes() as counted:
        masked = MaskedParameters(net)
        masked.set({"weight": keep})
        assert counted.alive == 0
        masked.mask_gradients()
    assert counted.most <= 1.1 * keep.numel()  # one byte each, for as long as they are masked
    assert torch.equal(net.weight.grad, keep.float())
