"""What the pair of ranks runs for this folder's tests."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import seed_everything
from support.small import quiet_trainer
from torch import Tensor, nn

from lightning_compress.baselines import NNMF, Classifier, MatrixFactorization, Ratings, RidgeBiases, TensorLoader


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


def fit_ratings() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    seed_everything(0, verbose=False)
    network = NNMF(30, 20, width=3, products=4, hidden=(5, 6))
    module, biases = MatrixFactorization(network, lr=0.001, regularization=1.0), RidgeBiases(30, 20)
    data = Ratings(users=30, items=20, count=300, val_share=0.037)
    for one in (module, biases):
        quiet_trainer(max_epochs=6, strategy="ddp", devices=2).fit(one, data)
    return (
        {name: value.clone() for name, value in module.state_dict().items()},
        {name: value.clone() for name, value in biases.state_dict().items()},
    )
