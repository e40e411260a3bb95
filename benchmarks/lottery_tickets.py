"""Does a winning ticket train faster than new weights on the same mask, and which part of it matters: values or signs?

LeNet-300-100 on MNIST with the recipe of Frankle and Carbin (Adam at 1.2e-3, batches of 60, Glorot's normal weights). A
network is trained and pruned in `--rounds` rounds, layer by layer, the output layer at half the rate, down to the 3.6
% of weights that 15 rounds of 20 % leave. Before the last training the survivors get their initial values (the ticket),
values drawn anew, permuted or constant ones, each with the signs of the initial weights or with random ones: all on the
same mask. Another control trains the initial weights on a random mask of as many weights in each layer.

Every `--every` steps the loss on 5,000 validation images is noted, and the accuracy on the test images. "Steps" are
those to the lowest validation loss, where the accuracy is read, as in the paper. Rows are medians of the seeds, and
"against the ticket" the median of the differences of pairs with one mask.

    python benchmarks/lottery_tickets.py --data data/mnist --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _rounds import EndOfRound, handed_over
from _support import Setting, data_of, initial, parts, right, trainer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from mnist_pruning import silence
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress import LotteryTicketCallback
from lightning_compress.baselines import Classifier, LeNet300
from lightning_compress.baselines.datamodule import ImageData

LEFT, OUTPUT = 0.8**15, 0.9**15  # of the weights of hidden layers, and of the output layer
RESTARTS = ("rewind", "reinit", "reshuffle", "constant")
TICKET, DENSE, RANDOM = "rewind, signs keep", "dense", "random mask"


def glorot() -> LeNet300:
    network = LeNet300()
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


class Watch(Callback):
    """Notes the validation loss and the test accuracy in a round."""

    def __init__(self, data: ImageData, setting: Setting, every: int) -> None:
        self.data, self.setting, self.every = data, setting, every
        self.noted: list[tuple[float, int, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, (self.val, self.test) = trainer.global_step, parts(self.data, self.setting)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step - self.start
        if step % self.every == 0:
            with torch.no_grad():
                loss = float(F.cross_entropy(pl_module(self.val.inputs), self.val.targets))
                self.noted.append((loss, step, right(pl_module(self.test.inputs), self.test.targets)))

    @property
    def best(self) -> dict[str, float]:
        """The steps to the lowest loss, and the accuracies there and at the end."""
        _, step, accuracy = min(self.noted)
        return {"steps": step, "accuracy": accuracy, "in the end": self.noted[-1][2]}


def ticket_of(arguments: argparse.Namespace, rounds: int, **options: Any) -> LotteryTicketCallback:
    rates = {"network.fc3": 1 - OUTPUT ** (1 / rounds), "*": 1 - LEFT ** (1 / rounds)}
    given: dict[str, Any] = {"rounds": rounds, "round_epochs": arguments.epochs, "rewind": "weights"} | options
    return LotteryTicketCallback(rates, **given)


def fit(setting: Setting, data: ImageData, epochs: int, *callbacks: Any, resume: Path | None = None) -> None:
    recipe: dict[str, Any] = {"optimizer": "adam", "lr": setting.lr, "lr_schedule": "constant"}
    module = Classifier(initial(glorot, setting), input_shape=(1, 28, 28), **recipe)
    seed_everything(setting.seed, verbose=False)
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    trainer(setting, epochs, callbacks=list(callbacks), enable_checkpointing=saves).fit(
        module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None
    )


def one_seed(arguments: argparse.Namespace, setting: Setting, folder: Path) -> dict[str, dict[str, float]]:
    data = data_of(setting)
    rounds, epochs = arguments.rounds, arguments.epochs
    found: dict[str, dict[str, float]] = {}

    def watched(name: str, length: int, *callbacks: Any, resume: Path | None = None) -> None:
        watch = Watch(data, setting, 5 if setting.quick else arguments.every)
        fit(setting, data, length, *callbacks, watch, resume=resume)
        found[name] = watch.best
        print(f"seed {setting.seed}, {name}: {found[name]}", flush=True)

    watched(DENSE, epochs)
    once = ticket_of(arguments, 1, rewind="learning_rate", pretrained=True, criterion="random")
    watched(RANDOM, epochs, once)
    writer, whole = ticket_of(arguments, rounds), (rounds + 1) * epochs
    end = EndOfRound(folder, rounds * epochs)
    fit(setting, data, whole, writer, end)
    for restart in RESTARTS:
        for signs in ("keep", "random"):
            reader = ticket_of(arguments, rounds, restart=restart, signs=signs)
            resume = handed_over(end.path, writer, reader)
            watched(f"{restart}, signs {signs}", whole, reader, resume=resume)
            found[f"{restart}, signs {signs}"]["left"] = 100 * (1 - reader.sparsity)
    return found


def show(seeds: list[dict[str, dict[str, float]]]) -> None:
    table = Table(title=f"LeNet-300-100, MNIST: medians of {len(seeds)} seeds")
    columns = ("steps", "test, %", "in the end", "left, %", "steps by the ticket's", "test against the ticket, points")
    for column in ("", *columns):
        table.add_column(column, justify="left" if column == "" else "right")
    for name in seeds[0]:
        rows, tickets = [one[name] for one in seeds], [one[TICKET] for one in seeds]
        pairs = list(zip(rows, tickets, strict=True))
        numbers = [
            f"{statistics.median(one['steps'] for one in rows):,.0f}",
            f"{statistics.median(one['accuracy'] for one in rows):.2f}",
            f"{statistics.median(one['in the end'] for one in rows):.2f}",
            f"{statistics.median(one.get('left', 100.0) for one in rows):.2f}" if name != RANDOM else "as the ticket",
            f"{statistics.median(one['steps'] / ticket['steps'] for one, ticket in pairs):.2f}",
            f"{statistics.median(one['accuracy'] - ticket['accuracy'] for one, ticket in pairs):+.2f}",
        ]
        table.add_row(name, *numbers)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/mnist")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6, help="of every round: 917 steps each")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here after each")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    seeds, start = [], time.perf_counter()
    for seed in arguments.seeds:
        setting = Setting("mnist", arguments.data, arguments.epochs, 60, 1.2e-3, seed, quick=arguments.quick)
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(one_seed(arguments, setting, Path(folder)))
        if arguments.json:
            arguments.json.write_text(json.dumps(seeds, indent=1))
    show(seeds)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
