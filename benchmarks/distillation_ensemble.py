"""Is an ensemble a better teacher than one network? LeNet-300-100 on MNIST, taught by networks of its own kind.

The teachers differ by their seed only and see images jittered by up to two pixels; the ensemble's prediction is the
mean of their probabilities. The student has their architecture, sees the images as they are and trains on soft targets
only. All 60,000 training images train; what is counted are the errors of the last epoch's networks on the 10,000 test
images.

    python benchmarks/distillation_ensemble.py --root data/mnist --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from distilling import arguments, errors, measure, scores, test_errors, train
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress.baselines import MNIST, LeNet300


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    def trained(draw: int, *, shift: int, teachers: list[nn.Module]) -> nn.Module:
        seed_everything(draw, verbose=False)
        data = MNIST(root=options.root, val_size=0, seed=draw, shift=shift)
        settings = {"lr": 1e-3, "precision": options.precision, "temperature": options.temperature}
        return train(LeNet300(), data, epochs=options.epochs, teacher=teachers or None, **settings)

    data = MNIST(root=options.root, val_size=0)
    data.setup()
    test_part = data.test_dataloader()
    sizes = sorted(set(options.teachers))
    teachers = [trained(1000 * (seed + 1) + i, shift=2, teachers=[]) for i in range(sizes[-1])]
    found = torch.stack([scores(teacher, test_part.inputs).softmax(1) for teacher in teachers])
    row: dict[str, Any] = {"alone": test_errors(trained(seed, shift=0, teachers=[]), data)}
    for size in sizes:
        row[f"{size} teachers"] = errors(found[:size].mean(0), test_part.targets)
        row[f"student of {size}"] = test_errors(trained(seed, shift=0, teachers=teachers[:size]), data)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=4.0)
    options = parser.parse_args()
    console = Console()
    rows = measure(one_seed, options, console)

    title = f"LeNet-300-100, MNIST, T = {options.temperature:g}: test errors"
    table = Table("teachers", "theirs, by seed", "median", "the student's, by seed", "median", title=title)
    alone = [row["alone"] for row in rows]
    table.add_row("none", "", "", " ".join(map(str, alone)), f"{statistics.median(alone):g}")
    for size in sorted(set(options.teachers)):
        theirs, own = ([row[key] for row in rows] for key in (f"{size} teachers", f"student of {size}"))
        cells = [cell for counts in (theirs, own) for cell in (" ".join(map(str, counts)), statistics.median(counts))]
        table.add_row(str(size), *map(str, cells))
    console.print(table)


if __name__ == "__main__":
    main()
