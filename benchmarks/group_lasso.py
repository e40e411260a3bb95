"""What does the strength of a group lasso buy? Digits, everything that makes a channel as one group, proximal steps.

From scratch for 18 epochs under the penalty, then `shrink`; medians over the seeds.

    python benchmarks/group_lasso.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_compress import GroupLassoCallback, shrink
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet

EPOCHS = 18
INPUTS = torch.zeros(2, 1, 8, 8)


def train(strength: float, seed: int, *, proximal: bool) -> tuple[float, float, float]:
    """Return the share of the parameters that is left, and the test accuracy before and after shrinking."""
    seed_everything(seed, verbose=False)
    module = Classifier(DigitsConvNet(), lr=3e-3, input_shape=(1, 8, 8))
    penalty = GroupLassoCallback(strength, granularity="group", proximal=proximal, example_inputs=INPUTS)
    callbacks: list[Callback] = [penalty]
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Digits()
    trainer.fit(module, datamodule=data)
    dense = sum(parameter.numel() for parameter in module.parameters())
    (before,) = trainer.test(module, data, verbose=False)
    shrink(module, INPUTS)
    (after,) = trainer.test(module, data, verbose=False)
    left = sum(parameter.numel() for parameter in module.parameters())
    return left / dense, before["test_acc"], after["test_acc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 2.0, 3.0, 4.0])
    parser.add_argument("--gradient", action="store_true", help="the penalty's gradient instead of its proximal step")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    table = Table("strength", "parameters left", "accuracy", "after shrink", "by seed")
    for strength in arguments.strengths:
        runs = [train(strength, seed, proximal=not arguments.gradient) for seed in arguments.seeds]
        left, before, after = (statistics.median(column) for column in zip(*runs, strict=True))
        by_seed = " ".join(f"{100 * run[2]:.1f}" for run in runs)
        table.add_row(f"{strength:g}", f"{left:.0%}", f"{before:.2%}", f"{after:.2%}", by_seed)
    Console().print(table)


if __name__ == "__main__":
    main()
