"""Test and time the ways in which a compressed network can be run, beside networks trained alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_compress.coding.footprint import file_bytes
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.measure.footprint import time_in_turns
from lightning_compress.measure.macs import count_macs
from lightning_compress.report import Point
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.slimmable.objective import Widths
from lightning_compress.tasks.results import Compressed, Dense
from lightning_compress.trainer.unwrap import objective_of
from lightning_compress.trainer.wrapper import CompressionModule

COMPRESSED = "compressed"  # the name of the compressed network as a whole


def check_calibration(module: LightningModule, settings: Mapping[str, Any] | None) -> None:
    """Refuse a calibration of a network that has nothing to calibrate.

    Raises:
        ValueError: It has not.
    """
    if settings is not None and calibrated_wrapper(module) is None:
        raise ValueError(
            f"calibration={dict(settings)} is for wrappers that have thresholds, such as EarlyExitHeads, and "
            f"{type(module).__name__} has none: leave calibration out, or add early_exit to compress=[...]."
        )


def calibrated_wrapper(module: LightningModule) -> Any:
    """Return the outermost wrapper that has thresholds to calibrate; None if there is none."""
    while not hasattr(module, "calibrate"):
        if not isinstance(module, CompressionModule):
            return None
        module = module._lightning_compress.wrapped
    return module


def calibrate(module: LightningModule, data: LightningDataModule, settings: Mapping[str, Any]) -> None:
    """Calibrate the outermost wrapper that has thresholds; at every width if it is inside a slimmable network."""
    wrapper = calibrated_wrapper(module)
    if not isinstance(module, SlimmableWidth) or wrapper is module:
        wrapper.calibrate(data, **settings)
        return
    for width in (*objective_of(module, Widths).thinner(module), 1.0):
        module.set_width(width)
        wrapper.calibrate(data, **settings)


@dataclass(frozen=True)
class Way:
    """One way to run a network, or one network, with the test's metric; the fields are those of `Point`."""

    name: str
    kind: str
    network: nn.Module
    test_metric: float | None
    epochs: int | None = None


def tested_ways(
    dense: Dense,
    compressed: Compressed,
    controls: Mapping[str, LightningModule],
    test: Callable[[LightningModule], float | None],
    variants: Mapping[str, Compressed],
) -> list[Way]:
    """Return what a report compares; nothing where the network can be run in one way only and there is no other.

    Every rank takes part.

    Args:
        dense: The network before compression.
        compressed: The network after it.
        controls: Networks that were trained alone, by name.
        test: Returns the test's metric of a module.
        variants: Networks that were compressed from the same start in other ways, by name.
    """
    module = compressed.module
    found = module.operating_points() if isinstance(module, CompressionModule) else []
    if not found and not controls and not variants:
        return []
    ways = [Way("dense", "dense", dense.modules[0], dense.metric, dense.epochs // len(dense.modules) or None)]
    for one in found:
        with one.answering():
            ways.append(Way(one.name, "point", one.network, test(module)))
    ways.append(Way(COMPRESSED, "point", module, compressed.metric, compressed.trainer.current_epoch))
    ways += [Way(name, "variant", one.module, one.metric, one.trainer.current_epoch) for name, one in variants.items()]
    return ways + [Way(name, "control", one, test(one)) for name, one in controls.items()]


def timed_points(ways: Sequence[Way], inputs: ExampleInputs, *, repeats: int, small: int) -> tuple[Point, ...]:
    """Return the points of a report, timed in turns with one batch.

    Args:
        ways: What is compared.
        inputs: Test samples: how long a network with exits takes depends on them.
        repeats: How often each is timed.
        small: Bytes of the compressed network's file.
    """
    names = [f"{number} {way.name}" for number, way in enumerate(ways)]
    networks = {name: (way.network, inputs) for name, way in zip(names, ways, strict=True)}
    latency = time_in_turns(networks, repeats=repeats) if ways else {}
    points = []
    for name, way in zip(names, ways, strict=True):
        in_file = small if way.name == COMPRESSED else None if way.kind == "point" else file_bytes(way.network)
        with evaluating(way.network):
            macs, _ = count_macs(way.network, inputs)
        points.append(
            Point(
                name=way.name,
                kind=way.kind,
                test_metric=way.test_metric,
                macs=float(macs),
                latency_ms=1000.0 * latency[name].seconds,
                file_bytes=in_file,
                nonzero_parameters=None if in_file is None else _nonzero(way.network),
                epochs=way.epochs,
            )
        )
    return tuple(points)


def _nonzero(network: nn.Module) -> int:
    return sum(int(torch.count_nonzero(one)) for one in network.parameters())
