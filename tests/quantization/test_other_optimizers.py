"""Optimizers that step none of the weights of few values, beside one that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from support.small import ManualModule, quiet_trainer, shuffled
from torch import Tensor

from lightning_compress import BinaryWeightsCallback, QuantizationAwareTrainingCallback, WeightClusteringCallback

TECHNIQUES: dict[str, Callable[..., Callback]] = {
    "clusters": lambda **options: WeightClusteringCallback(4, **options),
    "clusters of all": lambda **options: WeightClusteringCallback(4, scope="global", **options),
    "grid": lambda **options: QuantizationAwareTrainingCallback(3, 4, **options),
    "signs": lambda **options: BinaryWeightsCallback(**options),
    "samples": lambda **options: BinaryWeightsCallback("stochastic", **options),
    "xnor": lambda **options: BinaryWeightsCallback(scaling="mean", **options),
}
MOST = {"clusters": 4, "clusters of all": 4, "grid": 7 * 16, "signs": 2, "samples": 2, "xnor": 2 * 16}


class Several(ManualModule):
    """Steps by hand: the hidden weights by one optimizer, everything else by others."""

    def __init__(self, how: str) -> None:
        super().__init__(activation=F.hardtanh)
        self.how = how

    def configure_optimizers(self) -> Any:
        hidden = [self.net.hidden.weight]
        others = [one for one in self.parameters() if one is not self.net.hidden.weight]
        if self.how == "muon":
            return [torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]
        biases = [one for one in others if one.dim() == 1]
        weights = [one for one in others if one.dim() > 1]
        return [torch.optim.SGD(biases, lr=0.05), torch.optim.SGD(hidden, lr=0.05), torch.optim.AdamW(weights, lr=1e-2)]


@pytest.mark.parametrize("how", ["muon", "biases"] if hasattr(torch.optim, "Muon") else ["biases"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_optimizers_beside_the_one_of_the_few_values(technique: str, how: str) -> None:
    torch.manual_seed(0)
    module = Several(how)
    seen: list[tuple[Tensor, Tensor]] = []

    class Record(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append((module.net.hidden.weight.detach().clone(), module.net.head.weight.detach().clone()))

    callback = TECHNIQUES[technique](target="net.hidden")
    quiet_trainer(callbacks=[callback, Record()], max_epochs=2).fit(module, shuffled())
    for hidden, _ in seen:
        assert len(hidden.unique()) <= MOST[technique]
    assert len(seen[-1][1].unique()) == seen[-1][1].numel()
    assert not torch.equal(seen[0][1], seen[-1][1])
    assert not torch.equal(seen[0][0], seen[-1][0])  # both train on
