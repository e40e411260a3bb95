from __future__ import annotations

import pytest
import torch
from support.small import FEATURES, SmallModule, quiet_trainer, shuffled

from lightning_compress import IterativePruningCallback
from lightning_compress.pruning.inspection import inspect_neurons, inspect_weights

PATTERNS = [
    {"target": None, "exclude": ()},
    {"target": "net.hidden", "exclude": ()},
    {"target": ["net.*", "net.head.bias"], "exclude": "net.conv"},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_what_is_said_is_what_the_callback_then_prunes(patterns: dict) -> None:
    module = SmallModule()
    said = {verdict.name for verdict in inspect_weights(module, **patterns) if verdict.action == "pruned"}
    callback = IterativePruningCallback(0.5, schedule="one_shot", **patterns)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled())
    assert said == set(callback.masks)


def test_the_same_for_neurons() -> None:
    module = SmallModule()
    verdicts = inspect_neurons(module, torch.zeros(2, FEATURES))
    said = {verdict.name for verdict in verdicts if verdict.action in ("pruned", "follows")}
    callback = IterativePruningCallback(0.5, schedule="one_shot", granularity="neuron")
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled())
    assert said == set(callback.masks)
    units = {verdict.name: verdict.units for verdict in verdicts if verdict.units}
    assert units == {"net.conv.weight": 6, "net.hidden.weight": 16, "net.head.weight": 3}
    assert [verdict.name for verdict in verdicts if verdict.action == "frozen"] == ["net.head.weight"]


def test_every_parameter_is_spoken_of_in_the_modules_order() -> None:
    module = SmallModule()
    names = [name for name, _ in module.named_parameters()]
    assert [verdict.name for verdict in inspect_weights(module)] == names
    assert [verdict.name for verdict in inspect_neurons(module, torch.zeros(2, FEATURES))] == names


def test_what_is_left_out_says_why() -> None:
    reasons = {verdict.name: verdict.reason for verdict in inspect_weights(SmallModule(), exclude=["net.head"])}
    assert reasons["net.head.weight"] == "excluded by ['net.head']"
    assert reasons["net.norm.weight"] == "not targeted"
    assert reasons["net.conv.weight"] == ""
