"""How far can LeNet be pruned on MNIST? Ours against Lightning's ModelPruning, from the same dense network.

The recipes are those of conf/experiment; the peer gets the same training, with its masks set once an epoch to the same
amounts. The error is that of the last epoch's network on the 10,000 test images, whose labels select nothing; all
60,000 training images train (data.val_size=0).

    python benchmarks/mnist_pruning.py lenet300_12x lenet300_56x --seeds 0 1 2 --root data/mnist
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_compress.core.schedule import amount_at
from lightning_compress.core.select import select_parameters
from lightning_compress.hydra import build_datamodule, build_module, build_trainer_factory, register_resolvers

PUBLISHED = {
    "lenet300_12x": "1.59 (Han et al. 2015)",
    "lenet300_12x_shift": "1.59 (Han et al. 2015)",
    "lenet300_56x": "1.99 (dynamic network surgery)",
    "lenet300_56x_shift": "1.99 (dynamic network surgery)",
    "lenet5_12x": "0.77 (Han et al. 2015)",
    "lenet5_108x": "0.91 (dynamic network surgery)",
}


def compose(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_module("lightning_compress.conf", version_base="1.3"):
        return hydra.compose("config", overrides=["output_dir=.", "data.val_size=0", *overrides])


def silence() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def model_pruning(cfg: DictConfig, module: LightningModule) -> Callback:
    """The peer, with the amounts of our schedule; what it is given compounds, so it gets each epoch's share."""
    settings, epochs = cfg.callbacks.iterative_pruning, cfg.trainer.max_epochs
    end = settings.end_epoch or epochs * 2 / 3

    def share(epoch: int) -> float:
        before, after = (
            amount_at(max(0.0, e - settings.start_epoch) / (end - settings.start_epoch), settings.amount)
            for e in (epoch, epoch + 1)
        )
        return (after - before) / (1 - before)

    layers = [name.rpartition(".")[0] for name in select_parameters(module)]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.get_submodule(layer), "weight") for layer in layers],
        amount=share,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )


def fit(cfg: DictConfig, module: LightningModule, callbacks: list[Callback], **options: Any) -> dict[str, float]:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = build_trainer_factory(cfg)(**(silent | options), callbacks=callbacks)
    datamodule = build_datamodule(cfg)
    seed_everything(cfg.seed, verbose=False)
    start = time.perf_counter()
    trainer.fit(module, datamodule=datamodule)
    seconds = time.perf_counter() - start
    accuracy = trainer.test(module, datamodule=datamodule, verbose=False)[0]["test_acc"]
    kept = sum(int(p.count_nonzero()) for p in select_parameters(module).values())
    return {"error": 100 * (1 - accuracy), "kept": kept, "seconds": seconds}


def one_seed(experiment: str, seed: int, root: str, *, peer: bool) -> dict[str, dict[str, float]]:
    cfg = compose(f"experiment={experiment}", f"seed={seed}", f"data.root={root}")
    seed_everything(seed, verbose=False)
    dense = build_module(cfg)
    rows = {"dense": fit(cfg, dense, [], **cfg.dense)}
    ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
    rows["IterativePruningCallback"] = fit(cfg, ours, [instantiate(cfg.callbacks.iterative_pruning, _convert_="all")])
    if peer:
        rows["ModelPruning"] = fit(cfg, theirs, [model_pruning(cfg, theirs)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path, help="write what was measured here as well")
    arguments = parser.parse_args()
    silence()

    console = Console()
    table = Table("experiment", "network", "weights left", "error %, by seed", "median", "published", "seconds")
    measured: dict[str, list[dict[str, dict[str, float]]]] = {}
    for experiment in arguments.experiments:
        seeds = measured[experiment] = []
        for seed in arguments.seeds:
            seeds.append(one_seed(experiment, seed, arguments.root, peer=not arguments.no_peer))
            console.print(experiment, "seed", seed, seeds[-1])
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(measured, indent=1))
        for row in seeds[0]:
            errors = [of_seed[row]["error"] for of_seed in seeds]
            table.add_row(
                experiment,
                row,
                f"{seeds[0][row]['kept']:,.0f}",
                " ".join(f"{error:.2f}" for error in errors),
                f"{statistics.median(errors):.2f}",
                PUBLISHED.get(experiment, "") if row == "IterativePruningCallback" else "",
                f"{statistics.median(of_seed[row]['seconds'] for of_seed in seeds):.0f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
