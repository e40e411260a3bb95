"""AutoSlim in a run: find a width for every group of channels of a slimmable network, and make it that narrow."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.core.example_inputs import to_device
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.slimmable.objective import Widths
from lightning_compress.slimmable.search import search_widths
from lightning_compress.trainer.inputs import inputs_of, resolve_network
from lightning_compress.trainer.labels import targets_of
from lightning_compress.trainer.one_step import backbone
from lightning_compress.trainer.unwrap import innermost, objective_of, without_trainer

_BATCHES = 20  # of the validation data, at most, and of the training data for the statistics of norms: a quarter


def check_search(module: LightningModule, settings: Mapping[str, Any] | None) -> None:
    """Refuse a search in a network that does not run at several widths, or that lacks what it needs.

    Raises:
        ValueError: It does not, or there is no `budget` or no `epochs`.
    """
    if settings is None:
        return
    if not isinstance(settings.get("epochs"), int) or "budget" not in settings:
        raise ValueError(
            f"search={dict(settings)} needs a budget, such as 0.5 of the MACs, and epochs, for how many the network of "
            f"the widths that are found trains on; 0 for none."
        )
    if not isinstance(module, SlimmableWidth):
        raise ValueError(
            f"search={dict(settings)} needs a network that was trained at many widths, and {type(module).__name__} was "
            f"not: leave search out, or add compress=slimmable with wrappers.slimmable.universal=true."
        )


def narrowed(
    wrapped: SlimmableWidth, datamodule: LightningDataModule, *, record: Path, **settings: Any
) -> LightningModule:
    """Return a copy of the module inside, whose network has the widths that a search finds, and is not wrapped.

    Args:
        wrapped: A trained module.
        datamodule: Its validation data compare the candidates; from training data come the statistics of norms.
        record: The file of the search's decisions; a search that finds it goes on from there.
        settings: Of `search_widths`: budget, unit, step, least, norms, repeats.
    """
    objective = objective_of(wrapped, Widths)
    wrapped.set_width(1.0)
    network = backbone(resolve_network(wrapped, objective.network))
    datamodule.setup("fit")
    move = partial(to_device, device=wrapped.device)
    validation: Any = datamodule.val_dataloader()
    training: Any = datamodule.train_dataloader()
    batches = [(move(inputs_of(one, network, move)), targets_of(one)) for one in islice(validation, _BATCHES)]
    calibration = [move(inputs_of(one, network, move)) for one in islice(training, _BATCHES // 4)]
    found = search_widths(
        network,
        batches,
        calibration=calibration,
        output=objective.output,
        allow_inexact=objective.allow_inexact,
        record=record,
        **settings,
    )
    widths = found.widths(settings["budget"])
    shown = ", ".join(f"{name} {width:.2f}" for name, width in widths.items())
    rank_zero_info(f"Widths by group: {shown}.")
    wrapped.recalibrate(training, widths=[widths])
    thin = wrapped.extract(widths)
    if not objective.network:
        assert isinstance(thin, LightningModule)
        return thin
    with without_trainer(wrapped):
        module = copy.deepcopy(innermost(wrapped))
    module.set_submodule(objective.network, thin)
    return module


class SavesEveryEpoch(Callback):
    """Overwrites one checkpoint at the end of every epoch, without the warnings of Lightning's for a used folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
