from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.core.select import select_parameters


def network() -> nn.Module:
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    return nn.ModuleDict({"encoder": encoder, "embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})


def test_default_takes_weights_of_linear_layers_and_convolutions() -> None:
    assert list(select_parameters(network())) == ["encoder.0.weight", "encoder.2.weight", "head.weight"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("head", ["head.weight"]),
        (["head", "encoder.0"], ["encoder.0.weight", "head.weight"]),
        ("encoder.*", ["encoder.0.weight", "encoder.2.weight"]),
        ("*", ["encoder.0.weight", "encoder.2.weight", "embedding.weight", "head.weight"]),
        ("encoder.1", ["encoder.1.weight"]),
        ("*.bias", ["encoder.0.bias", "encoder.1.bias", "encoder.2.bias", "head.bias"]),
        ("encoder.1.weight", ["encoder.1.weight"]),
    ],
)
def test_patterns(target: str | list[str], expected: list[str]) -> None:
    assert list(select_parameters(network(), target)) == expected


def test_exclude_wins() -> None:
    assert list(select_parameters(network(), exclude=["encoder.*"])) == ["head.weight"]


def test_a_shared_parameter_is_listed_once() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    assert list(select_parameters(net)) == ["a.weight"]
    assert list(select_parameters(net, "b")) == ["a.weight"]


def test_compiled_submodules_keep_the_names_that_users_know() -> None:
    net = nn.Sequential()
    net.add_module("body", torch.compile(nn.Sequential(nn.Linear(2, 2))))
    assert list(select_parameters(net, "body.0")) == ["body._orig_mod.0.weight"]


def test_a_pattern_that_matches_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match=r"target pattern 'decoder\.\*' matches no parameter"):
        assert list(select_parameters(network(), ["decoder.*", "head"])) == ["head.weight"]


def test_selecting_nothing_is_an_error() -> None:
    with pytest.warns(UserWarning, match="matches no"), pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(network(), "decoder")


def test_computed_weights_are_refused_by_name() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"0 .*computes its weight"):
        select_parameters(net)


def test_lazy_layers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="lazy parameter"):
        select_parameters(nn.Sequential(nn.LazyLinear(3)))
