"""Do calibrated thresholds hold on samples that they have not seen, and what do they gain on MSDNet's sweep?

Tables are drawn, not measured, so that there are as many as one likes: three exits and the full network at a quarter of
the cost each, on a class whose logit grows with the depth and with how easy a sample is, in noise that exits share for
the most part; every exit's logits are too large. Each draw calibrates on N samples and is tested on 40,000 others.

  budget     the mean cost on the test samples, against the budget that the calibration used
  drop       how far the test accuracy is below the full network's, beyond what was allowed
  cost       in stages, of four; in brackets with slack=0, which trusts the accuracy that the solver sees
  q-sweep    accuracy on the test samples less that of the sweep's thresholds, whose mean cost is the budget, and in
             brackets the share of it that is spent: thresholds on which more would not be more accurate stop there

    python benchmarks/exit_thresholds.py --draws 20
"""

from __future__ import annotations

import argparse
import math
import warnings

import torch
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

from lightning_compress.early_exit import ExitRule, Table, calibrate, evaluate, q_sweep

EXITS, CLASSES, TEST = 3, 10, 40_000


def drawn(samples: int, easy: float, generator: torch.Generator) -> Table:
    """Return a table of samples; the easier, the more accurate."""
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    ease = 1.2 * torch.randn(samples, generator=generator)
    shared = torch.randn(samples, CLASSES, generator=generator)
    logits = []
    for k in range(EXITS + 1):
        z = math.sqrt(0.7) * shared + math.sqrt(0.3) * torch.randn(samples, CLASSES, generator=generator)
        z[torch.arange(samples), targets] += (easy + 0.4 * (k + 1) + ease).clamp(min=0)
        logits.append((2.5 + 0.5 * k) * z)
    return Table(logits=logits, targets=targets, stages=(1.0,) * (EXITS + 1), heads=(0.02,) * EXITS)


def budget_errors(table: Table, test: Table, seed: int) -> list[float]:
    errors = []
    for budget in (1.15, 1.3, 1.6):
        rule = calibrate(table, budget=budget, seed=seed)
        if evaluate(table, rule).mean_cost > 0.99 * budget:  # else more would not be more accurate
            errors.append(evaluate(test, rule).mean_cost / budget - 1)
    return errors


def drops(table: Table, test: Table, seed: int) -> list[tuple[float, float, float]]:
    """Return, for some allowed drops, how far the test accuracy is beyond it, and the costs with slack and without."""
    full, found = float(test.quality()[-1].mean()), []
    for drop in (0.003, 0.01, 0.02):
        with_slack = evaluate(test, calibrate(table, accuracy_drop=drop, seed=seed))
        without = evaluate(test, calibrate(table, accuracy_drop=drop, slack=0.0, seed=seed))
        found.append((full - with_slack.accuracy - drop, with_slack.mean_cost, without.mean_cost))
    return found


def gains(table: Table, test: Table, seed: int) -> list[tuple[float, float]]:
    """Return how much more accurate our thresholds are than those of the sweep, and what they cost against it."""
    found = []
    for point in q_sweep(table)[2:20:4]:
        swept = ExitRule(rule="confidence", thresholds=point.thresholds, temperatures=(1.0,) * (EXITS + 1))
        mine = calibrate(table, budget=point.mean_cost, seed=seed)
        one, other = evaluate(test, mine), evaluate(test, swept)
        found.append((one.accuracy - other.accuracy, one.mean_cost / other.mean_cost))
    return found


def beyond(values: Tensor, limit: float) -> str:
    return f"{100 * float((values > limit).double().mean()):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 2000, 5000])
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # closed exits, and thresholds that are only the safest ones
    printed = Printed(title="Calibrated on N samples, tested on 40,000 others")
    for column in ("full", "N", "budget: sd", "> 3 %", "drop: mean", "sd", "> 0.3 points", "cost", "q-sweep"):
        printed.add_column(column, justify="right")
    for easy in (3.5, 2.5):
        for samples in args.samples:
            generator = torch.Generator().manual_seed(samples)
            over: list[float] = []
            lost: list[tuple[float, float, float]] = []
            gained: list[tuple[float, float]] = []
            for seed in range(args.draws):
                table, test = drawn(samples, easy, generator), drawn(TEST, easy, generator)
                over += budget_errors(table, test, seed)
                lost += drops(table, test, seed)
                gained += gains(table, test, seed)
            errors, (excess, cost, without) = torch.tensor(over), torch.tensor(lost).T
            gain, spent = torch.tensor(gained).mean(0).tolist()
            printed.add_row(
                f"{100 * float(test.quality()[-1].mean()):.1f} %",
                f"{samples:,}",
                f"{100 * float(errors.std()):.1f} %",
                beyond(errors.abs(), 0.03),
                f"{100 * float(excess.mean()):+.2f}",
                f"{100 * float(excess.std()):.2f}",
                beyond(excess, 0.003),
                f"{float(cost.mean()):.2f} ({float(without.mean()):.2f})",
                f"{100 * gain:+.2f} ({spent:.2f})",
            )
    Console(width=120).print(printed)


if __name__ == "__main__":
    main()
