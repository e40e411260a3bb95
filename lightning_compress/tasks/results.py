"""The results that each stage of a run passes to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.report import Epoch, Measurement


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The first stage's result: dense networks, trained and tested.

    Attributes:
        modules: The networks. The report compares the first one with the compressed network.
        metric: The test's metric of the first network; None where nothing is tested.
        history: The epochs of the first network's training; empty where its weights were loaded.
        epochs: Number of epochs that all networks together have trained in this run.
    """

    modules: Sequence[LightningModule]
    metric: float | None
    history: Sequence[Epoch] = ()
    epochs: int = 0


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The second stage's result: the network after compression and recovery.

    Attributes:
        module: The network.
        trainer: The Trainer of its fit.
        metric: The test's metric of the network; None where nothing is tested.
        before_recovery: The test's metric of the network when the last technique with a ramp had come to its end.
        history: All epochs, first those of the dense network.
    """

    module: LightningModule
    trainer: Trainer
    metric: float | None
    before_recovery: float | None
    history: Sequence[Epoch]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The third stage's result: the costs of both networks, which were timed in turns.

    Attributes:
        dense: The measurement of the dense network.
        compressed: The measurement of the compressed network, with the size of its file.
        busy: Whether other processes kept the machine so busy that the latencies are unreliable.
    """

    dense: Measurement
    compressed: Measurement
    busy: bool
