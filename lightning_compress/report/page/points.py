"""What the charts of a page show: the networks of all runs as points, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_compress.report.compare import Run
from lightning_compress.report.metric import Metric, Mode

KINDS = {"dense": "dense", "compressed": "compressed", "point": "another way to run it", "control": "trained alone"}
FEW = 8  # networks; so many are all named in a chart, and of more only the front's
MANY = 6  # settings; where more of them differ, a recipe is the command line or the names of the techniques


@dataclass(frozen=True)
class Place:
    """One network in the charts.

    Attributes:
        run: Number of the run, from 1; 0 for a dense network, which many runs share.
        kind: A key of `KINDS`, or another kind of a report's `Point`.
        name: Name of the network.
        recipe: What distinguishes the run from the others.
        test_metric: As in `Measurement`.
        file_bytes: Size of the file; None for a network that has no file of its own.
        macs: Multiply-accumulates per sample.
        latency_ms: Median time of a forward pass in milliseconds; None where the machine was busy.
    """

    run: int
    kind: str
    name: str
    recipe: str
    test_metric: float
    file_bytes: float | None
    macs: float
    latency_ms: float | None


def places(runs: Sequence[tuple[int, Run, str]]) -> list[Place]:
    """Return the networks that were tested; dense networks that differ in their latency alone are shown once.

    Args:
        runs: The number, the run and the recipe of each.
    """
    found: list[Place] = []
    dense: set[tuple[float, float | None, float]] = set()
    for number, run, recipe in runs:
        for place in _places(number, run, recipe):
            if place.kind == "dense":
                same = (place.test_metric, place.file_bytes, place.macs)
                if same in dense:
                    continue
                dense.add(same)
            found.append(place)
    return found


def _places(number: int, run: Run, recipe: str) -> list[Place]:
    report = run.report
    busy = report.busy
    known = [
        (one.kind, one.name, one.test_metric, one.file_bytes, one.macs, one.latency_ms)
        for one in report.points
        if one.kind != "dense" and one.name != "compressed"
    ]
    for kind, measured in (("compressed", report.compressed), ("dense", report.dense)):
        costs = (measured.file_bytes, measured.macs, measured.latency_ms)
        known.insert(0, (kind, kind, measured.test_metric, *costs))
    return [
        Place(0 if kind == "dense" else number, kind, name, recipe, metric, size, macs, None if busy else latency)
        for kind, name, metric, size, macs, latency in known
        if metric is not None
    ]


def front(costs: Sequence[tuple[float, float]], mode: Mode) -> list[int]:
    """Return the indices of the points that no other one beats, in the order of their costs.

    A point is beaten by one that costs no more and is no worse, and is better in one of the two. Of equal points, the
    first one is returned.

    Args:
        costs: Cost and metric of each point.
        mode: The direction in which the metric gets better.

    Example:
        >>> front([(10, 0.9), (5, 0.8), (7, 0.7), (20, 0.9)], "max")
        [1, 0]
    """
    sign = 1 if mode == "max" else -1
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i][0], -sign * costs[i][1], i)):
        if not kept or sign * costs[i][1] > sign * costs[kept[-1]][1]:
            kept.append(i)
    return kept


def in_frame(found: Sequence[Place], mode: Mode | None) -> list[Place]:
    """Return the networks that are not far worse than the better half, which would squeeze the others into one line."""
    if mode is None or len(found) <= FEW:
        return list(found)
    sign = -1 if mode == "max" else 1
    errors = sorted(sign * one.test_metric for one in found)
    good, middle = errors[0], errors[len(errors) // 2]
    limit = middle + max(4 * (middle - good), 0.05 * abs(good))
    return [one for one in found if sign * one.test_metric <= limit]


def best(runs: Sequence[tuple[int, Run, str]], metric: Metric) -> int:
    """Return the number of the run whose compressed network has the best metric; of equal ones, the smallest file."""
    tested = [
        (number, run.report.compressed) for number, run, _ in runs if run.report.compressed.test_metric is not None
    ]
    if not tested or metric.mode is None:
        return runs[0][0]
    sign = -1 if metric.mode == "max" else 1
    return min(tested, key=lambda one: (sign * (one[1].test_metric or 0.0), one[1].file_bytes, one[0]))[0]
