"""Resumes from every moment at which a checkpoint is written, compared with what the uninterrupted run recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from support.ranks import RankPair
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import GroupLassoCallback, IterativePruningCallback
from lightning_compress.trainer.resume import METRICS

BATCHES = 6
X = torch.randn(4 * BATCHES, 8, generator=torch.Generator().manual_seed(5))


class Positioned:
    """Shuffles by the epoch; a position at the end of the data is their beginning."""

    def __init__(self) -> None:
        self.epoch = self.position = 0
        self.loaded = False
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return BATCHES

    def batch(self, index: int) -> Tensor:
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(self.epoch))
        return X[order[4 * index : 4 * index + 4]]

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.position % BATCHES, BATCHES):
            self.position = index + 1
            yield self.batch(index)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self.loaded = state["epoch"], state["position"], True


class Running(Positioned):
    """A generator: the first one after a load gives the rest of an epoch, and nothing at its end."""

    def __iter__(self) -> Iterator[Tensor]:
        self.position, self.loaded = self.position if self.loaded else 0, False
        while self.position < BATCHES:
            self.position += 1
            yield self.batch(self.position - 1)


class Eager(Positioned):
    """As torchdata's loader: the state is used when an iterator is made."""

    def __iter__(self) -> Iterator[Tensor]:
        self.position, self.loaded = self.position if self.loaded else 0, False
        return iter(self.rest())

    def rest(self) -> Iterator[Tensor]:
        while self.position < BATCHES:
            self.position += 1
            yield self.batch(self.position - 1)


class Own(Positioned):
    """Counts its epochs itself, which is known to its state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.position, BATCHES):
            batch = self.batch(index)
            self.position = (index + 1) % BATCHES
            self.epoch += self.position == 0
            yield batch


class Unending(Running):
    """Has no length that a Trainer could ask for."""

    __len__ = None  # type: ignore[assignment]


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "positioned": Positioned,
    "running": Running,
    "eager": Eager,
    "own": Own,
    "shuffled": lambda: DataLoader(X, 4, shuffle=True),  # type: ignore[arg-type]
    "combined": lambda: CombinedLoader([Positioned(), Running()], "max_size_cycle"),
}


class Recorded(LightningModule):
    """Records what happens, with the content of batches and the learning rate."""

    def __init__(self, scheduler: str) -> None:
        super().__init__()
        self.linear, self.dropout, self.scheduler = nn.Linear(8, 4), nn.Dropout(0.3), scheduler
        self.events: list[Any] = []

    def record(self, what: str, *values: Any) -> None:
        self.events.append((what, self.current_epoch, self.global_step, *values))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = torch.cat(batch) if isinstance(batch, list) else batch
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.record("batch", batch_idx, rate, batch.sum().item())
        return self.dropout(self.linear(batch)).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.record("validation", batch_idx)
        self.log("quality", self.linear(batch).square().mean())

    def on_train_epoch_start(self) -> None:
        self.record("start")

    def on_train_epoch_end(self) -> None:
        self.record("end")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        if self.scheduler.startswith("plateau"):
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
            settings = {"scheduler": plateau, "monitor": "quality"}
            return {
                "optimizer": optimizer,
                "lr_scheduler": settings | ({"interval": "step", "frequency": 4} if "step" in self.scheduler else {}),
            }
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


class Saves(Callback):
    """Saves at every moment at which ModelCheckpoint may, and notes where in the record that was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[str, int] = {}

    def save(self, trainer: Trainer, moment: str) -> None:
        module = trainer.lightning_module
        assert isinstance(module, Recorded)
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        name = f"{moment}{batch}"
        trainer.save_checkpoint(self.folder / name)

        self.saved[name] = len(module.events)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "validation")


class SavesAtEnds(Saves):
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "end")


