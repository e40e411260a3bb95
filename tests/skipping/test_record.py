"""Gates in state dicts, checkpoints and compressed files, and in classes that know nothing of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gated import KINDS, gated_net
from support.small import FEATURES, SmallModule, SmallNet, plain, quiet_trainer
from torch import nn

from lightning_compress import SkippableBlocks, cut, load_compressed, save_compressed
from lightning_compress.core.records import KEY, RecordError
from lightning_compress.skipping.gates import gates_of

X = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(3))


def with_rates(kind: Any = "per_block") -> SmallNet:
    net, gates = gated_net(kind)
    gates.rates = torch.tensor([0.25, float("nan")], dtype=torch.float64)
    return net


def assert_same(model: nn.Module, net: nn.Module) -> None:
    gates, expected = gates_of(model), gates_of(net)
    assert gates is not None
    assert expected is not None
    assert (gates.blocks, gates.features, gates.macs, gates.kind) == (
        expected.blocks,
        expected.features,
        expected.macs,
        expected.kind,
    )
    torch.testing.assert_close(gates.rates, expected.rates, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(model.eval()(X), net.eval()(X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_file_gives_the_plain_class_its_gates(kind: Any, tmp_path: Path) -> None:
    net = with_rates(kind)
    save_compressed(net, tmp_path / "small.lcz")
    model = load_compressed(tmp_path / "small.lcz", SmallNet(residual=True))
    assert_same(model, net)
    assert_same(copy.deepcopy(model), net)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_cut_with_the_channels_that_they_read_and_come_back_from_a_file(kind: Any, tmp_path: Path) -> None:
    net = with_rates(kind)
    cut(net, X, remove={"conv": [1, 4], "block1.conv1": [0]})
    save_compressed(net, tmp_path / "small.lcz")
    model = load_compressed(tmp_path / "small.lcz", SmallNet(residual=True))
    assert model.conv.weight.shape[0] == 4
    assert_same(model, net)


@pytest.mark.parametrize("loaded", [False, True])
def test_shares_are_of_the_network_after_a_cut(loaded: bool, tmp_path: Path) -> None:
    wrapped = SkippableBlocks(SmallModule(residual=True), target=0.6, network="net", example_inputs=X[:3])
    cut(wrapped.net, X, remove={"conv": [1, 4], "block1.conv1": [0, 2]})
    if loaded:
        save_compressed(wrapped.net, tmp_path / "small.lcz")
        other = SmallModule(residual=True)
        load_compressed(tmp_path / "small.lcz", other.net)
        wrapped = SkippableBlocks(other, target=0.6, network="net", example_inputs=X[:3])
    found, gates = wrapped.measure(plain()), gates_of(wrapped.net)
    assert gates is not None
    first, second = 2 * 4 * 4 * 3 * FEATURES, 2 * 4 * 6 * 3 * FEATURES  # by hand: each has two convolutions
    assert [one.macs for one in gates.blocks] == [first, second]
    assert gates.macs == 4 * 3 * FEATURES + first + second + 4 * FEATURES * 16 + 16 * 3
    assert found.used == pytest.approx(1.0)  # all gates are open


def test_a_plain_class_loads_the_network_strictly_and_is_told_what_it_leaves() -> None:
    net, other = with_rates(), SmallNet(residual=True)
    with pytest.warns(UserWarning, match="everything but the gates at 'skip_gates'.*runs all blocks for every sample"):
        other.load_state_dict(net.state_dict())
    assert gates_of(other) is None
    assert all(torch.equal(one, net.state_dict()[name]) for name, one in other.state_dict().items())


def test_a_wrapper_takes_the_gates_that_a_network_has_and_those_of_a_checkpoint(tmp_path: Path) -> None:
    module = SmallModule(residual=True)
    module.net = with_rates()
    wrapped = SkippableBlocks(module, None, target=0.6, network="net")
    assert_same(wrapped.net, with_rates())
    quiet_trainer().validate(wrapped, plain(), verbose=False)
    fresh = SkippableBlocks(SmallModule(residual=True), target=0.6, network="net")
    assert gates_of(fresh.net) is None
    fresh.load_state_dict(module.state_dict())
    assert_same(fresh.net, with_rates())
    with pytest.raises(ValueError, match="has gates before block1, block2 already, and blocks= says block1"):
        SkippableBlocks(module, ["block1"], network="net")
    with pytest.raises(ValueError, match="gates of the kind 'per_block' already; got gate='policy'"):
        SkippableBlocks(module, gate="policy", network="net")


def test_gates_of_another_kind_are_refused_and_change_nothing() -> None:
    net, other = with_rates("policy"), with_rates("per_block")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        RecordError,
        match="of the kind policy before block1, block2, and this one has gates of the kind per_",
    ):
        other.load_state_dict(net.state_dict())
    assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate", "none"),
        ("macs", 10),
        ("macs", True),
        ("blocks", []),
        ("blocks", [{"name": "block1"}]),
        ("features", [[3, 1, 6]]),
        ("features", [[3, 1, 6], [3, 1, 1 << 40]]),
        ("features", [[3, 3, 6], [3, 1, 6]]),
        ("rates", [0.5]),
        ("rates", [0.5, 1.5]),
        ("rates", [0.5, "x"]),
    ],
)
def test_a_record_with_nonsense_is_refused(field: str, value: Any) -> None:
    state = with_rates().state_dict()
    state._metadata[""][KEY]["gates"][field] = value  # type: ignore[attr-defined]
    module = SmallModule(residual=True)
    wrapped = SkippableBlocks(module, network="net", target=0.6)
    with pytest.raises(RecordError, match="The record of gates has"):
        wrapped.net.load_state_dict(state)
    assert gates_of(wrapped.net) is None


def test_a_block_that_the_class_lacks_is_refused() -> None:
    state = with_rates().state_dict()
    state._metadata[""][KEY]["gates"]["blocks"][0]["ends"] = "block9"  # type: ignore[attr-defined]
    wrapped = SkippableBlocks(SmallModule(residual=True), network="net", target=0.6)
    with pytest.raises(RecordError, match="'block1' with a module 'block9', which SmallNet does not have"):
        wrapped.net.load_state_dict(state)
