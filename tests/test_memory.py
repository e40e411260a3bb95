"""What techniques hold beside a fit's weights, gradients and optimizer state: live bytes, counted by operators."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress import GroupLassoCallback, IterativePruningCallback
from lightning_compress.baselines import Classifier, TensorLoader

WIDTH, DEPTH = 128, 12


class Peak(TorchDispatchMode):
    """The most bytes alive at once of what operators have made; tensors of torch.export's tracing hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if _is_real(one)}
        result = func(*args, **(kwargs or {}))
        for one in filter(_is_real, tree_leaves(result)):
            storage = one.untyped_storage()
            if storage._cdata not in before | self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def free(self, key: int, size: int) -> None:
        if key in self.known:
            self.known.discard(key)
            self.alive -= size


def _is_real(one: Any) -> bool:
    return type(one) in (Tensor, nn.Parameter) and one.untyped_storage().device.type == "cpu"


def bytes_per_weight(callbacks: list[Callback]) -> float:
    """Fit with momentum, and return the peak above the weights, which were there before, per weight."""
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, 10))
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
    with Peak() as peak:
        trainer.fit(module, loader)
    return peak.most / count


def pruning(**options: Any) -> Callable[[], Callback]:
    return lambda: IterativePruningCallback(0.6, start_epoch=1.0, end_epoch=2.0, every_n_steps=1, **options)


TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "magnitude": pruning(),
    "l2": pruning(criterion="l2"),
    "regrow": pruning(regrow=True),
    "taylor": pruning(criterion="taylor"),
    "obd": pruning(criterion="obd"),
    "fisher": pruning(criterion="fisher"),
    "mas": pruning(criterion="mas"),
    "neurons": pruning(granularity="neuron"),
    "neurons, during_fit": pruning(granularity="neuron", shrink="during_fit"),
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
