"""Low rank, clustering and coding of LeNet-300-100 on MNIST, together and each alone: error against bytes of the file.

One dense network is trained for each seed. Then each way goes as far as a file of so many bytes asks, trains on for as
many epochs, and is written, with values in float16; what is tested is the network that the file gives back. Every file
is coded; "coded" alone is the dense network in float16. Control: pruning and clustering.

How far a way goes follows from the dense network, before any training: the largest share of the parameters, the
most clusters, or the least pruning whose file fits. Of two that share the bytes, the number of clusters is the one
whose network of the dense weights answers most like the dense network for validation images (by squares of logits).

    python benchmarks/low_rank_files.py --data data/mnist --seeds 0 1 2 --figure low_rank_files.png
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _fitting import AMOUNTS, CLUSTERS, SHARES, bytes_of, clustered_copy, fitting, pruned_copy
from _support import Found, Setting, answers, classifier, data_of, fit, initial, parts, right, trained
from lightning.pytorch import Callback
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import (
    IterativePruningCallback,
    LowRankCallback,
    WeightClusteringCallback,
    load_compressed,
    lower_rank,
    save_compressed,
)
from lightning_compress.baselines import Classifier, LeNet300, TensorLoader
from lightning_compress.baselines.datamodule import ImageData
from lightning_compress.report.figure import new_figure, tidy

SHAPE = (1, 28, 28)
FEW = (4, 8, 16)  # clusters of two techniques together
Chosen = list[Callback] | None  # None: the way can't get so small


@dataclass(frozen=True)
class Start:
    """The dense network of a seed, and what the ways are chosen by."""

    dense: Classifier
    batches: Sequence[Tensor]
    images: Tensor
    epochs: int
    thin: dict[float, nn.Module] = field(default_factory=dict)

    def thinner(self, share: float) -> nn.Module:
        if share not in self.thin:
            network = copy.deepcopy(self.dense.network)
            lower_rank(network, self.images[:1], budget=share, batches=self.batches)
            self.thin[share] = network
        return self.thin[share]

    def pruned(self, amount: float) -> nn.Module:
        return pruned_copy(self.dense.network, amount)

    def best_of_two(
        self, budget: int, first: Callable[[float], nn.Module], amounts: Sequence[float]
    ) -> tuple[float, int] | None:
        """Return how far the first technique goes and the number of clusters that change the answers least."""
        wanted, found = answers(self.dense.network, self.images), []
        for k in FEW:

            def make(amount: float, k: int = k) -> nn.Module:
                return clustered_copy(first(amount), k)

            amount = fitting(budget, make, amounts)
            if amount is not None:
                change = (answers(make(amount).eval(), self.images) - wanted).square().mean()
                found.append((float(change), amount, k))
        return min(found)[1:] if found else None


def low_rank(start: Start, budget: int) -> Chosen:
    share = fitting(budget, start.thinner, SHARES)
    return None if share is None else [LowRankCallback(budget=share, network="network")]


def clustered(start: Start, budget: int) -> Chosen:
    k = fitting(budget, lambda k: clustered_copy(start.dense.network, k), CLUSTERS)
    return None if k is None else [WeightClusteringCallback(k)]


def low_rank_clustered(start: Start, budget: int) -> Chosen:
    chosen = start.best_of_two(budget, start.thinner, SHARES)
    if chosen is None:
        return None
    thin = LowRankCallback(budget=chosen[0], network="network")
    return [thin, WeightClusteringCallback(chosen[1], start_epoch=start.epochs / 2)]


def pruned_clustered(start: Start, budget: int) -> Chosen:
    chosen = start.best_of_two(budget, start.pruned, AMOUNTS)
    if chosen is None:
        return None
    pruning = IterativePruningCallback(chosen[0], end_epoch=start.epochs / 2, every_n_steps=20)
    return [pruning, WeightClusteringCallback(chosen[1], start_epoch=start.epochs / 2)]


WAYS: dict[str, Callable[[Start, int], Chosen]] = {
    "low rank": low_rank,
    "clustered": clustered,
    "low rank + clustered": low_rank_clustered,
    "pruned + clustered (control)": pruned_clustered,
}


def lenet(setting: Setting) -> Classifier:
    return classifier(initial(LeNet300, setting), setting, SHAPE)


def read_back(module: Classifier, setting: Setting, test: TensorLoader) -> dict[str, float]:
    """Write the file, and test the network that it gives back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.lcz"
        size = save_compressed(module, path, half=True).bytes
        loaded = load_compressed(path, lenet(setting)).eval()
    return {"bytes": size, "error": 100 - right(answers(loaded, test.inputs), test.targets)}


