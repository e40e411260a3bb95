"""The main job: a dense network, the compressed one that comes of it, and both measured."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_compress.coding import load_compressed, save_compressed
from lightning_compress.coding.container import Coder, make_writer
from lightning_compress.coding.footprint import footprint
from lightning_compress.coding.weights import load_weights
from lightning_compress.core.example_inputs import to_device
from lightning_compress.core.files import replacing
from lightning_compress.measure.footprint import time_in_turns
from lightning_compress.report import Measurement, Report, compare_layers, write_report
from lightning_compress.report.metric import Metric, Mode
from lightning_compress.tasks.history import Recorder
from lightning_compress.tasks.inputs import example_inputs
from lightning_compress.tasks.progress import RunProgress
from lightning_compress.tasks.testing import accuracy, check_tested, finite, quietly, trainer_of
from lightning_compress.trainer.distributed import barrier

log = logging.getLogger(__name__)

COMPRESSED, SMALL = "compressed.ckpt", "compressed.lcz"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: where its data, its Trainers and its numbers come from, and the folder it writes into.

    Attributes:
        datamodule: Training, validation and test data.
        make_trainer: Makes a Trainer; its keyword arguments stand over the configured ones.
        folder: Where `dense_files`, compressed.ckpt, compressed.lcz and the report go.
        seed: Root of everything random.
        metric: What the networks are compared by, under the name by which `test_step` logs it; None: nothing is tested.
        val_metric: What is shown over the epochs, under the name by which `validation_step` logs it.
        metric_mode: "max" or "min", the direction in which both get better, where their names do not say so.
        batch_size: Samples in the forward pass that is timed.
        repeats: Forward passes that are timed.
        coder: Of compressed.lcz, as in `save_compressed`.
        half: Whether its floats are rounded to float16. The compressed network is then the rounded one, everywhere.
        settings: What the report says the run was started with.
        epochs: Of the compression: with them a progress bar shows how much of the whole run is left; None: it does not.
    """

    datamodule: LightningDataModule
    make_trainer: Callable[..., Trainer]
    folder: Path
    seed: int = 0
    metric: str | None = "test_acc"
    val_metric: str = "val_acc"
    metric_mode: Mode | None = None
    batch_size: int = 64
    repeats: int = 200
    coder: Coder = "ans"
    half: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    def compress(
        self,
        modules: Sequence[LightningModule],
        *,
        student: LightningModule | None = None,
        callbacks: Sequence[Callback],
        loggers: Sequence[Logger] = (),
        wrap: Callable[[LightningModule], LightningModule] = lambda module: module,
        dense: Mapping[str, Any],
        weights: Sequence[str | Path] = (),
        ckpt_path: str | Path | None = None,
    ) -> Report | None:
        """Get the dense network, train a copy of it or a student with the techniques, measure both, write the report.

        Args:
            modules: The untrained networks; they become the dense ones. The first is compared with the compressed
                one, and all are in the folder when the wrappers are made, which may learn from them.
            student: The network to compress, untrained; None: a copy of the first dense one.
            callbacks: Of the compression.
            loggers: Of the compression.
            wrap: Gives the network to compress its wrappers.
            dense: The Trainer's arguments for the dense training.
            weights: Files to load instead of the dense training, one for each of `modules`.
            ckpt_path: A checkpoint of this run's compression to go on with; the dense ones are those in the folder.

        Returns:
            The report on rank 0, None on the others.

        Raises:
            FileNotFoundError: `weights`, or the folder's dense.ckpt of a run to go on with, does not exist.
            ValueError: A module has no test_step, or does not log the metric; the weights don't fit, or are more or
                less than `modules`; no such coder; `repeats` or `batch_size` below 1.
        """
        make_writer(self.coder)  # an unknown one shows now, not hours later
        Metric.of(self.metric or "", [], mode=self.metric_mode)
        for name, number in (("repeats", self.repeats), ("batch_size", self.batch_size)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r} of the measurement must be a whole number, 1 or more.")
        if weights and len(weights) != len(modules):
            raise ValueError(f"{len(modules)} dense networks want as many weights, [a.ckpt, ...]; got {len(weights)}.")
        if self.metric is not None:
            for one in modules[:1] if student is None else (modules[0], student):
                check_tested(one, self.metric)
        module, recorder = modules[0], Recorder(self.val_metric)
        self.folder.mkdir(parents=True, exist_ok=True)
        files = dense_files(self.folder, len(modules))
        loaded = weights if ckpt_path is None else files
        for one, path in zip(modules, loaded, strict=False):
            load_weights(one, path)
        # What is wrong with data or metric shows now, not hours later.
        if not loaded:
            self._accuracy(module, limit_test_batches=1)
        if student is not None:
            self._accuracy(student, limit_test_batches=1)
        if not loaded:
            self._train_dense(modules, dense, recorder)
        dense_accuracy = self._accuracy(module)
        for one, path in zip(modules, files, strict=True):
            _save_dense(one, path)
        barrier()  # the wrappers of every rank may read them

        if student is not None:
            recorder.phase = "student"
        compressed = wrap(copy.deepcopy(module) if student is None else student)
        seed_everything(self.seed, workers=True, verbose=False)  # the same, whether the dense network was loaded or not
        rank_zero_info("Compression.")
        before = 0 if loaded else len(modules) * int(dense.get("max_epochs") or 0)
        bar = self._bar(before, before, callbacks)
        trainer = trainer_of(self.make_trainer, callbacks=[*callbacks, recorder, *bar], logger=list(loggers) or False)
        trainer.fit(compressed, datamodule=self.datamodule, ckpt_path=ckpt_path)
        before_recovery = None
        if recorder.snapshot is not None:
            snapshot = copy.deepcopy(compressed)
            with quietly("lightning_compress.channels.load", logging.ERROR):  # it is wider, of course
                snapshot.load_state_dict(recorder.snapshot)
            before_recovery = self._accuracy(snapshot)
        if self.half:
            self._round(compressed)
        compressed_accuracy = self._accuracy(compressed)
        trainer.save_checkpoint(self.folder / COMPRESSED, weights_only=True)
        if not trainer.is_global_zero:
            return None
        costs, busy = self._costs(module, compressed, trainer.strategy.root_device)
        size = save_compressed(compressed, self.folder / SMALL, coder=self.coder, half=self.half)
        report = Report(
            dense=replace(costs["dense"], test_metric=_number(self.metric, dense_accuracy)),
            compressed=replace(
                costs["compressed"], test_metric=_number(self.metric, compressed_accuracy), file_bytes=size.bytes
            ),
            before_recovery=_number(self.metric, before_recovery),
            history=tuple(replace(e, val_metric=_number(self.val_metric, e.val_metric)) for e in recorder.history),
            layers=compare_layers(dict(module.named_parameters()), dict(compressed.named_parameters())),
            settings=dict(self.settings),
            metric=self.metric,
            val_metric=self.val_metric,
            metric_mode=self.metric_mode,
            busy=busy,
        )
        write_report(report, self.folder, figure=can_draw())
        return report

    def _train_dense(self, modules: Sequence[LightningModule], options: Mapping[str, Any], recorder: Recorder) -> None:
        for number, module in enumerate(modules):
            seed_everything(self.seed + number, workers=True, verbose=False)
            rank_zero_info(f"Dense training{f', {number + 1} of {len(modules)}' if len(modules) > 1 else ''}.")
            epochs = int(options.get("max_epochs") or 0)
            shown = options.get("enable_progress_bar", True)
            bar = self._bar(number * epochs, len(modules) * epochs) if shown else []
            trainer = trainer_of(
                self.make_trainer,
                **options,
                callbacks=[recorder, *bar] if number == 0 else bar,
                logger=False,
                enable_checkpointing=False,
            )
            trainer.fit(module, datamodule=self.datamodule)

    def _bar(self, before: int, of_the_dense: int, others: Sequence[Callback] = ()) -> list[Callback]:
        if self.epochs is None or self.epochs < 0 or any(isinstance(one, ProgressBar) for one in others):
            return []
        return [RunProgress(before, of_the_dense + self.epochs)]

    def _accuracy(self, module: LightningModule, **options: Any) -> float | None:
        if self.metric is None:
            return None
        return accuracy(module, self.datamodule, self.make_trainer, self.metric, **options)

    def _round(self, module: LightningModule) -> None:
        """Give the network what its file would give back, on every rank without the others."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / SMALL
            save_compressed(module, path, half=True)
            load_compressed(path, module)

    def _costs(
        self, dense: LightningModule, compressed: LightningModule, device: torch.device
    ) -> tuple[dict[str, Measurement], bool]:
        inputs = to_device(example_inputs(dense, self.datamodule, batch_size=self.batch_size), device)
        networks = {"dense": dense.to(device), "compressed": compressed.to(device)}
        latency = time_in_turns({name: (network, inputs) for name, network in networks.items()}, repeats=self.repeats)
        measured = {
            name: Measurement.from_footprint(
                footprint(network, inputs, repeats=1), test_metric=None, latency=latency[name]
            )
            for name, network in networks.items()
        }
        return measured, latency["dense"].busy


def _number(metric: str | None, value: float | None) -> float | None:
    return finite(metric, value, otherwise="the report leaves it out")


def can_draw() -> bool:
    """Whether matplotlib is there; where it is not, a warning says what to install."""
    found = find_spec("matplotlib") is not None
    if not found:
        log.warning("No figure is drawn without matplotlib: pip install 'lightning-compress[figures]'.")
    return found


def dense_files(folder: str | Path, number: int) -> list[str]:
    """Return where the dense networks of a run are.

    Example:
        >>> dense_files("run", 3)
        ['run/dense.ckpt', 'run/dense-1.ckpt', 'run/dense-2.ckpt']
    """
    return [str(Path(folder) / ("dense.ckpt" if i == 0 else f"dense-{i}.ckpt")) for i in range(number)]


@rank_zero_only
def _save_dense(module: LightningModule, path: str) -> None:
    with replacing(path) as temporary:
        torch.save({"state_dict": module.state_dict()}, temporary)
