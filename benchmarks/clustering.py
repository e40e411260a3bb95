"""How many values does a network need? LeNet-300-100 on MNIST with k shared values per layer, from one dense network.

Error in % on the 10,000 test images, right after clustering and after tuning the shared values; all 60,000 training
images train. The three beginnings of the k-means are compared, on the dense network and on one with 8 % of its weights
left, and the two rules for gradients under SGD.

    python benchmarks/clustering.py --root data/mnist --seed 0
    python benchmarks/clustering.py --root data/mnist --rules --clusters 4 16 --dense-epochs 3 --epochs 1
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_compress import IterativePruningCallback, WeightClusteringCallback
from lightning_compress.baselines import MNIST, Classifier, LeNet300
from lightning_compress.clustering.kmeans import Init

CLUSTERS = (2, 3, 4, 8, 16, 32, 256)


def fit(network: LeNet300, data: MNIST, epochs: int, callbacks: list[Callback], **options: Any) -> LightningModule:
    module = Classifier(network, input_shape=(1, 28, 28), **options)
    seed_everything(data.seed, verbose=False)
    trainer(max_epochs=epochs, callbacks=callbacks).fit(module, data.train_dataloader())
    return module


def trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **(quiet | options))


def error(module: LightningModule, data: MNIST) -> float:
    return 100 * (1 - trainer().test(module, data, verbose=False)[0]["test_acc"])


class AtOnce(Callback):
    """Measures the error before the first step of tuning."""

    def __init__(self, data: MNIST) -> None:
        self.data = data
        self.error = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.error = error(Classifier(copy.deepcopy(pl_module.network), input_shape=(1, 28, 28)), self.data)


def clustered(network: LeNet300, data: MNIST, epochs: int, clustering: WeightClusteringCallback, **options: Any) -> str:
    at_once = AtOnce(data)
    module = fit(copy.deepcopy(network), data, epochs, [clustering, at_once], **options)
    return f"{at_once.error:.2f} -> {error(module, data):.2f}"


def inits(networks: dict[str, LeNet300], data: MNIST, epochs: int, clusters: list[int]) -> Table:
    table = Table("network", "k", *get_args(Init))
    for name, network in networks.items():
        for k in clusters:
            errors = [
                clustered(
                    network,
                    data,
                    epochs,
                    WeightClusteringCallback(k, init=init, gradient="sum"),
                    optimizer="adam",
                    lr=1e-4,
                )
                for init in get_args(Init)
            ]
            table.add_row(name, str(k), *errors)
            Console().print(name, k, *errors)
    return table


def rules(network: LeNet300, data: MNIST, epochs: int, clusters: list[int]) -> Table:
    rates = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    table = Table("k", "gradient", *[f"SGD, lr {rate:g}" for rate in rates], "Adam, lr 1e-4")
    for k in clusters:
        for rule in ("sum", "mean"):
            cells = []
            for optimizer, rate in [*(("sgd", rate) for rate in rates), ("adam", 1e-4)]:
                clustering = WeightClusteringCallback(k, gradient=rule)
                cells.append(clustered(network, data, epochs, clustering, optimizer=optimizer, lr=rate))
            table.add_row(str(k), rule, *cells)
            Console().print(k, rule, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--clusters", type=int, nargs="+", default=list(CLUSTERS))
    parser.add_argument("--rules", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    data = MNIST(root=arguments.root, val_size=0, batch_size=128, seed=arguments.seed)
    data.prepare_data()
    data.setup()
    seed_everything(arguments.seed, verbose=False)
    dense = fit(LeNet300(), data, arguments.dense_epochs, [], optimizer="adam", lr=1e-3)
    Console().print(f"dense: {error(dense, data):.2f} %")
    networks = {"dense": dense.network}
    if arguments.rules:
        Console().print(rules(dense.network, data, arguments.epochs, arguments.clusters))
        return
    pruning = IterativePruningCallback(0.92)
    pruned = fit(copy.deepcopy(dense.network), data, arguments.dense_epochs, [pruning], optimizer="adam", lr=1e-3)
    Console().print(f"8 % left: {error(pruned, data):.2f} %")
    networks["8 % left"] = pruned.network
    Console().print(inits(networks, data, arguments.epochs, arguments.clusters))


if __name__ == "__main__":
    main()
