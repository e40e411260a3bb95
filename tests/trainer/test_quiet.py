"""A module's own validation, run for what its network gets and returns: what is needed is said before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from support.small import CLASSES, FEATURES, SmallModule, plain

from lightning_compress import EarlyExitHeads, SkippableBlocks, SlimmableWidth

X = torch.zeros(2, FEATURES)


class WithoutValidation(SmallModule):
    validation_step = None  # type: ignore[assignment]


class WithoutLoader(LightningDataModule):
    def train_dataloader(self) -> Any:
        return plain(0)


def rates(module: SmallModule, loader: Any) -> None:
    SkippableBlocks(module, example_inputs=X).measure(loader)


def thresholds(module: SmallModule, loader: Any) -> None:
    EarlyExitHeads(module, 1, num_classes=CLASSES, example_inputs=X).calibrate(loader, accuracy_drop=0.1)


def statistics(module: SmallModule, loader: Any) -> None:
    SlimmableWidth(module, (0.5, 1.0), example_inputs=X).recalibrate(loader)


@pytest.mark.parametrize("use", [rates, thresholds, statistics])
def test_a_validation_that_cannot_run_is_refused_by_name(use: Callable[[SmallModule, Any], None]) -> None:
    with pytest.raises(ValueError, match="WithoutValidation has no validation_step, which runs here over the loader"):
        use(WithoutValidation(residual=True), plain(1))
    with pytest.raises(ValueError, match="WithoutLoader has no val_dataloader: pass a loader"):
        use(SmallModule(residual=True), WithoutLoader())
    with pytest.raises(ValueError, match="The loader is None: pass a loader"):
        use(SmallModule(residual=True), None)
