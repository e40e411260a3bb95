"""The deployed network: what it computes, and that it computes and reads the chosen channels alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.odd_layers import Odd
from support.small import FEATURES, SmallModule
from torch import Tensor, nn

from lightning_compress import ChannelGates
from lightning_compress.baselines import DigitsConvNet, LeNet5, ResNet20
from lightning_compress.channel_gates.find import find_layers
from lightning_compress.channel_gates.gates import LayerGates, gates_of
from lightning_compress.channel_gates.making import give_gates
from lightning_compress.channel_gates.network import ChannelGatedNetwork
from lightning_compress.measure.macs import count_macs


class Joined(nn.Module):
    """Reads two gated layers in one, in channels_last or not, and has a padding mode."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 5, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(5, affine=False)
        self.both = nn.Conv2d(10, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = self.both(torch.cat([self.left(x).relu(), x, self.norm(self.right(x)).relu()], dim=1)).relu()
        return {"logits": self.head(both.mean((2, 3)))}


NETWORKS: dict[str, Any] = {
    "digits": (lambda: DigitsConvNet(width=6), (1, 8, 8), None),
    "lenet5": (LeNet5, (1, 28, 28), None),
    "resnet": (lambda: ResNet20(width=4, in_channels=1), (1, 12, 12), None),
    "joined": (Joined, (1, 6, 6), None),
    "named": (Odd, (1, 8, 8), ["late", "branch"]),
    "tokens": (lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)), (4, 5), None),
}


def gated(name: str, share: float = 0.5, samples: int = 5, *, groups: bool = False) -> tuple[nn.Module, Tensor]:
    """A network in double precision with gates that choose different channels for different samples."""
    torch.manual_seed(0)
    make, shape, names = NETWORKS[name]
    network, x = make().double(), torch.randn(samples, *shape, dtype=torch.double)
    for _ in range(3):
        network(torch.randn(16, *shape, dtype=torch.double))
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.bias)
    found = find_layers(network, x, names)
    orders = {layer.name: torch.randperm(layer.channels).tolist() for layer in found.layers}
    gates = LayerGates(found.layers, share, orders if groups else None).double()
    for gate in gates.by_layer().values():
        for parameter in gate.parameters():
            nn.init.normal_(parameter, mean=float(not groups) * (parameter.dim() == 1), std=0.5)
    give_gates(network, gates)
    return network, x


def logits(output: Any) -> Tensor:
    found: Tensor = output["logits"] if isinstance(output, dict) else output
    return found


@pytest.mark.parametrize("share", [0.3, 0.5, "groups"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_way_to_run_it_answers_as_the_network_with_gates(name: str, share: Any) -> None:
    network, x = gated(name, groups=True) if share == "groups" else gated(name, share)
    expected = logits(network(x))
    deployed = ChannelGatedNetwork(network, x, min_gain=None)
    assert all(deployed.sliced.values())
    for way in ("dense", "sets", "single"):
        deployed.batched = way
        torch.testing.assert_close(logits(deployed(x)), expected, rtol=0, atol=1e-12)
    for again in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        singly = torch.cat([logits(again(one[None])) for one in x])
        torch.testing.assert_close(singly, expected, rtol=0, atol=1e-12)
    assert torch.equal(logits(network(x)), expected)  # the network itself is as it was


class Counted:
    """Notes the shapes of the weights with which convolutions and linear layers compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        for name in ("conv2d", "linear"):
            monkeypatch.setattr(F, name, self._counting(getattr(F, name)))

    def _counting(self, function: Any) -> Any:
        def counted(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.shapes.append((weight.shape[0], weight.shape[1]))
            return function(x, weight, *args, **kwargs)  # type: ignore[no-any-return]

        return counted


@torch.no_grad()
def test_one_sample_computes_and_reads_the_chosen_channels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = gated("digits", samples=2)
    deployed = ChannelGatedNetwork(network, x, min_gain=None)
    counted = Counted(monkeypatch)
    deployed(x[:1])
    gates = [(6, 1), (6, 3), (12, 3), (12, 6)]
    layers = [(3, 1), (3, 3), (6, 3), (6, 6), (10, 6 * 4)]
    assert counted.shapes == [*(one for both in zip(gates, layers, strict=False) for one in both), layers[-1]]
    full, few = count_macs(DigitsConvNet(width=6).double().eval(), x[:1])[0], count_macs(deployed, x[:1])[0]
    assert few < 0.35 * full  # half of the channels of both sides of most convolutions, and the gates


@torch.no_grad()
def test_samples_of_one_set_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = gated("digits", samples=2)
    deployed = ChannelGatedNetwork(network, x, min_gain=None)
    gates = gates_of(deployed.network) or deployed.gates
    first = gates.by_layer()["conv1"]
    alike = x[[0, 1, 0, 0]]
    counted = Counted(monkeypatch)
    deployed(alike)
    sets = {
        tuple(row.tolist()) for row in first.choose(first(x.abs().mean((2, 3))), 0.5, "gates", torch.Generator(), 0.0)
    }
    assert counted.shapes[1 : 1 + len(sets)] == [(3, 1)] * len(sets)


@torch.no_grad()
def test_what_does_not_pay_is_not_done() -> None:
    network, x = gated("digits", samples=3)
    deployed = ChannelGatedNetwork(network, x, min_gain=1.0, rounds=1)
    assert not any(deployed.sliced.values())
    assert deployed.batched == "dense"
    torch.testing.assert_close(deployed(x), network(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(deployed(x[:1]), network(x[:1]), rtol=0, atol=1e-12)


def test_deploy_of_the_wrapper_is_its_network_in_evaluation() -> None:
    torch.manual_seed(0)
    module = ChannelGates(SmallModule(), example_inputs=torch.zeros(2, FEATURES))
    x = torch.randn(4, FEATURES)
    for options in ({}, {"min_gain": None}, {"example_inputs": x}):
        deployed = module.deploy(**options)
        assert not deployed.training
        torch.testing.assert_close(deployed(x), module.eval()(x))
    assert "scale" not in " ".join(module.state_dict())
    late = ChannelGates(SmallModule())
    with pytest.raises(ValueError, match=r"deploy\(\) needs gates and example inputs: fit or load the module first"):
        late.deploy()
    with pytest.raises(ValueError, match="SmallModule has no gates: wrap its module in ChannelGates first"):
        ChannelGatedNetwork(SmallModule(), x)