def fit(
    loader: str,
    folder: Path,
    resume: Path | None,
    *,
    validate: bool = True,
    scheduler: str = "step",
    saves: type[Saves] | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> tuple[Recorded, Saves, Trainer]:
    torch.manual_seed(0)
    module, saving = Recorded(scheduler), (saves or Saves)(folder)
    pruning = IterativePruningCallback(0.5, end_epoch=options.pop("end_epoch", 2.0), every_n_steps=4)
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": 3} | options
    trainer = quiet_trainer(callbacks=[pruning, *callbacks, saving], **settings)
    validation = DataLoader(X, 8) if validate else None  # type: ignore[arg-type]
    trainer.fit(module, LOADERS[loader](), validation, ckpt_path=resume, weights_only=True)
    return module, saving, trainer


def assert_same_end(
    whole: tuple[Recorded, Saves, Trainer], resumed: tuple[Recorded, Saves, Trainer], name: str
) -> None:
    module, saves, trainer = whole
    assert resumed[0].events == module.events[saves.saved[name] :], name
    assert resumed[2].global_step == trainer.global_step
    assert resumed[2].current_epoch == trainer.current_epoch
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key]), (name, key)
    left, right = (one[2].optimizers[0].state_dict() for one in (whole, resumed))
    assert left["param_groups"] == right["param_groups"]
    for index, state in left["state"].items():
        assert torch.equal(state["momentum_buffer"], right["state"][index]["momentum_buffer"])


SETTINGS: dict[str, dict[str, Any]] = {
    "validated": {},
    "not-validated": {"validate": False},
    "every-2-epochs": {"check_val_every_n_epoch": 2},
    "every-4-batches": {"val_check_interval": 4},
    "every-3-batches": {"val_check_interval": 3},
    "across-epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "accumulated": {"accumulate_grad_batches": 4},
    "steps": {"max_steps": 15, "max_epochs": -1},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1},
}
CASES = [("positioned", setting) for setting in SETTINGS] + [
    (loader, setting) for loader in LOADERS if loader != "positioned" for setting in ("validated", "not-validated")
]


@pytest.mark.parametrize(("loader", "setting"), [*CASES, ("running", "steps"), ("shuffled", "every-2-epochs")])
def test_a_resume_from_the_last_batch_and_then_inside_the_next_epoch_is_exact(
    loader: str, setting: str, tmp_path: Path
) -> None:
    options = SETTINGS[setting]
    whole = fit(loader, tmp_path, None, **options)
    for last in (BATCHES, 2 * BATCHES):
        folder = tmp_path / f"resumed{last}"
        resumed = fit(loader, folder, tmp_path / f"batch{last}", **options)
        assert_same_end(whole, resumed, f"batch{last}")
        later = f"batch{last + (BATCHES if loader == 'shuffled' else 4)}"  # a plain loader has no position
        if later in resumed[1].saved and (last, setting) != (2 * BATCHES, "steps"):
            assert_same_end(whole, fit(loader, tmp_path / "again", folder / later, **options), later)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("setting", ["validated", "every-3-batches", "steps"])
def test_a_resume_from_a_validation_is_exact(loader: str, setting: str, tmp_path: Path) -> None:
    options = SETTINGS[setting]
    whole = fit(loader, tmp_path, None, **options)
    moments = [name for name in whole[1].saved if name.startswith("validation")]
    if loader == "shuffled":
        moments = [name for name in moments if int(name.removeprefix("validation")) % BATCHES == 0]
    for name in [one for one in moments if one != "validation15"][:4]:  # after the last step nothing is resumed
        assert_same_end(whole, fit(loader, tmp_path / "resumed", tmp_path / name, **options), name)


def test_a_validation_that_follows_the_batch_of_a_checkpoint_is_made_up_for(tmp_path: Path) -> None:
    whole = fit("positioned", tmp_path, None, val_check_interval=3)
    resumed = fit("positioned", tmp_path / "resumed", tmp_path / "batch3", val_check_interval=3)
    assert resumed[0].events[0][0] == "validation"
    assert_same_end(whole, resumed, "batch3")


