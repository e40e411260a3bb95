"""Does its dense self help a network that is being pruned? LeNet-5 on MNIST, with and without it as the teacher.

A dense network is trained as in conf/experiment/lenet5_12x.yaml, without label smoothing: it blurs what a teacher
knows. Copies of it are pruned and tuned by that recipe to one weight in 30: on the labels; on labels that are smoothed,
as in the recipe; and on the labels and the dense network's soft targets. The error is that of the last epoch's network
on the 10,000 test images; all 60,000 training images train.

    python benchmarks/distill_while_pruning.py --root data/mnist --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

from hydra.utils import instantiate
from lightning.pytorch import LightningModule, seed_everything
from mnist_pruning import compose, fit, silence
from rich.console import Console
from rich.table import Table

from lightning_compress import DistillationModule
from lightning_compress.hydra import build_module


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    cfg = compose(
        "experiment=lenet5_12x",
        "model.label_smoothing=0",
        f"callbacks.iterative_pruning.amount={1 - 1 / options.times}",
        f"seed={seed}",
        f"data.root={options.root}",
        *options.overrides,
    )
    seed_everything(seed, verbose=False)
    dense = build_module(cfg)
    rows = {"dense": fit(cfg, dense, [], **cfg.dense)}
    alone, smoothed, student = copy.deepcopy(dense), copy.deepcopy(dense), copy.deepcopy(dense)
    smoothed.label_smoothing = 0.05
    taught = DistillationModule(student, dense, temperature=options.temperature, alpha=options.alpha)
    modules: dict[str, LightningModule] = {
        "pruned on labels": alone,
        "on smoothed labels": smoothed,
        "with its dense self": taught,
    }
    for name, module in modules.items():
        rows[name] = fit(cfg, module, [instantiate(cfg.callbacks.iterative_pruning, _convert_="all")])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, in Hydra's syntax: data.shift=1")
    parser.add_argument("--times", type=float, default=30.0, help="how many times fewer weights")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--json", type=Path, help="write what was measured here as well")
    options = parser.parse_args()
    silence()

    console = Console()
    measured = []
    for seed in options.seeds:
        measured.append(one_seed(seed, options))
        console.print("seed", seed, measured[-1])
        if options.json is not None:
            options.json.write_text(json.dumps(measured, indent=1))
    table = Table(
        "LeNet-5", "weights left", "error %, by seed", "median", "seconds", title=f"{options.times:g}x, MNIST"
    )
    for name in measured[0]:
        rows = [of_seed[name] for of_seed in measured]
        errors = [row["error"] for row in rows]
        table.add_row(
            name,
            f"{rows[0]['kept']:,.0f}",
            " ".join(f"{error:.2f}" for error in errors),
            f"{statistics.median(errors):.2f}",
            f"{statistics.median(row['seconds'] for row in rows):.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
