"""Other ways to compress, in one table with the run's own: from the same start and seed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf
from support.small import quiet_trainer

from lightning_compress import IterativePruningCallback, ScratchCallback
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.hydra import varied
from lightning_compress.tasks.run import Run, Variant


def test_a_variant_with_the_same_settings_is_the_same_network_and_scratch_reads_the_runs_own_file(
    tmp_path: Path,
) -> None:
    seed_everything(0)
    module = Classifier(DigitsConvNet(width=4), lr=3e-3, input_shape=(1, 8, 8))
    make_trainer = partial(quiet_trainer, max_epochs=2, limit_train_batches=10)
    settings: dict[str, Any] = {"amount": 0.7, "every_n_steps": 3}
    scratch = ScratchCallback(tmp_path / "compressed.ckpt")
    variants = {
        "again": Variant(callbacks=[IterativePruningCallback(**settings)]),
        "random": Variant(callbacks=[IterativePruningCallback(**settings, criterion="random")]),
        "scratch": Variant(callbacks=[scratch], trainer={"max_epochs": 3}),
    }
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, repeats=2)
    report = job.run(
        [module], callbacks=[IterativePruningCallback(**settings)], dense={"max_epochs": 1}, variants=variants
    )
    assert report is not None
    points = {point.name: point for point in report.points}
    assert list(points) == ["dense", "compressed", "again", "random", "scratch"]
    assert points["again"].test_metric == points["compressed"].test_metric == report.compressed.test_metric
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(mask, saved[name] != 0) for name, mask in scratch.masks.items() if mask.dim() > 1)


def test_a_variant_of_a_config_differs_in_what_it_says() -> None:
    needed = {"val_metric": "a", "measure": {}, "file": {"coder": "ans"}, "compare": {"root": "."}, "seed": 0}
    base = needed | {"output_dir": "o", "callbacks": {"one": {"amount": 1}, "two": {"b": 2}}, "trainer": {}}
    cfg = OmegaConf.create(base | {"variants": {"v": {"callbacks": {"one": {"amount": 3}, "two": None}}}})
    own = varied(cfg)["v"]
    assert own.callbacks == {"one": {"amount": 3}, "two": None}
    assert cfg.callbacks.one.amount == 1
    with pytest.raises(ValueError, match=r"variants\.v\.seed: a variant may differ in callbacks, wrappers and trainer"):
        varied(OmegaConf.create(base | {"variants": {"v": {"seed": 3}}}))