@pytest.mark.parametrize("loader", ["running", "eager", "shuffled"])
def test_an_epoch_that_a_limit_ends_is_resumed_exactly(loader: str, tmp_path: Path) -> None:
    """The uninterrupted run leaves its iterator in the middle of the data, and so must the resumed one."""
    whole = fit(loader, tmp_path, None, limit_train_batches=4)
    for name in ("batch4", "validation8"):
        assert_same_end(whole, fit(loader, tmp_path / "resumed", tmp_path / name, limit_train_batches=4), name)


def test_a_checkpoint_behind_an_epoch_that_lightning_did_not_count_is_repaired(tmp_path: Path) -> None:
    """Such were written after a resume from a last batch."""
    whole = fit("positioned", tmp_path, None)
    checkpoint = torch.load(tmp_path / "batch10", weights_only=True)
    for counter in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        counter["ready"] -= 1
        counter["started"] -= 1
    torch.save(checkpoint, tmp_path / "batch10")
    assert_same_end(whole, fit("positioned", tmp_path / "resumed", tmp_path / "batch10"), "batch10")


@pytest.mark.parametrize("scheduler", ["plateau", "plateau-step"])
def test_a_plateau_is_stepped_at_the_end_of_a_resumed_epoch(scheduler: str, tmp_path: Path) -> None:
    """Lightning alone leaves that step out."""
    whole = fit("positioned", tmp_path, None, scheduler=scheduler, saves=SavesAtEnds, val_check_interval=3)
    whole[1].saved["end6"] += 1  # the module's own hook comes after the callback that saved
    rates = {event[4] for event in whole[0].events if event[0] == "batch"}
    assert len(rates) > 2
    for moment in ("batch4", "batch6", "validation6", "batch9", "end6", "validation9"):
        resumed = fit("positioned", tmp_path / "resumed", tmp_path / moment, scheduler=scheduler, val_check_interval=3)
        assert_same_end(whole, resumed, moment)


