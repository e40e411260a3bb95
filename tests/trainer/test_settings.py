"""The settings of a callback are the arguments of its constructor, as plain data."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    NuclearNormCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)

CALLBACKS: dict[type[Any], dict[str, Any]] = {
    IterativePruningCallback: {"target": ["a", "b*"], "stop": {"monitor": "acc", "max_drop": 0.01}},
    GroupLassoCallback: {"strength": 0.1, "exclude": ["a", "b*"]},
    NuclearNormCallback: {"strength": 0.1, "exclude": ["a", "b*"]},
    WeightClusteringCallback: {"n_clusters": {"conv*": 8}, "exclude": ["a", "b*"]},
    QuantizationAwareTrainingCallback: {"weight_bits": {"conv*": 8}, "exclude": ["a", "b*"]},
    BinaryWeightsCallback: {"target": ["a", "b*"], "activations": ["a"]},
}


@pytest.mark.parametrize("kind", CALLBACKS, ids=lambda kind: kind.__name__)
def test_every_argument_is_a_setting_and_an_attribute(kind: type[Any]) -> None:
    options, names = CALLBACKS[kind], set(inspect.signature(kind).parameters) - {"example_inputs"}
    callback = kind(**options)
    assert set(callback.settings) == names
    assert callback.settings.items() >= options.items()
    for name in names - {"stop"}:  # the backtracker holds it
        value = getattr(callback, name)
        assert (list(value) if isinstance(value, tuple) else value) == callback.settings[name]


@pytest.mark.parametrize("kind", CALLBACKS, ids=lambda kind: kind.__name__)
def test_the_state_key_depends_on_the_values_and_not_on_who_wrote_them(kind: type[Any]) -> None:
    options = CALLBACKS[kind]
    key = kind(**options).state_key
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    configured = OmegaConf.create(options)
    assert kind(**tuples).state_key == kind(**{name: configured[name] for name in options}).state_key == key
    if "start_epoch" in inspect.signature(kind).parameters:
        assert kind(**options, start_epoch=1).state_key == kind(**options, start_epoch=1.0).state_key != key
    if "example_inputs" in inspect.signature(kind).parameters:
        assert kind(**options, example_inputs=torch.zeros(2, 3)).state_key == key


def test_the_state_key_is_that_of_earlier_versions() -> None:
    assert WeightClusteringCallback(4, start_epoch=2, exclude=("a",)).state_key == (
        "WeightClusteringCallback{'n_clusters': 4, 'init': 'optimal', 'gradient': 'mean', 'scope': 'layer', "
        "'start_epoch': 2.0, 'target': None, 'exclude': ['a']}"
    )
