"""Every criterion at 90 %, on the digits' conv net and on LeNet-300-100 with MNIST; random is the floor.

All start from the same dense network and get the same training. Error on the test images, median of the seeds.

    python benchmarks/criteria.py --seeds 0 1 2 --root data/mnist
"""

from __future__ import annotations

import argparse
import copy
import statistics

from lightning.pytorch import seed_everything
from mnist_pruning import compose, fit, silence
from rich.console import Console
from rich.table import Table

from lightning_compress import IterativePruningCallback
from lightning_compress.hydra import build_module
from lightning_compress.pruning.criteria.choose import CRITERIA

TASKS = {
    "digits": (["data.val_size=180"], 12),
    "mnist": (["model=lenet300", "data=mnist"], 4),
}
# Half of the neurons for the small conv net; nine tenths would leave it two or three channels per layer.
AMOUNTS = {("digits", "weight"): 0.9, ("mnist", "weight"): 0.9, ("digits", "neuron"): 0.5, ("mnist", "neuron"): 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    arguments = parser.parse_args()
    silence()
    errors: dict[tuple[str, str, str], list[float]] = {}
    for task in arguments.tasks:
        overrides, epochs = TASKS[task]
        where = [f"data.root={arguments.root}"] if task == "mnist" else []
        for seed in arguments.seeds:
            cfg = compose(*overrides, *where, f"seed={seed}")
            seed_everything(seed, verbose=False)
            dense = build_module(cfg)
            errors.setdefault((task, "dense", ""), []).append(fit(cfg, dense, [], max_epochs=epochs)["error"])
            for granularity in ("weight", "neuron"):
                for criterion in arguments.criteria:
                    if granularity == "weight" and criterion in ("apoz", "mean_activation"):
                        continue
                    pruning = IterativePruningCallback(
                        AMOUNTS[task, granularity],
                        granularity=granularity,
                        criterion=criterion,
                        scope="global" if granularity == "weight" else "layer",
                        end_epoch=epochs / 2,
                        every_n_steps=10 if task == "digits" else 100,
                    )
                    found = fit(cfg, copy.deepcopy(dense), [pruning], max_epochs=epochs)
                    errors.setdefault((task, granularity, criterion), []).append(found["error"])
                    Console().print(task, seed, granularity, criterion, found)

    columns = [(task, kind) for task in arguments.tasks for kind in ("weight", "neuron")]
    table = Table("error %", *(f"{task}, {AMOUNTS[task, kind]:.0%} of the {kind}s" for task, kind in columns))
    for criterion in arguments.criteria:
        cells = [errors.get((task, kind, criterion)) for task, kind in columns]
        table.add_row(criterion, *("-" if cell is None else f"{statistics.median(cell):.2f}" for cell in cells))
    dense_cells = [statistics.median(errors[task, "dense", ""]) for task, _ in columns]
    table.add_row("(dense)", *(f"{cell:.2f}" for cell in dense_cells))
    Console().print(table)


if __name__ == "__main__":
    main()
