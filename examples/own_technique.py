"""A technique of your own: weights that never leave an interval, in forty lines.

`CompressionCallback` knows when: it resumes, agrees between ranks, follows averages and projects after every optimizer
step. The technique says what: which parameters, what becomes of them, and what other techniques must know of it.

    python examples/own_technique.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.core.projection import Projection
from lightning_compress.core.select import select_parameters
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import Effects


class ClippedWeightsCallback(CompressionCallback):
    """Keeps every weight w at min(max(w, -limit), limit) while the network trains."""

    def __init__(
        self, limit: float = 0.1, *, target: str | Sequence[str] | None = None, exclude: str | Sequence[str] = ()
    ) -> None:
        super().__init__(limit=limit, target=target, exclude=exclude)
        self.limit = limit
        self.target = target
        self.exclude = exclude

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        return Effects(values=dict.fromkeys(self.weights(pl_module), "bounds"))

    def weights(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        return dict(select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude))

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self.projection = Projection(self.weights(pl_module), self.clip, keep_latent=False)
        self.projection.rewrite()

    def clip(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.clamp_(-self.limit, self.limit)

    def technique_state(self) -> dict[str, Any]:
        return {}  # the weights are all there is

    def project_copy(self, module: nn.Module) -> None:
        names = {} if self.projection is None else self.projection.parameters
        self.clip({name: one.data for name, one in module.named_parameters() if name in names})


def main() -> None:
    from lightning_compress.baselines import Classifier, Digits, DigitsConvNet

    torch.manual_seed(0)
    module = Classifier(DigitsConvNet(), lr=3e-3, input_shape=(1, 8, 8))
    trainer = Trainer(max_epochs=4, accelerator="cpu", logger=False, callbacks=[ClippedWeightsCallback(0.1)])
    trainer.fit(module, datamodule=Digits())
    accuracy = trainer.test(module, datamodule=Digits(), verbose=False)[0]["test_acc"]
    largest = max(float(one.abs().max()) for name, one in module.named_parameters() if one.dim() > 1)
    print(f"test accuracy {accuracy:.4f} with weights of at most {largest:.3g}")


if __name__ == "__main__":
    main()
