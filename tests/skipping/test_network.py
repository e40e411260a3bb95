"""A network that skips blocks answers as one whose branches are multiplied by 0 or 1, and runs no more than that."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from support.reference import randomize, to_double
from support.zoo import ZOO
from torch import Tensor, nn

from lightning_compress.baselines.networks import ResNet20
from lightning_compress.core.example_inputs import call
from lightning_compress.core.hooks import hooked
from lightning_compress.core.outputs import select_output
from lightning_compress.skipping.network import SkippingNetwork
from lightning_compress.stages.blocks import Block, FoundBlocks, find_blocks
from lightning_compress.stages.branch_hooks import gated
from lightning_compress.stages.split import MixedSamplesError, axes_of, different


class Gates(nn.Module):
    """Gates of any kind, about half of them open: the sine of a linear layer of the mean of what they read."""

    def __init__(self, blocks: tuple[Block, ...], kind: str, widths: list[int], rates: Any = None) -> None:
        super().__init__()
        self.blocks, self.kind, self.calls = blocks, kind, 0
        self.layers = nn.ModuleList([nn.Linear(width, len(blocks)) for width in widths]).double()
        self.register_buffer("rates", torch.full((len(blocks),), torch.nan) if rates is None else torch.tensor(rates))

    def pooled(self, k: int, x: Tensor) -> Tensor:
        features = x.mean((2, 3)) if x.dim() == 4 else x.flatten(1, -2).mean(1) if x.dim() > 2 else x
        layer = self.layers[k]
        return torch.nn.functional.linear(1e3 * features.to(layer.weight.dtype), layer.weight, layer.bias).sin()

    def logit(self, k: int, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.calls += 1
        if self.kind == "policy":
            state = self.pooled(0, x) if state is None else state
            return state[:, k], state
        found = self.pooled(k, x)
        if self.kind == "recurrent":
            found = found + (0.0 if state is None else state.tanh().flip(1))
        return found[:, k], found


@cache
def of_resnet() -> FoundBlocks:
    return find_blocks(*resnet())


def gates_for(network: nn.Module, inputs: Any, kind: str, rates: Any = None, names: Any = None) -> Gates:
    found = of_resnet() if isinstance(network, ResNet20) else find_blocks(network, inputs)
    blocks = tuple(block for block in found.candidates if block.name in names) if names else found.blocks
    widths: dict[int, int] = {}

    def look(k: int, x: Tensor) -> None:
        widths[k] = x.shape[1] if x.dim() == 4 else x.shape[-1]

    with torch.no_grad(), hooked(*gated(network, blocks, look)):
        call(network, inputs)
    return Gates(blocks, kind, [widths[k] for k in range(len(blocks))], rates)


def with_hooks(network: nn.Module, gates: Gates, inputs: Any, fixed: dict[int, bool] | None = None) -> Any:
    """The answer of the network whose branches are multiplied by what the gates say, and what they say."""
    state: list[Any] = [None]
    said: dict[int, Tensor] = {}

    def decide(k: int, x: Tensor) -> Tensor:
        logit, state[0] = gates.logit(k, x, state[0])
        said[k] = torch.full_like(logit, (fixed or {})[k]) if k in (fixed or {}) else (logit > 0).to(logit.dtype)
        return said[k]

    with torch.no_grad(), hooked(*gated(network, gates.blocks, decide)):
        answer = select_output(call(network, inputs), None, "network")
    return answer, torch.stack([said[k] for k in range(len(gates.blocks))], 1).bool()


def resnet(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    network = ResNet20(width=4).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return network, torch.randn(11, 3, 12, 12, dtype=torch.double)


def same(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())


KINDS = ["per_block", "recurrent", "policy"]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_network_with_factors(kind: str) -> None:
    network, x = resnet()
    gates = gates_for(network, x, kind)
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    expected, said = with_hooks(network, gates, x)
    assert 0.2 < float(said.double().mean()) < 0.8
    with torch.no_grad():
        got, ran = skipping.decisions(x)
        alone = [skipping.decisions(one[None]) for one in x]
    assert torch.equal(ran, said)
    assert same(got, expected)
    assert same(torch.cat([one for one, _ in alone]), expected)
    assert torch.equal(torch.cat([one for _, one in alone]), said)
    assert same(skipping(x), expected)  # with gradients, nothing is written to what they need


@pytest.mark.parametrize(
    ("name", "kind"),
    [("swin", "policy"), ("gpt2", "recurrent"), ("bert", "policy"), ("convnext", "per_block"), ("mixer", "policy")],
)
def test_networks_of_all_kinds(name: str, kind: str) -> None:
    torch.manual_seed(0)
    network, example = randomize(ZOO[name].make(), seed=1).double().eval(), to_double(ZOO[name].inputs())
    axes = axes_of(network, example, None)
    leaves = different(axes)
    inputs = dict(zip(example, leaves, strict=True)) if isinstance(example, dict) else leaves[0]
    gates = gates_for(network, inputs, kind)
    skipping = SkippingNetwork(network, gates, example).eval()
    expected, said = with_hooks(network, gates, inputs)
    with torch.no_grad():
        got, ran = skipping.decisions(**inputs) if isinstance(inputs, dict) else skipping.decisions(inputs)
    assert torch.equal(ran, said)
    assert same(got, expected, 1e-9)


@contextmanager
def counted(skipping: nn.Module) -> Iterator[dict[str, int]]:
    """How many samples each convolution has seen, by the operators themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, int] = {}
    names = {id(one): name.removesuffix(".weight") for name, one in skipping.named_parameters()}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default:
                name = names[id(args[1])].removeprefix("network.")
                found[name] = found.get(name, 0) + args[0].shape[0]
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_runs_for_the_samples_that_need_it_and_no_others(kind: str) -> None:
    network, x = resnet()
    gates = gates_for(network, x, kind)
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    _, said = with_hooks(network, gates, x)
    with counted(skipping) as found:
        skipping(x)
    for k, block in enumerate(gates.blocks):
        assert found.get(f"{block.name}.conv1", 0) == found.get(f"{block.name}.conv2", 0) == int(said[:, k].sum())
    assert found["conv"] == found["stages.1.0.conv1"] == len(x)
    for runs in (False, True):
        with torch.no_grad():
            for layer in gates.layers:
                layer.weight.zero_()
                layer.bias.fill_(1.0 if runs else -1.0)
        if kind == "recurrent":
            continue
        for samples in (1, 5):
            with counted(skipping) as found:
                skipping(x[:samples])
            assert [found.get(f"{block.name}.conv1", 0) for block in gates.blocks] == [samples * runs] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_static_gates_are_not_computed(kind: str) -> None:
    network, x = resnet()
    names = [block.name for block in of_resnet().blocks]
    gates = gates_for(network, x, kind, rates=[0.99, 0.01, 0.5, 0.5, 0.04, 0.96, 0.5])
    skipping = SkippingNetwork(network, gates, x[:3], min_gain=-1e9, never=[names[6]]).eval()
    assert skipping.always == (names[0], names[5])
    assert skipping.never == (names[1], names[4], names[6])
    fixed = {0: True, 1: False, 4: False, 5: True, 6: False}
    gates.calls = 0
    with torch.no_grad():
        got, ran = skipping.decisions(x)
    assert gates.calls == {"per_block": 2, "recurrent": 4, "policy": 1}[kind]
    expected, said = with_hooks(network, gates, x, fixed)
    assert torch.equal(ran, said)
    assert same(got, expected)