@pytest.mark.parametrize("scheduler", ["plateau", "plateau-step"])
def test_two_techniques_step_a_plateau_once_and_save_its_metrics_once(scheduler: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheduler": scheduler, "val_check_interval": 3}
    whole = fit("positioned", tmp_path, None, callbacks=[GroupLassoCallback(0.001)], **options)
    for moment in ("batch4", "batch6", "validation9"):
        resumed = fit(
            "positioned", tmp_path / "resumed", tmp_path / moment, callbacks=[GroupLassoCallback(0.001)], **options
        )
        assert_same_end(whole, resumed, moment)
    checkpoint = torch.load(tmp_path / "batch4", weights_only=True)
    assert "quality" in checkpoint.pop(METRICS)[0]["seen"]
    assert "quality" not in str(checkpoint["callbacks"])


def test_a_checkpoint_without_logged_metrics_goes_on_as_in_lightning_alone(tmp_path: Path) -> None:
    """It is from another version, or from a run without a technique."""
    fit("positioned", tmp_path, None, scheduler="plateau")
    for batch, remove in ((4, False), (6, False), (6, True)):
        checkpoint = torch.load(tmp_path / f"batch{batch}", weights_only=True)
        states = checkpoint["callbacks"]
        (key,) = [key for key in states if key.startswith("IterativePruningCallback")]
        del checkpoint[METRICS]
        if remove:
            del states[key]
        torch.save(checkpoint, tmp_path / "without")
        said = r"does not hold logged metrics" if batch == 6 else "without the metrics of the checkpoint's epoch"
        with pytest.warns(UserWarning, match=said):
            module, _, trainer = fit("positioned", tmp_path / "resumed", tmp_path / "without", scheduler="plateau")
        assert trainer.global_step == 3 * BATCHES
        assert [event[1] for event in module.events if event[0] == "end"] == ([1, 2] if batch == 6 else [0, 1, 2])


def test_a_fit_that_max_steps_skips_is_said(tmp_path: Path) -> None:
    fit("positioned", tmp_path, None, **SETTINGS["steps"])
    with pytest.warns(UserWarning, match="max_steps=15 leaves nothing to train"):
        fit("positioned", tmp_path / "resumed", tmp_path / "batch15", **SETTINGS["steps"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint is from step")
        fit("positioned", tmp_path / "resumed", tmp_path / "batch12", **SETTINGS["steps"])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("setting", ["validated", "not-validated", "steps"])
def test_a_resume_from_an_epochs_end_is_exact(loader: str, setting: str, tmp_path: Path) -> None:
    whole = fit(loader, tmp_path, None, saves=SavesAtEnds, **SETTINGS[setting])
    whole[1].saved["end6"] += 1  # the module's own hook comes after the callback that saved
    resumed = fit(loader, tmp_path / "resumed", tmp_path / "end6", **SETTINGS[setting])
    assert_same_end(whole, resumed, "end6")


def test_gradients_that_no_checkpoint_holds_are_said(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 4}
    whole = fit("positioned", tmp_path, None, **options)
    with pytest.warns(UserWarning, match="between two of the 4 batches"):
        fit("positioned", tmp_path / "resumed", tmp_path / "batch3", **options)
    for name in ("batch4", "batch6", "batch10"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Resumed between two")
            assert_same_end(whole, fit("positioned", tmp_path / "resumed", tmp_path / name, **options), name)


def test_a_schedule_of_accumulation_that_waits_for_the_next_epoch_is_said(tmp_path: Path) -> None:
    def schedule() -> list[Callback]:
        return [GradientAccumulationScheduler({0: 1, 1: 2})]

    whole = fit("positioned", tmp_path, None, callbacks=schedule())
    with pytest.warns(UserWarning, match="every batch is a step, and not every 2 batches"):
        fit("positioned", tmp_path / "resumed", tmp_path / "batch10", callbacks=schedule())
    for name in ("batch4", "batch6", "batch12"):
        resumed = fit("positioned", tmp_path / "resumed", tmp_path / name, callbacks=schedule())
        assert_same_end(whole, resumed, name)


@pytest.mark.parametrize("entry", ["pruning-regrow", "distillation"])
def test_two_resumes_in_a_row_are_exact_on_two_ranks(entry: str, rank_pair: RankPair, tmp_path: Path) -> None:
    def on_ranks(**options: Any) -> list[dict[str, Any]]:
        return rank_pair.run("support.jobs:fit_on_ranks", tmp_path, entry=entry, stateful=True, max_epochs=3, **options)

    whole = on_ranks(folder=str(tmp_path / "whole"), every_n_train_steps=4)
    first = on_ranks(
        folder=str(tmp_path / "first"), every_n_train_steps=4, resume=str(tmp_path / "whole" / "step=12.ckpt")
    )
    second = on_ranks(resume=str(tmp_path / "first" / "step=20.ckpt"))
    for resumed in (first, second):
        for left, right in zip(whole, resumed, strict=True):
            assert left["weights"].keys() == right["weights"].keys()
            assert all(torch.equal(value, right["weights"][name]) for name, value in left["weights"].items())


def test_other_loaders_than_the_checkpoints_are_said(tmp_path: Path) -> None:
    fit("positioned", tmp_path, None, saves=SavesAtEnds)
    with pytest.warns(UserWarning, match=r"holds states of 1 training loader\(s\), and this fit has 2"):
        fit("combined", tmp_path / "resumed", tmp_path / "end6")


def test_a_loader_without_length_is_a_batch_ahead_of_its_state_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOADERS, "unending", Unending)
    options: dict[str, Any] = {"max_steps": 15, "max_epochs": -1, "end_epoch": None}
    whole = fit("unending", tmp_path, None, **options)
    with pytest.warns(UserWarning, match="has no length, from which Lightning fetches a batch ahead"):
        fit("unending", tmp_path / "resumed", tmp_path / "batch3", **options)
    for name in ("batch6", "validation12"):
        assert_same_end(whole, fit("unending", tmp_path / "resumed", tmp_path / name, **options), name)
