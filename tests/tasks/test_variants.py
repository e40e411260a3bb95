"""Other ways to compress, in one table with the run's own: from the same start and seed."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from support.small import quiet_trainer

from lightning_compress import IterativePruningCallback, LotteryTicketCallback, ScratchCallback
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.hydra import register_resolvers, varied
from lightning_compress.report import Report, points_table, report_markdown
from lightning_compress.report.tables import variants_rows
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
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, repeats=2, called="the_run")
    report = job.run(
        [module], callbacks=[IterativePruningCallback(**settings)], dense={"max_epochs": 1}, variants=variants
    )
    assert report is not None
    points = {point.name: point for point in report.points}
    assert list(points) == ["dense", "compressed", "again", "random", "scratch"]
    assert points["again"].test_metric == points["compressed"].test_metric == report.compressed.test_metric
    saved = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(mask, saved[name] != 0) for name, mask in scratch.masks.items() if mask.dim() > 1)

    assert [points[name].epochs for name in points] == [1, 2, 2, 2, 3]
    assert points["compressed"].nonzero_parameters == report.compressed.nonzero_parameters
    assert points["again"].nonzero_parameters == report.compressed.nonzero_parameters
    rows = {row[0]: row for row in variants_rows(report)}
    assert list(rows) == ["dense", "the run", "again", "random", "scratch"], "the words of a name stand apart"
    assert rows["the run"][1:] == rows["again"][1:-1] + rows["the run"][-1:]
    assert not points_table(report).row_count, "there is one way only to run the network"
    assert "| the run |" in report_markdown(report)
    assert Report.load(tmp_path / "report.json") == report


def test_a_ticket_and_its_controls_have_one_mask_and_other_values(tmp_path: Path) -> None:
    seed_everything(0)
    module, student = (Classifier(DigitsConvNet(width=4), lr=3e-3, input_shape=(1, 8, 8)) for _ in range(2))
    student.load_state_dict(module.state_dict())
    settings: dict[str, Any] = {"rate": None, "amount": 0.8, "rounds": 2, "rewind": "init"}
    controls: dict[str, dict[str, Any]] = {
        "ticket": {},
        "reinit": {"restart": "reinit"},
        "reshuffle_random_signs": {"restart": "reshuffle", "signs": "random"},
        "constant": {"restart": "constant"},
        "random_mask": {"criterion": "random"},
    }
    job = Run(
        datamodule=Digits(), make_trainer=partial(quiet_trainer, max_epochs=3, limit_train_batches=10), folder=tmp_path
    )
    dense = job.make_dense([module], training={"max_epochs": 1})
    weights = {}
    for name, one in controls.items():
        callback = LotteryTicketCallback(**settings | one)
        compressed = job.compress(dense, student=copy.deepcopy(student), callbacks=[callback])
        weights[name] = {key: value for key, value in compressed.module.state_dict().items() if value.dim() > 1}
    ticket = weights.pop("ticket")
    for name, other in weights.items():
        same = all(torch.equal(ticket[key] != 0, value != 0) for key, value in other.items())
        assert same == (name != "random_mask"), name
        assert not any(torch.equal(ticket[key], value) for key, value in other.items()), name


def test_a_resumed_run_says_that_variants_begin_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed_everything(0)
    module = Classifier(DigitsConvNet(width=4), lr=3e-3, input_shape=(1, 8, 8))
    make_trainer = partial(quiet_trainer, max_epochs=1, limit_train_batches=2, enable_checkpointing=True)
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, repeats=1)
    saving = ModelCheckpoint(tmp_path, filename="last")
    job.run([copy.deepcopy(module)], callbacks=[saving], dense={"max_epochs": 1})
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        report = job.run(
            [module],
            callbacks=[ModelCheckpoint(tmp_path, filename="last")],
            dense={"max_epochs": 1},
            variants={"same": Variant()},
            ckpt_path=tmp_path / "last.ckpt",
        )
    assert report is not None
    assert "Variants have no checkpoints: same begin anew." in caplog.text


def test_a_variant_of_a_config_differs_in_what_it_says() -> None:
    needed = {"val_metric": "a", "measure": {}, "file": {"coder": "ans"}, "compare": {"root": "."}, "seed": 0}
    callbacks = {"one": {"_target_": "One", "amount": 1}, "two": {"_target_": "Two", "b": 2}}
    base = needed | {"output_dir": "o", "callbacks": callbacks, "trainer": {}}
    cfg = OmegaConf.create(base | {"variants": {"v": {"callbacks": {"one": {"amount": 3}, "two": None}}}})
    own = varied(cfg)["v"]
    assert own.callbacks == {"one": {"_target_": "One", "amount": 3}, "two": None}
    assert cfg.callbacks.one.amount == 1
    with pytest.raises(ValueError, match=r"variants\.v\.seed: a variant may differ in callbacks, wrappers and trainer"):
        varied(OmegaConf.create(base | {"variants": {"v": {"seed": 3}}}))
    with pytest.raises(ValueError, match=r"variants\.v\.callbacks\.too: the run has no too there.* but one, two\."):
        varied(OmegaConf.create(base | {"variants": {"v": {"callbacks": {"too": {"amount": 3}}}}}))


def test_a_variants_trainer_may_say_the_runs_own_epochs() -> None:
    register_resolvers()
    needed = {"val_metric": "a", "measure": {}, "file": {"coder": "ans"}, "compare": {"root": "."}, "seed": 0}
    both = "${lightning_compress.total:${dense.max_epochs},${trainer.max_epochs}}"
    base = needed | {"output_dir": "o", "callbacks": {}, "dense": {"max_epochs": 5}, "trainer": {"max_epochs": 7}}
    cfg = OmegaConf.create(base | {"variants": {"v": {"trainer": {"max_epochs": both}}}})
    assert varied(cfg)["v"].trainer.max_epochs == 12
    assert cfg.trainer.max_epochs == 7
