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
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_compress.coding import load_compressed, save_compressed
from lightning_compress.coding.container import Coder, make_writer
from lightning_compress.coding.footprint import footprint
from lightning_compress.core.files import replacing
from lightning_compress.core.footprint import compare_latency
from lightning_compress.core.inputs import to_device
from lightning_compress.report import Measurement, Report, compare_layers, write_report
from lightning_compress.tasks.inputs import example_inputs
from lightning_compress.tasks.recorder import Recorder
from lightning_compress.tasks.testing import accuracy, check_tested, quietly, trainer_of
from lightning_compress.tasks.weights import load_weights

log = logging.getLogger(__name__)

DENSE, COMPRESSED, SMALL = "dense.ckpt", "compressed.ckpt", "compressed.lcz"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: where its data, its Trainers and its numbers come from, and the folder it writes into.

    Attributes:
        datamodule: Training, validation and test data.
        make_trainer: Makes a Trainer; its keyword arguments stand over the configured ones.
        folder: Where dense.ckpt, compressed.ckpt, compressed.lcz and the report go.
        seed: Root of everything random.
        metric: Test accuracy, under the name by which `test_step` logs it; None: nothing is tested.
        val_metric: Validation accuracy, likewise.
        batch_size: Samples in the forward pass that is timed.
        repeats: Forward passes that the latency is the median of.
        coder: Of compressed.lcz, as in `save_compressed`.
        half: Whether its floats are rounded to float16. The compressed network is then the rounded one, everywhere.
        settings: What the report says the run was started with.
    """

    datamodule: LightningDataModule
    make_trainer: Callable[..., Trainer]
    folder: Path
    seed: int = 0
    metric: str | None = "test_acc"
    val_metric: str = "val_acc"
    batch_size: int = 64
    repeats: int = 200
    coder: Coder = "ans"
    half: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def compress(
        self,
        module: LightningModule,
        *,
        callbacks: Sequence[Callback],
        loggers: Sequence[Logger] = (),
        wrap: Callable[[LightningModule], LightningModule] = lambda module: module,
        dense: Mapping[str, Any],
        weights: str | Path | None = None,
        ckpt_path: str | Path | None = None,
    ) -> Report | None:
        """Get the dense network, train a copy of it with the techniques, measure both, and write the report.

        Args:
            module: The untrained network; it becomes the dense one.
            callbacks: Of the compression.
            loggers: Of the compression.
            wrap: Gives the copy its wrappers.
            dense: The Trainer's arguments for the dense training.
            weights: Dense weights to load, instead of the dense training.
            ckpt_path: A checkpoint of this run's compression to go on with; the dense network is that in the folder.

        Returns:
            The report on rank 0, None on the others.

        Raises:
            FileNotFoundError: `weights`, or the folder's dense.ckpt of a run to go on with, does not exist.
            ValueError: The module has no test_step, or does not log the metric; the weights don't fit; no such coder.
        """
        make_writer(self.coder)  # an unknown one shows now, not hours later
        if self.metric is not None:
            check_tested(module, self.metric)
        recorder = Recorder(self.val_metric)
        self.folder.mkdir(parents=True, exist_ok=True)
        if ckpt_path is not None:
            load_weights(module, self.folder / DENSE)
        elif weights is not None:
            load_weights(module, weights)
        else:
            self._accuracy(module, limit_test_batches=1)  # what is wrong with data or metric shows now, not hours later
            seed_everything(self.seed, workers=True, verbose=False)
            rank_zero_info("Dense training.")
            trainer = trainer_of(
                self.make_trainer, **dense, callbacks=[recorder], logger=False, enable_checkpointing=False
            )
            trainer.fit(module, datamodule=self.datamodule)
        dense_accuracy = self._accuracy(module)
        _save_dense(module, self.folder / DENSE)

        compressed = wrap(copy.deepcopy(module))
        seed_everything(self.seed, workers=True, verbose=False)  # the same, whether the dense network was loaded or not
        rank_zero_info("Compression.")
        trainer = trainer_of(self.make_trainer, callbacks=[*callbacks, recorder], logger=list(loggers) or False)
        trainer.fit(compressed, datamodule=self.datamodule, ckpt_path=ckpt_path)
        before_recovery = None
        if recorder.snapshot is not None:
            snapshot = copy.deepcopy(compressed)
            with quietly("lightning_compress.core.reshaping", logging.ERROR):  # it is wider, of course
                snapshot.load_state_dict(recorder.snapshot)
            before_recovery = self._accuracy(snapshot)
        if self.half:
            self._round(compressed)
        compressed_accuracy = self._accuracy(compressed)
        trainer.save_checkpoint(self.folder / COMPRESSED, weights_only=True)
        if not trainer.is_global_zero:
            return None
        costs = self._costs(module, compressed, trainer.strategy.root_device)
        size = save_compressed(compressed, self.folder / SMALL, coder=self.coder, half=self.half)
        report = Report(
            dense=replace(costs["dense"], test_accuracy=dense_accuracy),
            compressed=replace(costs["compressed"], test_accuracy=compressed_accuracy, file_bytes=size.bytes),
            before_recovery=before_recovery,
            history=tuple(recorder.history),
            layers=compare_layers(dict(module.named_parameters()), dict(compressed.named_parameters())),
            settings=dict(self.settings),
        )
        write_report(report, self.folder, figure=can_draw())
        return report

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
    ) -> dict[str, Measurement]:
        inputs = to_device(example_inputs(dense, self.datamodule, batch_size=self.batch_size), device)
        networks = {"dense": dense.to(device), "compressed": compressed.to(device)}
        latency = compare_latency({name: (network, inputs) for name, network in networks.items()}, repeats=self.repeats)
        return {
            name: Measurement.from_footprint(
                footprint(network, inputs, repeats=1), test_accuracy=None, latency=latency[name]
            )
            for name, network in networks.items()
        }


def can_draw() -> bool:
    """Whether matplotlib is there; where it is not, a warning says what to install."""
    found = find_spec("matplotlib") is not None
    if not found:
        log.warning("No figure is drawn without matplotlib: pip install 'lightning-compress[figures]'.")
    return found


@rank_zero_only
def _save_dense(module: LightningModule, path: Path) -> None:
    with replacing(path) as temporary:
        torch.save({"state_dict": module.state_dict()}, temporary)
