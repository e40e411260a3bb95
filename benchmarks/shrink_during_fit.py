"""Does the rest of the training get faster? The last epoch after half of the channels left, against masks and dense.

DigitsConvNet on random images. The channels go at the end of the first epoch; the last of three is timed. All variants
take turns within every round; ratios are of the same round, and their medians stand beside the ratio of the MACs. A
network that was built with half of the widths says what can be reached: norms and activations halve, MACs quarter.

    python benchmarks/shrink_during_fit.py --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from epoch_overhead import Stopwatch
from lightning.pytorch import Callback, Trainer
from mnist_pruning import silence
from rich.console import Console
from rich.table import Table

from lightning_compress import IterativePruningCallback
from lightning_compress.baselines import Classifier, DigitsConvNet, TensorLoader
from lightning_compress.measure.macs import count_macs
from lightning_compress.pruning.criteria.choose import Shrink

ALLOWED = 0.15  # beyond the ratio of the MACs


def pruning(shrink: Shrink) -> Callable[[], list[Callback]]:
    return lambda: [
        IterativePruningCallback(
            0.5, granularity="neuron", scope="layer", schedule="one_shot", start_epoch=1.0, shrink=shrink
        )
    ]


VARIANTS: dict[str, tuple[float, Callable[[], list[Callback]]]] = {  # width from the start, and callbacks
    "dense": (1.0, list),
    'shrink="never" (masks)': (1.0, pruning("never")),
    'shrink="during_fit"': (1.0, pruning("during_fit")),
    "built with half of the widths": (0.5, list),
}


def last_epoch(callbacks: list[Callback], *, width: int, samples: int, batch: int) -> tuple[float, int]:
    """Return the seconds of the last epoch, and the MACs of the network that trained in it."""
    torch.manual_seed(0)
    x, y = torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,))
    module = Classifier(DigitsConvNet(in_channels=3, width=width, image_size=32), input_shape=(3, 32, 32))
    watch = Stopwatch()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[*callbacks, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, TensorLoader(x, y, batch_size=batch, shuffle=True))
    return watch.seconds[-1][0], count_macs(module.network, x[:1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    silence()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    macs: dict[str, int] = {}
    for _ in range(arguments.rounds):
        for name, (share, callbacks) in VARIANTS.items():
            width = round(share * arguments.width)
            elapsed, macs[name] = last_epoch(callbacks(), width=width, samples=arguments.samples, batch=arguments.batch)
            seconds[name].append(elapsed)

    dense, masked, *_ = VARIANTS
    table = Table(title="The last epoch, half of the channels gone since the first")
    for column in ("variant", "seconds", "to dense", "to masks", "MACs, ratio", "rounds, to masks"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, mine in seconds.items():
        ratios = {other: [a / b for a, b in zip(mine, seconds[other], strict=True)] for other in (dense, masked)}
        table.add_row(
            name,
            f"{statistics.median(mine):.2f}",
            *(f"{statistics.median(of):.3f}" for of in ratios.values()),
            f"{macs[name] / macs[dense]:.3f}",
            f"{min(ratios[masked]):.3f} to {max(ratios[masked]):.3f}",
        )
    table.caption = f"Aim: to masks at most the ratio of the MACs + {ALLOWED:.0%}."
    console = Console(width=120)
    console.print(table)
    console.print(f"load after: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