def one_seed(setting: Setting, arguments: argparse.Namespace, found: Found) -> None:
    data: ImageData = data_of(setting)
    data.setup()
    val, test = parts(data, setting)
    dense = trained("lenet300", lambda: lenet(setting), data, setting)
    assert isinstance(dense, Classifier)
    loader = iter(data.train_dataloader())
    epochs = 1 if setting.quick else arguments.tune
    start = Start(dense, [next(loader)[0] for _ in range(16)], val.inputs[:1000], epochs)

    def measure(table: str, name: str, module: Classifier) -> None:
        numbers = read_back(module, setting, test)
        found.add(table, name, **numbers)
        print(f"seed {setting.seed}, {table}: {name} {numbers['error']:.2f} %, {numbers['bytes']:,} bytes", flush=True)

    def trained_on(callbacks: Sequence[Callback]) -> Classifier:
        module = copy.deepcopy(dense).train()
        module.hparams.lr = arguments.tune_lr
        fit(module, data, setting, epochs=epochs, callbacks=callbacks)
        return module

    found.add("alone", "dense, float32", bytes=bytes_of(dense, half=False))
    measure("alone", "coded (dense, float16)", dense)
    measure("alone", "dense, trained on", trained_on([]))
    for kilobytes in arguments.kilobytes:
        for name, way in WAYS.items():
            callbacks = way(start, round(1000 * kilobytes))
            if callbacks is not None:
                measure(f"at most {kilobytes:g} KB", name, trained_on(callbacks))


def draw(found: Found, path: Path) -> None:
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    tidy(axes)

    def point(row: dict[str, list[float]]) -> tuple[float, float]:
        return statistics.median(row["bytes"]), statistics.median(row["error"])

    sizes = [rows for title, rows in found.tables.items() if title != "alone"]
    for name in WAYS:
        points = sorted(point(rows[name]) for rows in sizes if name in rows)
        style = ":" if "control" in name else "-"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle=style, label=name)
    for name, marker in (("coded (dense, float16)", "s"), ("dense, trained on", "^")):
        axes.plot(*point(found.tables["alone"][name]), marker=marker, linestyle="", color="#5c6670", label=name)
    axes.set(xscale="log", yscale="log", xlabel="bytes of the file", ylabel="error on the test images (%)")
    ticks = [1, 1.5, 2, 3, 5, 10, 20, 50]
    low, high = axes.get_ylim()
    axes.set_yticks([], minor=True)
    axes.set_yticks([one for one in ticks if low < one < high], [f"{one:g}" for one in ticks if low < one < high])
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=5, help="of the dense network")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--tune", type=int, default=3, help="epochs of every way after it")
    parser.add_argument("--tune-lr", type=float, default=0.05)
    parser.add_argument("--kilobytes", type=float, nargs="+", default=[64, 32, 16, 8])
    parser.add_argument("--weights", type=Path, help="a folder to which weights are written, or from which they come")
    parser.add_argument("--figure", type=Path, help="write a PNG of the errors against the bytes")
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    found = Found()
    for seed in arguments.seeds:
        setting = Setting(
            "mnist", arguments.data, 1 if arguments.quick else arguments.epochs, 128, arguments.lr, seed,
            weights=None if arguments.quick else arguments.weights, quick=arguments.quick,
        )  # fmt: skip
        one_seed(setting, arguments, found)
    found.show(Console(width=120), arguments.json)
    if arguments.figure is not None:
        draw(found, arguments.figure)


if __name__ == "__main__":
    main()
