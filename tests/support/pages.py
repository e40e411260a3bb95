"""Reports for the tests of report.html."""

from __future__ import annotations

from dataclasses import replace

from lightning_compress.report import Comparison, Epoch, Layer, Measurement, Point, Report, Run

DENSE = Measurement(0.98, 1000, 1000, 50_000, 40_000, 2.0, 64_000)
EVIL = "<script>alert(1)</script>"


def report(amount: float, number: int = 0) -> Report:
    """Return a report of a run that sets a share of the weights to zero: the more, the smaller and the worse it is."""
    left = 1 - amount
    compressed = replace(
        DENSE,
        test_metric=0.98 - 0.05 * amount**2 - 0.002 * (number % 3),
        nonzero_parameters=round(1000 * left),
        macs=round(50_000 * left) + 10,
        file_bytes=round(40_000 * left) + 100,
        latency_ms=2.0 - amount,
    )
    dense = [Epoch(i, 0.9 + 0.01 * i, {"sparsity": 0.0}, "dense") for i in range(6)]
    pruned = [Epoch(i, 0.97 - 0.01 * amount, {"sparsity": amount * (i + 1) / 4}, "compression") for i in range(4)]
    layers = (Layer("first", 600, 600, round(600 * left)), Layer("last", 400, 400, round(400 * left)))
    return Report(
        DENSE,
        compressed,
        before_recovery=0.9,
        history=(*dense, *pruned),
        layers=layers,
        settings={"seed": 0, "amount": amount},
        command=f"lightning-compress amount={amount}",
    )


def sweep(runs: int = 12) -> Comparison:
    """Return the comparison of runs with rising amounts."""
    return Comparison(tuple(Run(f"run/{i}", report(round(0.95 * i / runs, 3), i)) for i in range(runs)))


def evil() -> Report:
    """Return a report in which every name is HTML."""
    one = report(0.5)
    return replace(
        one,
        metric=EVIL,
        val_metric=EVIL,
        metric_mode="max",
        history=tuple(replace(epoch, numbers={EVIL: 0.5}, phase=EVIL) for epoch in one.history),
        layers=(Layer(EVIL, 10, 10, 5),),
        settings={"amount": EVIL, EVIL: {EVIL: EVIL}, "callbacks": {EVIL: {"_target_": "lightning_compress.X"}}},
        points=(Point(EVIL, "point", 0.9, 1000.0, 1.0), Point(EVIL, EVIL, 0.8, 900.0, 1.0, 10.0)),
        command=EVIL,
    )
