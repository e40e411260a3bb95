from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.small import CLASSES, FEATURES, SmallModule, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback
from lightning_compress.pruning.inspection import inspect_channels, inspect_weights

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


class Streams(nn.Module):
    """A sum of two layers, and blocks: units of several channels, and weights that belong to two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.norm = nn.Conv1d(1, 6, 3, padding=1), nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)
        self.blocks, self.head = nn.Conv1d(6, 4, 3, groups=2), nn.Linear(4, CLASSES)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x.unsqueeze(1)))
        x = F.relu(x + self.norm(self.branch(x)))
        return self.head(F.relu(self.blocks(x)).mean(2))


class StreamsModule(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Streams()


@pytest.mark.parametrize("patterns", PATTERNS)
def test_the_same_for_channels(patterns: dict) -> None:
    module = SmallModule()
    verdicts = inspect_channels(module, torch.zeros(2, FEATURES), **patterns)
    said = {verdict.name for verdict in verdicts if verdict.action in ("pruned", "follows")}
    callback = IterativePruningCallback(0.5, schedule="one_shot", granularity="neuron", shrink="never", **patterns)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled())
    assert said == set(callback.masks)


def test_channels_are_counted() -> None:
    verdicts = inspect_channels(SmallModule(), torch.zeros(2, FEATURES))
    units = {verdict.name: verdict.count for verdict in verdicts if verdict.count}
    assert units == {"net.conv.weight": 6, "net.hidden.weight": 16, "net.head.weight": 3}
    assert [verdict.name for verdict in verdicts if verdict.action == "frozen"] == ["net.head.weight"]


@pytest.mark.parametrize("network", ["", "net"])
def test_channels_of_groups(network: str) -> None:
    """6 channels of the sum feed 2 blocks of 3, which make 2 each: 3 columns and 2 blocks there, 2 columns behind."""
    module = StreamsModule()
    verdicts = inspect_channels(module, torch.zeros(2, FEATURES), network=network)
    assert [(one.name.removeprefix("net."), one.count, one.action, one.reason) for one in verdicts] == [
        ("stem.weight", 5, "pruned", ""),
        ("stem.bias", 0, "follows", "with net.stem.weight"),
        ("branch.weight", 0, "follows", "with net.stem.weight"),
        ("branch.bias", 0, "follows", "with net.stem.weight"),
        ("norm.weight", 0, "follows", "with net.stem.weight"),
        ("norm.bias", 0, "follows", "with net.stem.weight"),
        ("blocks.weight", 2, "pruned", ""),
        ("blocks.bias", 0, "follows", "with net.stem.weight"),
        ("head.weight", 3, "frozen", "it is an output of the network"),
        ("head.bias", 0, "skipped", "not targeted"),
        ("spare.weight", 2, "frozen", "it is not used in the forward pass of the example inputs"),
        ("spare.bias", 0, "skipped", "not targeted"),
    ]
    callback = IterativePruningCallback(0.5, schedule="one_shot", granularity="neuron", shrink="never", network=network)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled())
    assert {one.name for one in verdicts if one.action in ("pruned", "follows")} == set(callback.masks)
    counted = sum(one.count for one in verdicts if one.action == "pruned")
    assert callback.sparsity == pytest.approx(round(0.5 * counted) / counted)


def test_an_excluded_layer_freezes_those_that_make_the_same_channels() -> None:
    verdicts = inspect_channels(
        StreamsModule(), torch.zeros(2, FEATURES), ["net.*", "net.head.bias", "net.branch.bias"], exclude="net.stem"
    )
    found = {one.name.removeprefix("net."): (one.count, one.action, one.reason) for one in verdicts}
    shared = "they are those of net.stem.weight as well, which is no target"
    assert found == {
        "stem.weight": (0, "skipped", "excluded by 'net.stem'"),
        "stem.bias": (0, "skipped", "not targeted"),
        "branch.weight": (5, "frozen", shared),
        "branch.bias": (0, "frozen", "with net.branch.weight"),
        "norm.weight": (0, "skipped", "not targeted"),
        "norm.bias": (0, "skipped", "not targeted"),
        "blocks.weight": (2, "pruned", ""),
        "blocks.bias": (0, "follows", "with net.blocks.weight"),
        "head.weight": (3, "frozen", "it is an output of the network"),
        "head.bias": (0, "frozen", "with net.head.weight"),
        "spare.weight": (2, "frozen", "it is not used in the forward pass of the example inputs"),
        "spare.bias": (0, "skipped", "not targeted"),
    }


def test_a_target_that_names_no_channels() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 1))
    verdicts = inspect_channels(net, torch.zeros(2, FEATURES), ["0.bias", "2"])
    assert [(one.name, one.action, one.reason) for one in verdicts] == [
        ("0.weight", "skipped", "not targeted"),
        ("0.bias", "frozen", "no channels go by its name"),
        ("2.weight", "frozen", "no channels go by its name"),
        ("2.bias", "skipped", "not targeted"),
    ]


def test_every_parameter_is_spoken_of_in_the_modules_order() -> None:
    module = SmallModule()
    names = [name for name, _ in module.named_parameters()]
    assert [verdict.name for verdict in inspect_weights(module)] == names
    assert [verdict.name for verdict in inspect_channels(module, torch.zeros(2, FEATURES))] == names


def test_what_is_left_out_says_why() -> None:
    reasons = {verdict.name: verdict.reason for verdict in inspect_weights(SmallModule(), exclude=["net.head"])}
    assert reasons["net.head.weight"] == "excluded by ['net.head']"
    assert reasons["net.norm.weight"] == "not targeted"
    assert reasons["net.conv.weight"] == ""
