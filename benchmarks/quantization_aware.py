"""How few bits does LeNet-5 need on MNIST? After training, and with some epochs of training that see the bits.

One dense network, one seed. Every row begins with its weights: "after training" puts weights on grids and calibrates
those of inputs on 20 training batches, nothing more; "trained" goes on for a few epochs with the callback, and the row
"float" goes on as long without it. Error in % on the 10,000 test images; bytes are those of the compressed file.

    python benchmarks/quantization_aware.py --root data/mnist
    python benchmarks/quantization_aware.py --overhead --samples 12800 --rounds 3
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress import QuantizationAwareTrainingCallback, save_compressed
from lightning_compress.baselines import MNIST, Classifier, LeNet5, TensorLoader
from lightning_compress.quantization.observers import ObservedInputs
from lightning_compress.quantization.weights import quantize_weights

SETTINGS: dict[str, tuple[int, int | None]] = {
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W4A4": (4, 4),
    "W3A8": (3, 8),
    "W2A8": (2, 8),
    "W2A2": (2, 2),
    "W2, inputs real": (2, None),
}


def trainer(**options: object) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, **(quiet | options))  # type: ignore[arg-type]


def fit(network: nn.Module, data: MNIST, epochs: int, lr: float, *callbacks: Callback) -> nn.Module:
    module = Classifier(network, input_shape=(1, 28, 28), lr=lr)
    seed_everything(data.seed, verbose=False)
    trainer(max_epochs=epochs, callbacks=list(callbacks)).fit(module, data.train_dataloader())
    return network


def error(network: nn.Module, data: MNIST) -> float:
    module = Classifier(network, input_shape=(1, 28, 28))
    return float(100 * (1 - trainer().test(module, data, verbose=False)[0]["test_acc"]))


def after_training(network: nn.Module, data: MNIST, weight_bits: int, activation_bits: int | None) -> nn.Module:
    quantize_weights(network, weight_bits)
    if activation_bits is not None:
        layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        inputs = ObservedInputs(network, layers, activation_bits)
        for x, _ in itertools.islice(data.train_dataloader(), 20):
            with torch.no_grad():
                network.train()(x)
            inputs.update(inputs.seen())
    return network


def size(network: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_compressed(network, Path(folder) / "network.lcz").bytes


def errors(options: argparse.Namespace) -> None:
    data = MNIST(root=options.root, val_size=0, batch_size=128, seed=options.seed)
    data.prepare_data()
    data.setup()
    seed_everything(options.seed, verbose=False)
    dense = fit(LeNet5(), data, options.dense_epochs, 1e-3)
    console = Console()
    console.print(f"dense: {error(dense, data):.2f} %, {size(dense)} bytes")
    tuned = fit(copy.deepcopy(dense), data, options.epochs, options.lr)
    console.print(f"float, trained on: {error(tuned, data):.2f} %")
    table = Table("bits", "after training", "trained", "bytes, after training", "bytes, trained")
    for name in options.bits:
        weight_bits, activation_bits = SETTINGS[name]
        at_once = after_training(copy.deepcopy(dense), data, weight_bits, activation_bits)
        callback = QuantizationAwareTrainingCallback(weight_bits, activation_bits)
        trained = fit(copy.deepcopy(dense), data, options.epochs, options.lr, callback)
        row = [
            name,
            *(f"{error(one, data):.2f}" for one in (at_once, trained)),
            *map(str, map(size, (at_once, trained))),
        ]
        table.add_row(*row)
        console.print(*row)
    console.print(table)


class Stopwatch(Callback):
    """Notes the wall-clock and CPU seconds of every training epoch."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append((time.perf_counter() - self._start[0], time.process_time() - self._start[1]))


VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "bare": list,
    "W8": lambda: [QuantizationAwareTrainingCallback(8, None)],
    "W4": lambda: [QuantizationAwareTrainingCallback(4, None)],
    "A8": lambda: [QuantizationAwareTrainingCallback(None, 8)],
    "W8A8": lambda: [QuantizationAwareTrainingCallback(8, 8)],
}


def overhead(options: argparse.Namespace) -> None:
    x, y = torch.randn(options.samples, 1, 28, 28), torch.randint(10, (options.samples,))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, make in VARIANTS.items():
            watch = Stopwatch()
            torch.manual_seed(0)
            module = Classifier(LeNet5(), input_shape=(1, 28, 28))
            trainer(max_epochs=2, callbacks=[*make(), watch]).fit(module, TensorLoader(x, y, batch_size=128))
            seconds[name].append(watch.seconds[1])
    table = Table("callback", "wall s", "wall, ratio to bare", "CPU s", "CPU, ratio to bare")
    for name, mine in seconds.items():
        row = [name]
        for clock in (0, 1):
            ratios = [a[clock] / b[clock] for a, b in zip(mine, seconds["bare"], strict=True)]
            row += [f"{statistics.median(s[clock] for s in mine):.3f}", f"{statistics.median(ratios):.3f}"]
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--dense-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--overhead", action="store_true", help="what an epoch costs, instead of errors")
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    overhead(options) if options.overhead else errors(options)


if __name__ == "__main__":
    main()
