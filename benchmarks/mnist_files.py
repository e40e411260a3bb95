"""What does accuracy cost in bytes? LeNet on MNIST as one compressed file, loaded back before it is tested.

    claims   the recipes of conf/experiment beside the published files, several seeds
    sizes    LeNet-300-100 pruned only, clustered only, and both, at many sizes: a table and a figure, one seed
    bits     LeNet-5 pruned to 12x, then clustered to so many bits in convolutions and in linear layers

A size is that of the whole file: positions, indices, biases, names, shapes, and codebooks and other floats as float16.
The error is that of the last epoch's network, as the file gives it back, on the 10,000 test images, whose labels select
nothing; all 60,000 training images train.

    python benchmarks/mnist_files.py claims --seeds 0 1 2 --root data/mnist
    python benchmarks/mnist_files.py sizes --seeds 0 --figure sizes.png
    python benchmarks/mnist_files.py bits --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, seed_everything
from mnist_pruning import compose, silence
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_compress import load_compressed, save_compressed
from lightning_compress.hydra import build_datamodule, build_module, build_named, build_trainer_factory
from lightning_compress.report.figure import BLUE, GREY, ORANGE, new_figure, tidy

PUBLISHED = {  # one file, test error
    "lenet300_deep_compression": "27 KB, 1.58 % (Deep Compression)",
    "lenet300_smallest": "8.56 KB, 1.9 % (entropy-penalised reparametrisation)",
    "lenet5_deep_compression": "44 KB, 0.74 % (Deep Compression)",
    "lenet5_smallest": "2.84 KB, 1.0 % (entropy-penalised reparametrisation)",
}
PRUNED = (0.9, 0.95, 0.97, 0.985, 0.99)
CLUSTERED = (2, 4, 8, 32)
BOTH = ((0.9, 32), (0.97, 16), (0.985, 8), (0.99, 8))
BITS = ((8, 5), (8, 4), (4, 2))  # convolutions, linear layers: Deep Compression, table 6
INCREASES = {"8/5 bits": "+0.00", "8/4 bits": "+0.01", "4/2 bits": "+1.99"}  # published, of AlexNet's top-1 error
SILENT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def recipe(experiment: str, seed: int, root: str, *overrides: str) -> DictConfig:
    return compose(f"experiment={experiment}", f"seed={seed}", f"data.root={root}", *overrides)


def fit(cfg: DictConfig, module: LightningModule, **options: Any) -> LightningModule:
    """Train a copy of the module."""
    module = copy.deepcopy(module)
    trainer = build_trainer_factory(cfg)(**(SILENT | options))
    seed_everything(cfg.seed, verbose=False)
    trainer.fit(module, datamodule=build_datamodule(cfg))
    return module


def dense(cfg: DictConfig) -> LightningModule:
    seed_everything(cfg.seed, verbose=False)
    return fit(cfg, build_module(cfg), **cfg.dense)


def compressed(cfg: DictConfig, module: LightningModule) -> LightningModule:
    cfg.callbacks.checkpoint = None
    return fit(cfg, module, callbacks=list(build_named(cfg.callbacks).values()))


def measure(cfg: DictConfig, module: LightningModule) -> dict[str, float]:
    """Return the bytes of the module's file, and the error in % of the network that the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.lcz"
        size = save_compressed(module, path, half=True)
        loaded = load_compressed(path, build_module(cfg))
    trainer = build_trainer_factory(cfg)(**SILENT)
    accuracy = trainer.test(loaded, datamodule=build_datamodule(cfg), verbose=False)[0]["test_acc"]
    return {"bytes": size.bytes, "error": 100 * (1 - accuracy)}


