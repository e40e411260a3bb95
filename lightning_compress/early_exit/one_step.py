"""One step of a module with exits: the real step, in which the network runs, and the replays with the exits' logits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor

from lightning_compress.early_exit.gradients import scale_gradient
from lightning_compress.early_exit.heads import ExitHeads, reading
from lightning_compress.trainer.one_step import OneStep, computing
from lightning_compress.trainer.replay import returning, with_output

Gradient = Literal["full", "equilibrium", "stop"]


class ExitsStep(OneStep):
    """A batch on its way through a module with exits, whose replays do not run the network.

    Args:
        args, kwargs: Of `OneStep`.
        heads: Of the network.
        gradient: What exits do to the network before them.
    """

    def __init__(self, *args: Any, heads: ExitHeads, gradient: Gradient, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads, self.gradient = heads, gradient
        self.layers = dict(zip(self.replicas, heads.by_layer().items(), strict=True))
        self.features: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}

    def watched(self) -> AbstractContextManager[None]:
        return reading(computing(self.network), self.heads.layers, self._read)

    def _read(self, layer: str, features: Tensor) -> Tensor | None:
        """Keep the features for the exit's head; return what the network goes on with, if that is another tensor."""
        if self.gradient == "stop":
            self.features[layer] = features.detach()
        elif self.gradient == "equilibrium" and features.requires_grad:
            left = len(self.heads) + 1 - self.heads.layers.index(layer)  # classifiers from here on
            self.features[layer] = scale_gradient(features, 1.0 / left)
            return scale_gradient(features, (left - 1.0) / left)
        else:
            self.features[layer] = features
        return None

    def logits_of(self, label: str) -> Tensor:
        if label not in self._logits:
            layer, head = self.layers[label]
            if layer not in self.features:
                raise ValueError(f"The exit layer {layer!r} did not run in the network's forward pass.")
            self._logits[label] = head(self.features[layer])
        return self._logits[label]

    def answer(self, label: str) -> AbstractContextManager[None]:
        return returning(self.network, with_output(self.output, self.picks, self.logits_of(label), "The network"))
