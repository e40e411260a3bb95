"""What does distilling cost? Epochs of a student with its teacher, against the bare student plus the teacher's forward.

All variants take turns within every round; the table holds medians of the rounds. "teacher" is the forward pass alone, over
the same batches, without gradients and in evaluation mode; the ratio is with teacher / (bare + teacher).

    python benchmarks/distillation_step.py --rounds 7 --threads 1
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress import DistillationModule
from lightning_compress.baselines import Classifier, LeNet300, ResNet20, TensorLoader

BATCH = 128


class MLP(nn.Sequential):
    def __init__(self, width: int) -> None:
        layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
        super().__init__(nn.Flatten(), *layers)


PAIRS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...], int, list[dict[str, Any]]]
] = {
    "MLP 2x1200 -> LeNet-300-100": (LeNet300, lambda: MLP(1200), (1, 28, 28), 25_600, []),
    "MLP 2x1200 -> MLP 2x800": (lambda: MLP(800), lambda: MLP(1200), (1, 28, 28), 12_800, []),
    "ResNet-20, width 32 -> 8": (lambda: ResNet20(width=8), lambda: ResNet20(width=32), (3, 32, 32), 1_280, []),
    "the same, attention transfer": (
        lambda: ResNet20(width=8),
        lambda: ResNet20(width=32),
        (3, 32, 32),
        1_280,
        [
            {"student": f"network.{name}", "teacher": name, "loss": "attention_transfer"}
            for name in ("stage1", "stage3")
        ],
    ),
}


class Stopwatch(Callback):
    """Notes the wall-clock and CPU seconds of every training epoch."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._start = (0.0, 0.0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wall, cpu = self._start
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))


def epoch(module: LightningModule, loader: TensorLoader) -> tuple[float, float]:
    """The second epoch of a fit, in seconds."""
    watch = Stopwatch()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return watch.seconds[1]


def forward(teacher: nn.Module, loader: TensorLoader) -> tuple[float, float]:
    """The teacher's outputs for an epoch's batches, which the bare epoch has fetched already."""
    batches = [inputs for inputs, _ in loader]
    with torch.no_grad():
        wall, cpu = time.perf_counter(), time.process_time()
        for inputs in batches:
            teacher(inputs)
        return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(PAIRS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)

    table = Table("teacher -> student", "bare s", "teacher s", "with teacher s", "ratio", "min to max", "CPU, ratio")
    for name in arguments.only:
        make_student, make_teacher, shape, samples, hints = PAIRS[name]
        torch.manual_seed(0)
        loader = TensorLoader(
            torch.randn(samples, *shape), torch.randint(10, (samples,)), batch_size=BATCH, shuffle=True
        )
        teacher = make_teacher().eval()
        rounds = []
        for _ in range(arguments.rounds):
            bare = epoch(Classifier(make_student()), loader)
            alone = forward(teacher, loader)
            both = epoch(DistillationModule(Classifier(make_student()), teacher, hints=hints), loader)
            rounds.append((bare, alone, both))
        wall, cpu = ([both[i] / (bare[i] + alone[i]) for bare, alone, both in rounds] for i in (0, 1))
        seconds = [f"{statistics.median(one[i][0] for one in rounds):.3f}" for i in range(3)]
        spread = f"{min(wall):.3f} to {max(wall):.3f}"
        table.add_row(name, *seconds, f"{statistics.median(wall):.3f}", spread, f"{statistics.median(cpu):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
