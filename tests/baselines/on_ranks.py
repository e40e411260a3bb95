"""What the pair of ranks runs for this folder's tests."""

from __future__ import annotations

from typing import Any

import torch
from support.small import quiet_trainer
from torch import Tensor, nn

from lightning_compress.baselines import Classifier, TensorLoader


def samples(n: int, **kwargs: Any) -> TensorLoader:
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    return TensorLoader(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), batch_size=8, **kwargs)


def fit_and_test(network: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, float]], int]:
    module = Classifier(network)
    trainer = quiet_trainer(max_epochs=3, strategy="ddp", devices=2)
    trainer.fit(module, samples(51, shuffle=True), samples(51))
    steps = trainer.global_step
    measured = [dict(row) for row in trainer.test(module, samples(51), verbose=False)]
    return {name: value.clone() for name, value in module.state_dict().items()}, measured, steps
