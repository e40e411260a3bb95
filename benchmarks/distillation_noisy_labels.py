"""Noisy labels: does a teacher that saw the same noise protect a student of 30 hidden units from it?

5,000 training images of MNIST; with probability 1/2 a label is replaced by one of the ten, drawn uniformly, so that
45 % of them are wrong. The student, 784-30-10, learns the noise by heart. The teacher, 784-1200-1200-10 with dropout
and images jittered by up to two pixels, can't. Three students: alone; distilled by a teacher of the same noisy labels,
so that nobody saw a clean one; distilled by a teacher of the clean labels of the same images. What is counted are the
errors of the last epoch's networks on the 10,000 test images, whose labels are clean.

    python benchmarks/distillation_noisy_labels.py --root data/mnist --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from distilling import arguments, measure, test_errors, train
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.baselines import MLP, MNIST
from lightning_compress.baselines.datamodule import stratified_order


class Noisy(MNIST):
    """A part of MNIST's training images, each label replaced with a probability by one drawn from the ten."""

    def __init__(self, *, images: int, noise: float, **settings: Any) -> None:
        super().__init__(val_size=0, normalize=False, **settings)
        self.images, self.noise = images, noise

    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        (images, labels), test = super().read()
        some = stratified_order(labels, seed=self.seed)[: self.images]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(10, (len(some),), generator=generator)
        replaced = torch.rand(len(some), generator=generator) < self.noise
        return (images[some], torch.where(replaced, drawn, labels[some])), test


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    def data(noise: float, shift: int = 0) -> MNIST:
        seed_everything(seed, verbose=False)
        return Noisy(root=options.root, images=options.images, noise=noise, seed=seed, shift=shift)

    def teacher(noise: float) -> nn.Module:
        seen = data(noise, shift=2)
        network = MLP(widths=(784, 1200, 1200, 10), dropout=0.5, input_dropout=0.2)
        return train(network, seen, epochs=options.teacher_epochs, lr=1e-3, precision=options.precision)

    def student(taught_by: nn.Module | None) -> nn.Module:
        seen = data(options.noise)
        settings = {"alpha": options.alpha, "temperature": options.temperature, "precision": options.precision}
        return train(MLP(widths=(784, 30, 10)), seen, epochs=options.epochs, lr=3e-3, teacher=taught_by, **settings)

    clean = data(0.0)
    clean.setup()
    row: dict[str, Any] = {"alone": test_errors(student(None), clean)}
    for name, noise in (("noisy", options.noise), ("clean", 0.0)):
        taught_by = teacher(noise)
        row[f"teacher of {name} labels"] = test_errors(taught_by, clean)
        row[f"distilled by it, {name}"] = test_errors(student(taught_by), clean)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=1.0)
    options = parser.parse_args()
    console = Console()
    rows = measure(one_seed, options, console)

    title = f"MNIST, {options.images:,} images, {options.noise:.0%} of the labels drawn at random"
    table = Table("network", "test error %, by seed", "median", title=title)
    for name in rows[0]:
        if name != "seconds":
            found = [row[name] / 100 for row in rows]
            table.add_row(name, " ".join(f"{one:.2f}" for one in found), f"{statistics.median(found):.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
