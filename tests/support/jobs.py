"""Fits that both the tests and the pair of ranks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress.trainer.resume import ResumableCallback
from support.registry import REGISTRY
from support.small import BATCH, SmallModule, StatefulLoader, plain, quiet_trainer, shuffled


def fit(
    entry: str | None,
    *,
    folder: Path | None = None,
    stateful: bool = False,
    every_n_train_steps: int | None = None,
    resume: Path | None = None,
    module: LightningModule | None = None,
    callbacks: tuple[Callback, ...] = (),
    nothing: bool = False,
    bare: bool = False,
    batch: int = BATCH,
    **trainer_options: Any,
) -> dict[str, Any]:
    """Fit a small network with a registry entry; return everything that a resume must reproduce.

    `nothing`: with the setting that changes nothing; `bare`: the entry's network without its callbacks.
    """
    seed_everything(1, verbose=False)
    if resume is not None:
        torch.manual_seed(999)  # a resumed process starts from anywhere
    module = module or (SmallModule() if entry is None else SmallModule(**REGISTRY[entry].module))
    mine = []
    if entry is not None and not bare:
        known = REGISTRY[entry]
        mine = known.idle() if nothing else known.callbacks()
        module = known.idle_wrap(module) if nothing else known.wrap(module)
    if folder is not None:
        checkpoint = ModelCheckpoint(
            folder,
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=None if every_n_train_steps else 1,
        )
        trainer_options["enable_checkpointing"] = True
        callbacks = (*callbacks, checkpoint)
    trainer = quiet_trainer(callbacks=[*mine, *callbacks], **trainer_options)
    loader = StatefulLoader(batch) if stateful else shuffled(batch=batch)
    trainer.fit(module, loader, plain(batch=32), ckpt_path=resume, weights_only=True)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "techniques": [one.technique_state() for one in trainer.callbacks if isinstance(one, ResumableCallback)],
        "step": trainer.global_step,
        "random": torch.rand(3),
    }


def fit_on_ranks(entry: str, folder: str | None = None, resume: str | None = None, **options: Any) -> dict[str, Any]:
    return fit(
        entry,
        folder=None if folder is None else Path(folder),
        resume=None if resume is None else Path(resume),
        strategy="ddp",
        devices=2,
        **options,
    )
