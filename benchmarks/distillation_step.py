"""What does distilling cost? Epochs of a student with its teacher, against the bare student plus the teacher's forward.

All variants take turns within every round; the table holds medians of the rounds, in CPU seconds. "teacher" is the
forward pass alone, over the same batches, without gradients and in evaluation mode; "by hand" is a training_step that
asks the teacher itself, with torch's kl_div. The sum of bare and teacher knows nothing of the loss, nor of two networks
that take turns in the processor's cache.

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
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress import DistillationModule
from lightning_compress.baselines import MLP, Classifier, LeNet300, ResNet20, TensorLoader

BATCH = 128


def mlp(width: int) -> MLP:
    return MLP(widths=(784, width, width, 10))


PAIRS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...], int, list[dict[str, Any]]]
] = {
    "MLP 2x1200 -> LeNet-300-100": (LeNet300, lambda: mlp(1200), (1, 28, 28), 25_600, []),
    "MLP 2x1200 -> MLP 2x800": (lambda: mlp(800), lambda: mlp(1200), (1, 28, 28), 12_800, []),
    "ResNet-20, width 32 -> 8": (lambda: ResNet20(width=8), lambda: ResNet20(width=32), (3, 32, 32), 1_280, []),
    "the same, attention transfer": (
        lambda: ResNet20(width=8),
        lambda: ResNet20(width=32),
        (3, 32, 32),
        1_280,
        [
            {"student": f"network.{name}", "teacher": name, "loss": "attention_transfer"}
            for name in ("stages.0", "stages.2")
        ],
    ),
}


class Stopwatch(Callback):
    """Notes the CPU seconds of every training epoch, which other processes disturb less than the clock."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(-time.process_time())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds[-1] += time.process_time()


def epoch(module: LightningModule, loader: TensorLoader) -> float:
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


class ByHand(Classifier):
    """What a user would write."""

    def __init__(self, network: nn.Module, teacher: nn.Module) -> None:
        super().__init__(network)
        self.teachers = [teacher]  # a list hides it from the module

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        with torch.no_grad():
            p = (self.teachers[0](inputs) / 4.0).softmax(1)
        logits = self(inputs)
        divergence = F.kl_div((logits / 4.0).log_softmax(1), p, reduction="batchmean") * 16.0
        loss = 0.1 * F.cross_entropy(logits, targets) + 0.9 * divergence
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train_loss", loss, prog_bar=True)
            self.log("distillation_loss", divergence, prog_bar=True)
        return loss


def forward(teacher: nn.Module, loader: TensorLoader) -> float:
    """The teacher's outputs for an epoch's batches, which the bare epoch has fetched already."""
    batches = [inputs for inputs, _ in loader]
    with torch.no_grad():
        start = time.process_time()
        for inputs in batches:
            teacher(inputs)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(PAIRS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)

    table = Table(
        "teacher -> student", "bare s", "teacher s", "by hand s", "ours s", "ours / sum", "min to max", "ours / by hand"
    )
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
            by_hand = epoch(ByHand(make_student(), teacher), loader)
            ours = epoch(DistillationModule(Classifier(make_student()), teacher, hints=hints), loader)
            rounds.append((bare, alone, by_hand, ours))
        ratios = [ours / (bare + alone) for bare, alone, _, ours in rounds]
        seconds = [f"{statistics.median(column):.3f}" for column in zip(*rounds, strict=True)]
        peer = statistics.median(ours / by_hand for _, _, by_hand, ours in rounds)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        table.add_row(name, *seconds, f"{statistics.median(ratios):.3f}", spread, "" if hints else f"{peer:.3f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
