from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_compress.core.select import is_weight_layer, output_blocks, select_parameters


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


@pytest.mark.parametrize(
    ("part", "pattern", "expected"),
    [
        (nn.LSTM(3, 4, num_layers=2, proj_size=2), "part", ["weight_ih", "weight_hh", "weight_hr"] * 2),
        (nn.GRU(3, 4, bidirectional=True), "*", ["weight_ih", "weight_hh"] * 2),
        (nn.GRUCell(3, 4), "part", ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(4, 2), "part", ["in_proj_weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "part", ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
        (nn.MultiheadAttention(4, 2), "part*", ["in_proj_weight", "out_proj.weight"]),
        (nn.Embedding(5, 4), "part", ["weight"]),
        (nn.Bilinear(2, 3, 4), "part", ["weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_module_means_its_weights(part: nn.Module, pattern: str, expected: list[str]) -> None:
    found = list(select_parameters(nn.ModuleDict({"part": part}), pattern))
    assert [name.removeprefix("part.").partition("_l0")[0].partition("_l1")[0] for name in found] == expected
    assert all(parameter.dim() > 1 for parameter in select_parameters(part, pattern.replace("part", "*")).values())


def test_a_module_that_holds_others_means_nothing_of_them() -> None:
    net = nn.Module()
    net.add_module("part", nn.Sequential(nn.Linear(2, 2)))
    net.part.register_parameter("position", nn.Parameter(torch.zeros(3, 2)))
    with pytest.warns(UserWarning, match="matches no"), pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(net, "part")


def test_the_linear_layer_of_transformers_is_one() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    net = nn.Sequential(conv1d(6, 3), nn.Linear(6, 2))
    assert list(select_parameters(net)) == ["0.weight", "1.weight"]
    assert (output_blocks(net[0]), output_blocks(net[1])) == (1, None)
    assert not is_weight_layer(nn.Embedding(2, 2))


def test_what_has_no_entries_is_passed_over_or_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2), nn.Linear(2, 2))
    assert list(select_parameters(net)) == list(select_parameters(net, "*")) == ["2.weight"]
    with pytest.raises(ValueError, match=r"0\.weight has shape \(0, 3\) and no entries"):
        select_parameters(net, ["0", "2"])


def test_an_excluded_layer_may_compute_its_weight() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(select_parameters(net, exclude="0")) == ["1.weight"]


def test_an_error_suggests_names_that_patterns_match_in_a_compiled_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")

    net = Net()
    with pytest.raises(ValueError, match=r"such as 'body\.0'\.") as refused:
        select_parameters(net, "encoder", warn=False)
    (suggested,) = re.findall(r"such as '(.*)'\.", str(refused.value))
    assert list(select_parameters(net, suggested))
