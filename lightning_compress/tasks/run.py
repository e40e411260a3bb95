"""The main job: a dense network, the compressed one that comes of it, and both measured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.coding import save_compressed
from lightning_compress.coding.footprint import footprint
from lightning_compress.core.files import replacing
from lightning_compress.core.footprint import compare_latency
from lightning_compress.core.inputs import to_device
from lightning_compress.report import Measurement, Report, compare_layers, write_report
from lightning_compress.tasks.inputs import example_inputs
from lightning_compress.tasks.recorder import Recorder
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
            ValueError: The module has no test_step, or does not log the metric; the weights don't fit.
        """
        if self.metric is not None and not is_overridden("test_step", module):
            raise ValueError(
                f"{type(module).__name__} has no test_step that logs {self.metric!r}: write one, or set metric=null to "
                f"compare costs only."
            )
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
            trainer = self._trainer(**dense, callbacks=[recorder], logger=False, enable_checkpointing=False)
            trainer.fit(module, datamodule=self.datamodule)
        dense_accuracy = self._accuracy(module)
        _save_dense(module, self.folder / DENSE)

        compressed = wrap(copy.deepcopy(module))
        seed_everything(self.seed, workers=True, verbose=False)  # the same, whether the dense network was loaded or not
        rank_zero_info("Compression.")
        trainer = self._trainer(callbacks=[*callbacks, recorder], logger=list(loggers) or False)
        trainer.fit(compressed, datamodule=self.datamodule, ckpt_path=ckpt_path)
        before_recovery = None
        if recorder.snapshot is not None:
            snapshot = copy.deepcopy(compressed)
            with _quietly("lightning_compress.core.reshaping", logging.ERROR):  # it is wider, of course
                snapshot.load_state_dict(recorder.snapshot)
            before_recovery = self._accuracy(snapshot)
        compressed_accuracy = self._accuracy(compressed)
        trainer.save_checkpoint(self.folder / COMPRESSED, weights_only=True)
        if not trainer.is_global_zero:
            return None
        costs = self._costs(module, compressed, trainer.strategy.root_device)
        report = Report(
            dense=replace(costs["dense"], test_accuracy=dense_accuracy),
            compressed=replace(costs["compressed"], test_accuracy=compressed_accuracy),
            before_recovery=before_recovery,
            history=tuple(recorder.history),
            layers=compare_layers(dict(module.named_parameters()), dict(compressed.named_parameters())),
            settings=dict(self.settings),
        )
        save_compressed(compressed, self.folder / SMALL)
        write_report(report, self.folder, figure=can_draw())
        return report

    def _accuracy(self, module: LightningModule, **options: Any) -> float | None:
        if self.metric is None:
            return None
        trainer = self._trainer(
            **options,
            callbacks=[],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,  # Lightning's repeats samples until all ranks have equally many
        )
        logged: dict[str, float] = {}
        for of_loader in trainer.test(module, self.datamodule, verbose=False):
            logged |= of_loader
        if self.metric not in logged:
            raise ValueError(
                f"metric={self.metric!r} is not logged by the test_step of {type(module).__name__}, which logs "
                f"{', '.join(logged) or 'nothing'}."
            )
        return logged[self.metric]

    def _trainer(self, **options: Any) -> Trainer:
        with _quietly("lightning.pytorch"):  # it tells with every Trainer of accelerators, and what one could install
            return self.make_trainer(**options)

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


@contextmanager
def _quietly(name: str, level: int = logging.WARNING) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


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
