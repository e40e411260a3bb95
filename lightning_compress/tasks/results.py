"""What the stages of a run hand on to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.report import Epoch, Measurement


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The first stage's result: dense networks, trained and tested.

    Attributes:
        modules: The networks; the first is compared with what comes of the compression.
        metric: What the first one's test logs; None where nothing is tested.
        history: The epochs of its training; none where it was loaded.
        epochs: How many epochs all of them have trained in this run.
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
        trainer: That has fitted it.
        metric: What its test logs; None where nothing is tested.
        before_recovery: The test's metric of the network when the last technique with a ramp had come to its end.
        history: The epochs, those of the dense network before.
    """

    module: LightningModule
    trainer: Trainer
    metric: float | None
    before_recovery: float | None
    history: Sequence[Epoch]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The third stage's result: what both networks cost, timed in turns.

    Attributes:
        dense: The dense network's numbers.
        compressed: The compressed one's, with the bytes of its file.
        busy: Whether the machine was busy, so that the times mean little.
    """

    dense: Measurement
    compressed: Measurement
    busy: bool
