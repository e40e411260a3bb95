"""Every number and flag of a constructor is checked alike: text, truth values and NaN are no numbers."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.baselines import Classifier, DigitsConvNet, ResNet20

CALLBACKS: dict[type, dict[str, Any]] = {
    lc.BinaryWeightsCallback: {},
    lc.BlockPruningCallback: {},
    lc.GroupLassoCallback: {"strength": 0.1},
    lc.IterativePruningCallback: {},
    lc.NuclearNormCallback: {"strength": 0.1},
    lc.QuantizationAwareTrainingCallback: {},
    lc.WeightClusteringCallback: {},
}


def modules() -> dict[type, Callable[..., Any]]:
    x = torch.zeros(2, 1, 8, 8)
    plain = {"network": "network", "example_inputs": x}
    settings = [lc.serving.Setting("a", nn.Identity().eval(), 0.5)]
    teachers = [Classifier(DigitsConvNet(width=4)) for _ in range(2)]
    return {
        lc.ChannelGates: lambda **one: lc.ChannelGates(Classifier(DigitsConvNet(width=4)), **(plain | one)),
        lc.SkippableBlocks: lambda **one: lc.SkippableBlocks(
            Classifier(ResNet20(width=4, in_channels=1)), **(plain | one)
        ),
        lc.EarlyExitHeads: lambda **one: lc.EarlyExitHeads(
            Classifier(DigitsConvNet(width=4)), **({"num_classes": 10} | plain | one)
        ),
        lc.SlimmableWidth: lambda **one: lc.SlimmableWidth(Classifier(DigitsConvNet(width=4)), **(plain | one)),
        lc.DistillationModule: lambda **one: lc.DistillationModule(Classifier(DigitsConvNet(width=4)), teachers, **one),
        lc.BudgetController: lambda **one: lc.BudgetController(settings, **({"table": {"a": {1: 0.1}}} | one)),
    }


def arguments(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the names of the numbers and flags, with their annotations."""
    for name, parameter in inspect.signature(kind).parameters.items():
        written = str(parameter.annotation)
        if written.split(" | ")[0] in ("float", "int", "bool") and " | str" not in written:
            yield name, written


CASES = [
    pytest.param(kind, name, written, id=f"{kind.__name__}-{name}")
    for kind in (*CALLBACKS, *modules())
    for name, written in arguments(kind)
]


def make(kind: type, **given: Any) -> Any:
    return kind(**(CALLBACKS[kind] | given)) if kind in CALLBACKS else modules()[kind](**given)


@pytest.mark.parametrize(("kind", "name", "written"), CASES)
def test_text_truth_values_and_nan_are_refused_with_the_name_of_the_argument(
    kind: type, name: str, written: str
) -> None:
    wrong: list[Any] = ["0.5", "x", math.nan] + ([] if written.startswith("bool") else [True])
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{name}.*got .*{re.escape(repr(value))}"):
            make(kind, **{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (lc.SlimmableWidth, "widths", ["0.5", 1.0]),
        (lc.DistillationModule, "teacher_weights", ["0.5", 0.5]),
        (lc.DistillationModule, "alpha", {"start": "0.5", "end": 0.1}),
        (lc.DistillationModule, "alpha", {"start": 0.5, "end": 0.1, "start_epoch": "0.5"}),
        (lc.DistillationModule, "hints", [{"student": "network", "teacher": "network", "weight": "0.5"}]),
        (lc.IterativePruningCallback, "stop", {"monitor": "val_acc", "max_drop": "0.5"}),
        (lc.IterativePruningCallback, "stop", {"monitor": "val_acc", "max_drop": 0.1, "baseline": "0.5"}),
        (lc.BudgetController, "battery", {1.0: "0.5"}),
        (lc.WeightClusteringCallback, "n_clusters", {"*": "0.5"}),
        (lc.QuantizationAwareTrainingCallback, "weight_bits", {"*": "0.5"}),
    ],
)
def test_text_among_several_numbers_is_refused(kind: type, name: str, values: Any) -> None:
    with pytest.raises(ValueError, match=r"got the text '0\.5'"):
        make(kind, **{name: values})


def test_numbers_of_numpy_are_plain_numbers_in_the_state() -> None:
    callback = lc.BlockPruningCallback(np.float32(0.5), start_epoch=np.int64(1))
    assert {type(callback.amount), type(callback.start_epoch)} == {float}
    assert callback.state_key == lc.BlockPruningCallback(0.5, start_epoch=1).state_key