@pytest.mark.parametrize("kind", ["per_block", "policy"])
def test_what_does_not_pay_runs_for_all(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    network, x = resnet()
    gates = gates_for(network, x, kind, rates=[0.5] * 7)
    with caplog.at_level(logging.INFO, "lightning_compress"):
        skipping = SkippingNetwork(network, gates, x[:3], min_gain=1e9).eval()
    assert len(skipping.always) == 7
    assert sum("runs for all samples" in one.getMessage() for one in caplog.records) == 7
    gates.calls = 0
    with torch.no_grad():
        assert same(skipping(x), network(x))
    assert gates.calls == 0
    assert not SkippingNetwork(network, gates, x[:3], min_gain=-1e9).always


def test_the_host_waits_once_for_a_policy() -> None:
    network, x = resnet()
    gates = gates_for(network, x, "policy")
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    from torch.utils._python_dispatch import TorchDispatchMode

    asked: list[str] = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Waits():
        skipping(x)
    assert not asked  # the decisions are copied to the host; nothing else depends on the data


def test_samples_that_need_a_block_are_neighbours_where_that_saves_gathering() -> None:
    network, x = resnet()
    gates = gates_for(network, x, "policy")
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    with torch.no_grad():
        gates.layers[0].weight[1:] = gates.layers[0].weight[0]  # two policies: all blocks, or none
        gates.layers[0].bias[1:] = gates.layers[0].bias[0]
        expected, said = with_hooks(network, gates, x)
        assert 0 < int(said[:, 0].sum()) < len(x)
        with counted_gathers() as found:
            got = skipping(x)
    assert same(got, expected)
    assert found == [len(x)]  # the whole batch, once


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.index_select.default:
                found.append(len(args[2]))
            return func(*args, **(kwargs or {}))

    with Count():
        yield found


def test_copies_pickles_and_weights_that_change() -> None:
    network, x = resnet()
    gates = gates_for(network, x, "policy")
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    with torch.no_grad():
        before = skipping(x)
        for other in (copy.deepcopy(skipping), pickle.loads(pickle.dumps(skipping))):
            assert torch.equal(other(x), before)
        network.stages[0][1].conv1.weight.normal_()
        assert same(skipping(x), with_hooks(network, gates, x)[0])
        assert same(other(x), before)
        skipping.float()
        assert skipping(x.float()).dtype == torch.float32
        network.stages[0][1].conv1.weight.data = torch.randn(5, 4, 3, 3)  # as a cut of channels does
        network.stages[0][1].bn1 = nn.BatchNorm2d(5).eval()
        network.stages[0][1].conv2.weight.data = torch.randn(4, 5, 3, 3)
        got, said = skipping.decisions(x.float())
        expected, expected_said = with_hooks(network, gates, x.float())
        assert torch.equal(said, expected_said)
        assert same(got, expected, 1e-5)


class Typed(nn.Module):
    """A network whose code asks for the type of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.block1, self.block2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * torch.ones(4, dtype=self.stem.weight.dtype)
        x = x + self.block1(x)
        return x + self.block2(x)


@pytest.mark.parametrize("min_gain", [-100.0, 100.0])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: one])
def test_networks_may_be_of_another_type_before_they_are_called(copied: Any, min_gain: float) -> None:
    torch.manual_seed(0)
    network, x = Typed().double().eval(), torch.randn(5, 6, dtype=torch.float64)
    gates = gates_for(network, x, "per_block", [0.5, 0.5])
    skipping = SkippingNetwork(network, gates, x, min_gain=min_gain).eval()
    expected = with_hooks(network, gates, x, {0: True, 1: True} if min_gain > 0 else None)[0]
    with torch.no_grad():
        assert same(copied(skipping).float()(x.float()), expected.float(), 1e-5)


def test_projections_and_no_samples() -> None:
    network, x = resnet()
    gates = gates_for(network, x, "policy", names=["stages.0.1", "stages.1.0", "stages.2.0", "stages.2.1"])
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    expected, said = with_hooks(network, gates, x)
    with torch.no_grad():
        got, ran = skipping.decisions(x)
        none, nobody = skipping.decisions(x[:0])
    assert torch.equal(ran, said)
    assert same(got, expected)
    assert (none.shape, nobody.shape) == ((0, 10), (0, 4))


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return self.fc(x + self.layer(x))


def test_what_is_refused() -> None:
    network, x = resnet()
    gates = gates_for(network, x, "per_block")
    skipping = SkippingNetwork(network, gates, x[:3]).eval()
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        skipping.train()(x)
    with pytest.raises(ValueError, match=r"There is no block 'stages\.7' with a gate"):
        SkippingNetwork(network, gates, x[:3], always=["stages.7"])
    with pytest.raises(ValueError, match="stands in always= and in never="):
        SkippingNetwork(network, gates, x[:3], always=["stages.0.0"], never=["stages.0.0"])
    with pytest.raises(ValueError, match="An input is a tensor of shape"):
        skipping.eval()(x[..., :8])
    mixes = Mixes().double()
    with pytest.raises(MixedSamplesError, match="Mixes mixes the samples"):
        SkippingNetwork(mixes, gates_for(mixes, x[:, 0, 0, :4], "per_block"), x[:, 0, 0, :4])
    gates.blocks = (copy.copy(gates.blocks[0]).__class__("gone", "identity", "a", "b", (), 1), *gates.blocks[1:])
    with pytest.raises(ValueError, match="has no block 'gone' any more"):
        SkippingNetwork(network, gates, x[:3])
