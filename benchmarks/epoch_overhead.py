"""What does a callback cost? Epochs of a LeNet at batch 128: bare Lightning, Lightning's ModelPruning, ours.

All variants take turns within every round, so that they see the same machine; the table holds medians of the rounds, of
wall-clock time and of CPU time, which a busy machine disturbs less.

    python benchmarks/epoch_overhead.py --rounds 7
    python benchmarks/epoch_overhead.py --network lenet5 --samples 12800 --only clustering "pruning, clustering"
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
from lightning.pytorch.callbacks import ModelPruning
from rich.console import Console
from rich.table import Table

from lightning_compress import IterativePruningCallback, WeightClusteringCallback
from lightning_compress.baselines import Classifier, LeNet5, LeNet300, TensorLoader

BATCH = 128
NETWORKS = {"lenet300": LeNet300, "lenet5": LeNet5}


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


def ours(**options: Any) -> Callable[[], list[Callback]]:
    return lambda: [IterativePruningCallback(11 / 12, end_epoch=2.0, **options)]


VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "bare Lightning": list,
    "ModelPruning (Lightning)": lambda: [ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=False)],
    "magnitude": ours(),
    "magnitude, every 100 steps": ours(every_n_steps=100),
    "magnitude, regrow": ours(regrow=True),
    "taylor": ours(criterion="taylor"),
    "obd": ours(criterion="obd"),
    "fisher": ours(criterion="fisher"),
    "ewc": ours(criterion="ewc"),
    "mas": ours(criterion="mas"),
    "si": ours(criterion="si"),
    "apoz, neurons": ours(criterion="apoz", granularity="neuron", scope="layer"),
    "taylor, neurons": ours(criterion="taylor", granularity="neuron", scope="layer"),
    "clustering": lambda: [WeightClusteringCallback(16)],
    "clustering, 256": lambda: [WeightClusteringCallback(256)],
    "clustering, global": lambda: [WeightClusteringCallback(16, scope="global")],
    "pruning, clustering": lambda: [*ours()(), WeightClusteringCallback(16)],
}


def seconds_per_epoch(make_callbacks: Callable[[], list[Callback]], network: str, samples: int) -> tuple[float, float]:
    """Fit three epochs: the second is timed, with a pruning event in it, and masks in force since the first."""
    torch.manual_seed(0)
    x, y = torch.randn(samples, 1, 28, 28), torch.randint(10, (samples,))
    watch = Stopwatch()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[*make_callbacks(), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(NETWORKS[network](), input_shape=(1, 28, 28))
    trainer.fit(module, TensorLoader(x, y, batch_size=BATCH, shuffle=True))
    return watch.seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--network", choices=list(NETWORKS), default="lenet300")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    torch.set_num_threads(arguments.threads)
    chosen = {name: VARIANTS[name] for name in VARIANTS if name in arguments.only or name == "bare Lightning"}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(arguments.rounds):
        for name, make_callbacks in chosen.items():
            seconds[name].append(seconds_per_epoch(make_callbacks, arguments.network, arguments.samples))

    table = Table("callback", "wall s", "wall, ratio to bare", "CPU s", "CPU, ratio to bare", "min to max")
    for name, mine in seconds.items():
        row = [name]
        for clock in (0, 1):
            ratios = [a[clock] / b[clock] for a, b in zip(mine, seconds["bare Lightning"], strict=True)]
            row += [f"{statistics.median(s[clock] for s in mine):.3f}", f"{statistics.median(ratios):.3f}"]
        table.add_row(*row, f"{min(ratios):.3f} to {max(ratios):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
