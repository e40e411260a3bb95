"""Who predicts ratings best, and in how many bytes: mean, biases, linear factorisation, dot product, or a perceptron?

The perceptron is NNMF (1511.06443) with the paper's sizes, whose weights and latent vectors train in turns, full batch,
with RMSProp. Everything is tuned alike: the regularization is the one of a list that does best on the validation part
(5 % of the training ratings), and every fit keeps the weights of its best epoch there, as the paper's early stopping
does. 10 % of the ratings, drawn at random by the seed, are for the test. Then the tables of latent vectors, and the
perceptron, are clustered to fewer and fewer values, or the tables become products of low rank, or both; they train on,
and are written to files: error against bytes.

The ratings are those of the default matrix of `Ratings`, a low-rank one plus thresholds, or of a file in a format of
MovieLens, which must come from you.

    python benchmarks/matrix_factorization.py --figure ratings.png
    python benchmarks/matrix_factorization.py --path ml-latest-small/ratings.csv --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _support import Found
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor

from lightning_compress import WeightClusteringCallback, save_compressed
from lightning_compress.baselines import NNMF, DotProduct, MatrixFactorization, Ratings, RidgeBiases
from lightning_compress.low_rank import lower_rank
from lightning_compress.report.figure import new_figure, tidy

TARGET = ["network.user*", "network.item*", "network.mlp.*"]
Curves = dict[str, list[tuple[float, float]]]  # bytes of a file, and RMSE


class Best(Callback):
    """Keeps the weights of the epoch with the least error in validation, and puts them back when the fit has ended."""

    def __init__(self) -> None:
        self.error, self.epoch, self.weights = math.inf, -1, dict[str, Tensor]()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = float(pl_module.val_rmse.compute())  # type: ignore[union-attr,operator]  # a RatingModule
        if not trainer.sanity_checking and error < self.error:
            self.error, self.epoch = error, trainer.current_epoch
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(self.weights)


def trainer(epochs: int, *callbacks: Callback) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    few = {"check_val_every_n_epoch": min(5, epochs), "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **silent, **few)  # type: ignore[arg-type]


def fit(module: LightningModule, data: Ratings, epochs: int, seed: int, *callbacks: Callback) -> float:
    """Fit, go back to the best epoch, and return its error in validation."""
    seed_everything(seed, verbose=False)
    best = Best()
    trainer(epochs, *callbacks, best).fit(module, datamodule=data)
    return best.error


def error(module: LightningModule, data: Ratings) -> float:
    return float(trainer(1).test(module, datamodule=data, verbose=False)[0]["test_rmse"])


def bytes_of(module: LightningModule, **options: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_compressed(module, Path(folder) / "a.lcz", **options).bytes


def tuned(
    make: Callable[[float], LightningModule], strengths: Sequence[float], data: Ratings, epochs: int, seed: int
) -> tuple[LightningModule, float, float]:
    """Return the module of the regularization that does best in validation, its error there, and the regularization."""
    found = []
    for strength in strengths:
        seed_everything(seed, verbose=False)
        module = make(strength)
        found.append((fit(module, data, epochs, seed), strength, module))
    best = min(found, key=lambda one: one[0])
    if len(strengths) > 1 and best[1] in (strengths[0], strengths[-1]):
        print(f"{best[1]:g} is at an end of {list(strengths)}: a wider list may have a better one.", flush=True)
    return best[2], best[0], best[1]


def models(
    data: Ratings, arguments: argparse.Namespace
) -> dict[str, tuple[Callable[[float], LightningModule], Any, int]]:
    """How each is made from a regularization, those to choose from, and for how many epochs it trains."""
    assert data.users is not None
    assert data.items is not None
    users, items = data.users, data.items

    def product(width: int, *, biases: bool = True) -> Callable[[float], LightningModule]:
        return lambda strength: MatrixFactorization(
            DotProduct(users, items, width=width, biases=biases), optimizer="adam", lr=0.02, lr_schedule="cosine",
            regularization=strength, frequency_scaled=True, alternate=False,
        )  # fmt: skip

    def perceptron(strength: float) -> LightningModule:
        return MatrixFactorization(NNMF(users, items), lr=1e-3, regularization=strength)

    ridge = [0.5, 1.0, 2.0, 3.0, 5.0, 10.0]
    return {
        "mean": (lambda _: RidgeBiases(users, items, regularization=[math.inf]), [0.0], 5),
        "biases": (lambda _: RidgeBiases(users, items, regularization=ridge), [0.0], 60),
        "linear 16": (product(16, biases=False), arguments.strengths, arguments.epochs),
        "dot product 4": (product(4), arguments.strengths, arguments.epochs),
        "dot product 16": (product(16), arguments.strengths, arguments.epochs),
        "perceptron": (perceptron, arguments.penalties, arguments.perceptron_epochs),
    }


def clustered(module: LightningModule, k: int, data: Ratings, epochs: int, seed: int) -> LightningModule:
    again = copy.deepcopy(module)
    fit(again, data, epochs, seed, WeightClusteringCallback(k, target=TARGET))
    return again


def thinner(module: LightningModule, rank: int, data: Ratings, epochs: int, seed: int) -> LightningModule | None:
    """Tables of more columns become products of rank r, which train on; None: there are none."""
    again: Any = copy.deepcopy(module)
    pairs, _ = next(iter(data.train_dataloader()))
    tables = {**again.network.tables("user"), **again.network.tables("item")}
    wide = [name for name, table in tables.items() if table.embedding_dim > rank]
    if not wide:
        return None
    lower_rank(again.network, pairs[:2], rank=rank, target=wide)
    fit(again, data, epochs, seed)
    return again  # type: ignore[no-any-return]  # a copy of the module


def both(module: LightningModule, rank: int, data: Ratings, epochs: int, seed: int) -> LightningModule | None:
    thin = thinner(module, rank, data, epochs, seed)
    return None if thin is None else clustered(thin, 16, data, epochs, seed)


WAYS: dict[str, tuple[Callable[..., LightningModule | None], Sequence[int]]] = {
    "{} clusters": (clustered, (64, 16, 8, 4, 2)),
    "rank {}": (thinner, (8, 4, 2)),
    "rank {}, 16 clusters": (both, (8, 4, 2)),
}


def draw(curves: Curves, path: Path, title: str) -> None:
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    tidy(axes)
    for name, points in curves.items():
        if len(points) == 1:
            axes.plot(*zip(*points, strict=True), marker="s", linestyle="", label=name)
        else:
            style = ":" if name.endswith("low rank") else "-"
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linestyle=style, label=name)
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="RMSE of the test ratings")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="a ratings file; by default a generated matrix")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=300, help="of linear factorisation and dot product")
    parser.add_argument("--perceptron-epochs", type=int, default=1200)
    parser.add_argument("--tuning", type=int, default=100, help="epochs after clustering")
    parser.add_argument("--strengths", type=float, nargs="+", help="regularizations of products, per rating")
    parser.add_argument("--penalties", type=float, nargs="+", help="those of the perceptron, per vector")
    parser.add_argument("--no-files", dest="files", action="store_false", help="only who predicts best")
    parser.add_argument("--figure", type=Path, help="write a PNG of the last seed's errors against bytes")
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few epochs of everything")
    arguments = parser.parse_args()
    if arguments.strengths is None:
        arguments.strengths = [0.01, 0.02, 0.04, 0.08] if arguments.path is None else [0.1, 0.15, 0.2, 0.3]
    if arguments.penalties is None:
        arguments.penalties = [5.0, 10.0, 20.0, 50.0] if arguments.path is None else [20.0, 50.0, 100.0]
    if arguments.quick:
        arguments.epochs = arguments.perceptron_epochs = arguments.tuning = 4
    silence()
    console, found = Console(width=120), Found()
    curves: Curves = {}
    for seed in arguments.seeds:
        curves.clear()
        data = (
            Ratings(arguments.path, users=None, items=None, split_seed=seed)
            if arguments.path
            else Ratings(split_seed=seed)
        )
        data.setup()
        for name, (make, strengths, epochs) in models(data, arguments).items():
            start = time.process_time()
            module, validated, strength = tuned(make, strengths, data, epochs, seed)
            dense = error(module, data)
            numbers = {"val RMSE": validated, "test RMSE": dense, "regularization": strength}
            numbers["parameters"] = sum(one.numel() for one in module.parameters())
            found.add("models", name, **numbers, CPU_s=time.process_time() - start)
            print(f"seed {seed}: {name} {dense:.4f}", flush=True)
            if not arguments.files:
                continue
            for label, half in (("float32", False), ("float16", True)):
                found.add("files", f"{name}, {label}", RMSE=dense, bytes=bytes_of(module, half=half))
            curves[name] = [(bytes_of(module), dense)]
            if not isinstance(module, MatrixFactorization):
                continue
            for way, (change, amounts) in WAYS.items():
                for amount in amounts:
                    small = change(module, amount, data, arguments.tuning, seed)
                    if small is None:
                        continue
                    point = bytes_of(small), error(small, data)
                    found.add("files", f"{name}, {way.format(amount)}", RMSE=point[1], bytes=point[0])
                    curves.setdefault(name if way == "{} clusters" else f"{name}, low rank", []).append(point)
    found.show(console, arguments.json, digits=4)
    if arguments.figure is not None:
        draw(curves, arguments.figure, "MovieLens" if arguments.path else "generated matrix")


if __name__ == "__main__":
    main()