def claims(arguments: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    for experiment in arguments.experiments or PUBLISHED:
        for seed in arguments.seeds:
            cfg = recipe(experiment, seed, arguments.root)
            module = dense(cfg)
            yield f"{experiment}, dense", seed, measure(cfg, module)
            yield experiment, seed, measure(cfg, compressed(cfg, module))


def sizes(arguments: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """One recipe with either half of it left out; all begin with the same dense network of their seed."""
    for seed in arguments.seeds:

        def of(*overrides: str, seed: int = seed) -> DictConfig:
            return recipe("lenet300_deep_compression", seed, arguments.root, *overrides)

        module = dense(of())
        yield "dense", seed, measure(of(), module)
        for amount in PRUNED:
            cfg = of(f"callbacks.iterative_pruning.amount={amount}", "callbacks.weight_clustering=null")
            yield f"pruned {amount:g}", seed, measure(cfg, compressed(cfg, module))
        for k in CLUSTERED:
            cfg = of("callbacks.iterative_pruning=null", f"callbacks.weight_clustering.n_clusters={k}")
            yield f"clustered {k}", seed, measure(cfg, compressed(cfg, module))
        for amount, k in BOTH:
            cfg = of(f"callbacks.iterative_pruning.amount={amount}", f"callbacks.weight_clustering.n_clusters={k}")
            yield f"both {amount:g} {k}", seed, measure(cfg, compressed(cfg, module))


def bits(arguments: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    for seed in arguments.seeds:
        pruned = recipe("lenet5_12x", seed, arguments.root)
        module = compressed(pruned, dense(pruned))
        yield "pruned 12x", seed, measure(pruned, module)
        for conv, fc in BITS:
            cfg = recipe(
                "lenet5_12x",
                seed,
                arguments.root,
                "compress=[iterative_pruning,weight_clustering]",
                "callbacks.iterative_pruning=null",
                f"callbacks.weight_clustering.n_clusters={{*conv*:{2**conv - 1},*fc*:{2**fc - 1}}}",  # and zero
                "trainer.max_epochs=4",
                "model.lr=0.005",
            )
            yield f"{conv}/{fc} bits", seed, measure(cfg, compressed(cfg, module))


def draw(rows: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Error against bytes, one line for each way."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    tidy(axes)
    for way, color in (("pruned", BLUE), ("clustered", GREY), ("both", ORANGE)):
        points = sorted(
            (statistics.median(one["bytes"] for one in of_seed), statistics.median(one["error"] for one in of_seed))
            for name, of_seed in rows.items()
            if name.startswith(way)
        )
        axes.plot(*zip(*points, strict=True), color=color, marker="o", label=way)
    axes.axhline(statistics.median(one["error"] for one in rows["dense"]), color="black", linewidth=0.8, label="dense")
    axes.set_xscale("log")
    axes.set_ylim(1, 4)
    axes.set_xlabel("bytes of the file")
    axes.set_ylabel("test error (%)")
    axes.set_title("LeNet-300-100 on MNIST in one file", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"claims": claims, "sizes": sizes, "bits": bits}
    parser.add_argument("what", nargs="?", choices=list(ways), default="claims")
    parser.add_argument("--experiments", nargs="+", help="of claims: some of the recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--json", type=Path, help="write what was measured here as well")
    parser.add_argument("--figure", type=Path, help="of sizes: draw error against bytes here")
    arguments = parser.parse_args()
    silence()

    console = Console()
    rows: dict[str, list[dict[str, float]]] = {}
    for name, seed, row in ways[arguments.what](arguments):
        rows.setdefault(name, []).append(row)
        console.print(f"{name}, seed {seed}: {row['bytes']:,.0f} bytes, {row['error']:.2f} %")
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(rows, indent=1))
    parameters = 266_610 if arguments.what == "sizes" else None
    table = Table("network", "bytes, by seed", "error %, by seed", "median", "bits per weight" if parameters else "")
    for name, of_seed in rows.items():
        middle = [statistics.median(one[key] for one in of_seed) for key in ("bytes", "error")]
        note = INCREASES.get(name, "") or PUBLISHED.get(name, "")
        table.add_row(
            name,
            " ".join(f"{one['bytes']:,.0f}" for one in of_seed),
            " ".join(f"{one['error']:.2f}" for one in of_seed),
            f"{middle[0]:,.0f} bytes, {middle[1]:.2f} %",
            f"{8 * middle[0] / parameters:.3f}" if parameters else note,
        )
    console.print(table)
    if arguments.figure is not None:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
