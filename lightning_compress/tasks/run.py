"""The main job in stages: train a dense network, compress a copy of it, measure both, and report."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_compress.coding import load_compressed, save_compressed
from lightning_compress.coding.container import Coder, make_writer
from lightning_compress.coding.footprint import footprint
from lightning_compress.coding.weights import load_weights
from lightning_compress.core.distributed import barrier
from lightning_compress.core.example_inputs import to_device
from lightning_compress.core.files import replacing
from lightning_compress.measure.footprint import time_in_turns
from lightning_compress.report import Epoch, Measurement, Point, Report, compare_layers, write_report
from lightning_compress.report.figure import can_draw
from lightning_compress.report.metric import Metric, Mode
from lightning_compress.report.page import can_write_page, write_report_page
from lightning_compress.tasks.history import Recorder
from lightning_compress.tasks.inputs import example_inputs, samples
from lightning_compress.tasks.narrow import SavesEveryEpoch, check_search, narrowed
from lightning_compress.tasks.points import COMPRESSED as COMPRESSED_NAME
from lightning_compress.tasks.points import Way, calibrate, check_calibration, tested_ways, timed_points
from lightning_compress.tasks.progress import RunProgress
from lightning_compress.tasks.results import Compressed, Costs, Dense
from lightning_compress.tasks.run_folder import COMPRESSED, SEARCH, SMALL, TUNING, dense_files
from lightning_compress.tasks.testing import accuracy, check_tested, finite, quietly, trainer_of


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another way to compress the same network, beside a run's own.

    Attributes:
        callbacks: Callbacks of the compression; those that save checkpoints are left out.
        wrap: As for `Run.run`.
        student: The untrained network to compress, with the weights of the run's own; None: as for `Run.run`.
        trainer: The Trainer's arguments that differ, such as max_epochs.
    """

    callbacks: Sequence[Callback] = ()
    wrap: Callable[[LightningModule], LightningModule] = lambda module: module
    student: LightningModule | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run in stages: dense networks, compression with recovery, measurement, report.

    `run` goes through all stages. A search can call `make_dense` once, and then compress and measure copies of the
    dense network many times: `compress` and `measure` neither train nor test a dense network.

    Attributes:
        datamodule: Training, validation and test data.
        make_trainer: Function that makes a Trainer; its keyword arguments replace the configured ones.
        folder: Folder for the dense checkpoints, compressed.ckpt, compressed.lcz and the report.
        seed: Seed of all random numbers.
        metric: Name under which `test_step` logs the metric that compares the networks; with None nothing is tested.
        val_metric: Name under which `validation_step` logs the metric that is shown over the epochs.
        metric_mode: "max" or "min", the direction in which both metrics get better, where their names do not say so.
        batch_size: Number of samples in a forward pass that is timed.
        repeats: Number of forward passes that are timed.
        coder: Entropy coder of compressed.lcz, as in `save_compressed`.
        half: Whether floats in compressed.lcz are rounded to float16. The compressed network is then rounded before its
            test, and compressed.ckpt contains the rounded weights too.
        settings: Settings of the run, for the report.
        command: Command line that repeats the run, for the report; None where it is started from Python.
        epochs: Number of epochs of the compression, for a progress bar over the whole run; with None there is no bar.
        search: Arguments of `search_widths` for a slimmable network, with `epochs`: when its training has ended, a
            width is found for every group of channels, and the network of these widths trains on for so many epochs.
        called: Name of the compressed network in the report's table of variants.
        calibration: Arguments of the compressed network's `calibrate`, which then runs on the validation data when the
            compression has ended; None: it is not calibrated.
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
    command: str | None = None
    epochs: int | None = None
    called: str = COMPRESSED_NAME
    search: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None

    def run(
        self,
        modules: Sequence[LightningModule],
        *,
        student: LightningModule | None = None,
        callbacks: Sequence[Callback],
        loggers: Sequence[Logger] = (),
        wrap: Callable[[LightningModule], LightningModule] = lambda module: module,
        dense: Mapping[str, Any],
        weights: Sequence[str | Path] = (),
        controls: Mapping[str, LightningModule] | None = None,
        variants: Mapping[str, Variant] | None = None,
        ckpt_path: str | Path | None = None,
    ) -> Report | None:
        """Go through all stages.

        Args:
            modules: The untrained networks, which become the dense ones. The report compares the first one with the
                compressed network. All are saved in the folder before `wrap` is called, so that they can be teachers.
            student: The untrained network to compress; None stands for a copy of the first dense network.
            callbacks: Callbacks of the compression.
            loggers: Loggers of the compression.
            wrap: Function that puts the network to compress inside its wrappers.
            dense: The Trainer's arguments for the dense training.
            weights: Files with the weights of `modules`, one for each, which replace the dense training.
            controls: Untrained networks by name, which are trained alone for as many epochs as the dense network and
                its compression together, and stand beside the ways to run the compressed network in the report.
            variants: Other ways to compress by name, each from the same start and the same seed, whose networks stand
                beside the compressed one in the report. They begin when compressed.ckpt is written, and anew when
                the run is resumed.
            ckpt_path: Checkpoint of this run's compression that is resumed, with the dense networks in the folder.

        Returns:
            The report on rank 0, None on the other ranks.

        Raises:
            FileNotFoundError: A file of `weights`, or dense.ckpt of the run that is resumed, does not exist.
            ValueError: A module has no test_step or does not log the metric, the weights don't match `modules`, the
                coder is unknown, or `repeats` or `batch_size` is below 1.
        """
        self._check(modules, student, weights)
        files = dense_files(self.folder, len(modules))
        trained = self.make_dense(modules, training=dense, weights=weights if ckpt_path is None else files)
        compressed = self.compress(
            trained, student=student, callbacks=callbacks, loggers=loggers, wrap=wrap, ckpt_path=ckpt_path
        )
        epochs = int(dense.get("max_epochs") or 0) + compressed.trainer.current_epoch
        if self.search is not None:
            compressed = self.narrow(compressed, self.search, resumed=ckpt_path is not None)
            epochs += compressed.trainer.current_epoch
        compressed.trainer.save_checkpoint(self.folder / COMPRESSED, weights_only=True)
        alone = dict(controls or {})
        self._train_dense(list(alone.values()), {**dense, "max_epochs": epochs}, None)
        if variants and ckpt_path is not None:
            rank_zero_info(f"Variants have no checkpoints: {', '.join(variants)} begin anew.")
        others = {name: self._vary(name, trained, one) for name, one in (variants or {}).items()}
        ways = tested_ways(trained, compressed, alone, self._test, others)
        if not compressed.trainer.is_global_zero:
            return None
        costs = self.measure(trained, compressed, self.folder / SMALL)
        return self.report(trained, compressed, costs, self.time(ways, costs))

    def _check(
        self, modules: Sequence[LightningModule], student: LightningModule | None, weights: Sequence[str | Path]
    ) -> None:
        """Raise errors before the training that would otherwise come after it."""
        make_writer(self.coder)
        Metric.of(self.metric or "", [], mode=self.metric_mode)
        for name, number in (("repeats", self.repeats), ("batch_size", self.batch_size)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r} of the measurement must be a whole number, 1 or more.")
        if weights and len(weights) != len(modules):
            raise ValueError(
                f"{len(modules)} dense networks need as many files of weights, [a.ckpt, ...]; got {len(weights)}."
            )
        if self.metric is not None:
            for one in (modules[0], student):
                if one is not None:
                    check_tested(one, self.metric)
        if student is not None:
            self._test(student, limit_test_batches=1)

    # ------------------------------------------------------------------ the stages

    def make_dense(
        self, modules: Sequence[LightningModule], *, training: Mapping[str, Any], weights: Sequence[str | Path] = ()
    ) -> Dense:
        """Train networks in place, or load their weights; test the first one, and save all of them in the folder.

        Args:
            modules: The untrained networks.
            training: The Trainer's arguments.
            weights: Files with the weights of the networks, one for each, which replace the training.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: The weights don't match the networks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(self.val_metric)
        if weights:
            for one, path in zip(modules, weights, strict=True):
                load_weights(one, path)
        else:
            self._test(modules[0], limit_test_batches=1)  # an error of the data or the metric comes before the training
            self._train_dense(modules, training, recorder)
        metric = self._test(modules[0])
        for one, file in zip(modules, dense_files(self.folder, len(modules)), strict=True):
            _save_dense(one, file)
        barrier()  # wrappers on every rank may read the files
        epochs = 0 if weights else len(modules) * int(training.get("max_epochs") or 0)
        return Dense(modules=modules, metric=metric, history=recorder.history, epochs=epochs)

    def compress(
        self,
        dense: Dense,
        *,
        student: LightningModule | None = None,
        callbacks: Sequence[Callback],
        loggers: Sequence[Logger] = (),
        wrap: Callable[[LightningModule], LightningModule] = lambda module: module,
        ckpt_path: str | Path | None = None,
    ) -> Compressed:
        """Train a copy of the dense network, or a student, with the techniques, and test the compressed network.

        Args:
            dense: The dense networks, which are not changed.
            student: The untrained network to compress; None stands for a copy of the first dense network.
            callbacks: Callbacks of the compression.
            loggers: Loggers of the compression.
            wrap: Function that puts the network to compress inside its wrappers.
            ckpt_path: Checkpoint of this compression that is resumed.
        """
        recorder = Recorder(self.val_metric, dense.history)
        if student is not None:
            recorder.phase = "student"
        compressed = wrap(copy.deepcopy(dense.modules[0]) if student is None else student)
        check_calibration(compressed, self.calibration)
        check_search(compressed, self.search)
        seed_everything(self.seed, workers=True, verbose=False)  # independent of whether a dense training came before
        rank_zero_info("Compression.")
        bar = self._bar(dense.epochs, dense.epochs, callbacks)
        trainer = trainer_of(self.make_trainer, callbacks=[*callbacks, recorder, *bar], logger=list(loggers) or False)
        trainer.fit(compressed, datamodule=self.datamodule, ckpt_path=ckpt_path)
        if self.calibration is not None:
            calibrate(compressed, self.datamodule, self.calibration)
        before_recovery = None
        if recorder.snapshot is not None:
            snapshot = copy.deepcopy(compressed)
            with quietly("lightning_compress.channels.load", logging.ERROR):  # which warns that the snapshot is wider
                snapshot.load_state_dict(recorder.snapshot)
            before_recovery = self._test(snapshot)
        if self.half:
            self._round(compressed)
        return Compressed(
            module=compressed,
            trainer=trainer,
            metric=self._test(compressed),
            before_recovery=before_recovery,
            history=recorder.history,
        )

    def _vary(self, name: str, dense: Dense, variant: Variant) -> Compressed:
        """Compress in another way, without a bar of the whole run and without files."""
        rank_zero_info(f"Variant {name}.")
        make_trainer = partial(self.make_trainer, **variant.trainer, enable_checkpointing=False)
        callbacks = [one for one in variant.callbacks if not isinstance(one, ModelCheckpoint)]
        job = replace(self, make_trainer=make_trainer, epochs=None, search=None, calibration=None)
        return job.compress(dense, student=variant.student, callbacks=callbacks, wrap=variant.wrap)

    def narrow(self, slimmable: Compressed, search: Mapping[str, Any], *, resumed: bool = False) -> Compressed:
        """Search a width for every group of a slimmable network, and train the network of these widths on.

        A run that is resumed goes on with both from what the folder has of them.
        """
        settings = dict(search)
        epochs = int(settings.pop("epochs"))
        wrapped: Any = slimmable.module
        resumed = resumed and (self.folder / SEARCH).exists()  # else the widths may be others
        module = narrowed(wrapped, self.datamodule, record=self.folder / SEARCH, **settings)
        before = self._test(module)
        recorder = Recorder(self.val_metric, slimmable.history)
        recorder.phase = "tuning"
        seed_everything(self.seed, workers=True, verbose=False)
        path = self.folder / TUNING
        saving = SavesEveryEpoch(path)
        options: dict[str, Any] = {"max_epochs": epochs, "logger": False, "enable_checkpointing": False}
        trainer = trainer_of(self.make_trainer, callbacks=[recorder, saving], **options)
        trainer.fit(module, datamodule=self.datamodule, ckpt_path=path if resumed and path.exists() else None)
        return Compressed(
            module=module,
            trainer=trainer,
            metric=self._test(module),
            before_recovery=before,
            history=recorder.history,
        )

    def measure(self, dense: Dense, compressed: Compressed, file: Path) -> Costs:
        """Measure the costs of both networks in this process, and write the file of the compressed network."""
        device = compressed.trainer.strategy.root_device
        inputs = to_device(example_inputs(dense.modules[0], self.datamodule, batch_size=self.batch_size), device)
        networks = {"dense": dense.modules[0].to(device), "compressed": compressed.module.to(device)}
        latency = time_in_turns({name: (network, inputs) for name, network in networks.items()}, repeats=self.repeats)
        metrics = {"dense": dense.metric, "compressed": compressed.metric}
        found = {
            name: Measurement.from_footprint(
                footprint(network, inputs, repeats=1),
                test_metric=_number(self.metric, metrics[name]),
                latency=latency[name],
            )
            for name, network in networks.items()
        }
        size = save_compressed(compressed.module, file, coder=self.coder, half=self.half)
        return Costs(
            dense=found["dense"],
            compressed=replace(found["compressed"], file_bytes=size.bytes),
            busy=latency["dense"].busy,
        )

    def time(self, ways: Sequence[Way], costs: Costs) -> tuple[Point, ...]:
        """Time the ways to run the network on a batch of test samples, on one process."""
        if not ways:
            return ()
        module = ways[0].network
        assert isinstance(module, LightningModule)
        device = next((one.device for one in ways[-1].network.parameters()), module.device)
        for way in ways:
            way.network.to(device)
        inputs = samples(module, self.datamodule, batch_size=self.batch_size, test=True)
        small = costs.compressed.file_bytes
        return timed_points(ways, to_device(inputs, device), repeats=self.repeats, small=small)

    def report(self, dense: Dense, compressed: Compressed, costs: Costs, points: Sequence[Point] = ()) -> Report:
        """Make the report, and write its files into the folder."""
        report = Report(
            dense=costs.dense,
            compressed=costs.compressed,
            before_recovery=_number(self.metric, compressed.before_recovery),
            history=tuple(self._finite(epoch) for epoch in compressed.history),
            layers=compare_layers(
                dict(dense.modules[0].named_parameters()), dict(compressed.module.named_parameters())
            ),
            settings=dict(self.settings),
            metric=self.metric,
            val_metric=self.val_metric,
            metric_mode=self.metric_mode,
            busy=costs.busy,
            points=tuple(replace(one, test_metric=_number(self.metric, one.test_metric)) for one in points),
            command=self.command,
            called=self.called,
        )
        write_report(report, self.folder, figure=can_draw())
        if can_write_page():
            write_report_page(report, self.folder)
        return report

    # ------------------------------------------------------------------ parts of stages

    def _train_dense(
        self, modules: Sequence[LightningModule], options: Mapping[str, Any], recorder: Recorder | None
    ) -> None:
        for number, module in enumerate(modules):
            seed_everything(self.seed + number, workers=True, verbose=False)
            rank_zero_info(f"Dense training{f', {number + 1} of {len(modules)}' if len(modules) > 1 else ''}.")
            epochs = int(options.get("max_epochs") or 0)
            shown = options.get("enable_progress_bar", True)
            bar = self._bar(number * epochs, len(modules) * epochs) if shown else []
            trainer = trainer_of(
                self.make_trainer,
                **options,
                callbacks=[recorder, *bar] if number == 0 and recorder is not None else bar,
                logger=False,
                enable_checkpointing=False,
            )
            trainer.fit(module, datamodule=self.datamodule)

    def _bar(self, before: int, of_the_dense: int, others: Sequence[Callback] = ()) -> list[Callback]:
        if self.epochs is None or self.epochs < 0 or any(isinstance(one, ProgressBar) for one in others):
            return []
        return [RunProgress(before, of_the_dense + self.epochs)]

    def _test(self, module: LightningModule, **options: Any) -> float | None:
        if self.metric is None:
            return None
        return accuracy(module, self.datamodule, self.make_trainer, self.metric, **options)

    def _finite(self, epoch: Epoch) -> Epoch:
        """Return the record of an epoch without numbers that are NaN or infinite."""
        numbers = {name: value for name, value in epoch.numbers.items() if _number(name, value) is not None}
        return replace(epoch, val_metric=_number(self.val_metric, epoch.val_metric), numbers=numbers)

    def _round(self, module: LightningModule) -> None:
        """Round the weights as a compressed file does. Every rank writes and loads a file of its own."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / SMALL
            save_compressed(module, path, half=True)
            load_compressed(path, module)


def _number(metric: str | None, value: float | None) -> float | None:
    return finite(metric, value, otherwise="the report leaves it out")


@rank_zero_only
def _save_dense(module: LightningModule, path: str) -> None:
    with replacing(path) as temporary:
        torch.save({"state_dict": module.state_dict()}, temporary)
