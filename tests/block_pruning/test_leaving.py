"""Blocks leave networks for good: what is left computes what the network did with their branches at zero."""

from __future__ import annotations

import copy
import io
import pickle

import onnx
import pytest
import torch
from support.residual import (
    attention,
    feed_forward,
    images,
    resnet,
    resnet_block,
    tokens,
    transformer,
)
from torch import Tensor, nn

from lightning_compress.block_pruning.plan import BlockError
from lightning_compress.block_pruning.prune import removed_blocks, take_out
from lightning_compress.block_pruning.stand_in import stand_ins
from lightning_compress.measure.macs import count_macs
from lightning_compress.stages.block import Block

GONE = [resnet_block(0, 1), resnet_block(1, 0), resnet_block(2, 2)]


def by_hand(net: nn.Module, x: Tensor, gone: set[str]) -> Tensor:
    """The forward pass of ResNet20, written out, without some branches."""
    h = net.relu(net.bn(net.conv(x)))
    for i, stage in enumerate(net.stages):
        for j, block in enumerate(stage):
            short = block.shortcut(h)
            h = short if f"stages.{i}.{j}" in gone else short + block.bn2(block.conv2(block.bn1(block.conv1(h)).relu()))
            h = h.relu()
    return net.fc(h.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_a_resnet_without_blocks_computes_what_its_code_does_without_their_branches(
    samples: int, training: bool
) -> None:
    dense, x = resnet().double(), torch.randn(samples, 3, 16, 12, dtype=torch.float64)
    thin = copy.deepcopy(dense)
    take_out(thin, images().double(), GONE)
    for one in (dense, thin):
        one.train(training)
    expected = by_hand(dense, x, {one.name for one in GONE})
    torch.testing.assert_close(thin(x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_gradients_of_what_is_left_are_those_of_the_code_without_the_branches() -> None:
    dense = resnet().double().train()
    thin, x = copy.deepcopy(dense), images().double()
    take_out(thin, x, GONE)
    by_hand(dense, x, {one.name for one in GONE}).square().sum().backward()
    thin(x).square().sum().backward()
    theirs = {name: one.grad for name, one in dense.named_parameters() if one.grad is not None}
    mine = {name: one.grad for name, one in thin.named_parameters()}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-9, msg=name)


def test_the_parameters_and_the_multiply_accumulates_of_blocks_are_gone() -> None:
    net, x = resnet(), images()
    before, _ = count_macs(net, x)
    others = {name: one for name, one in net.named_parameters() if "stages.1.2" not in name}
    left = take_out(net, x, [resnet_block(1, 2, 9 * 8 * 8 * 8 * 8 * 2)])
    after, _ = count_macs(net, x)
    assert before - after == 2 * 9 * 8 * 8 * 8 * 8  # two convolutions of 8 channels, at 8 x 8 positions
    assert dict(net.named_parameters()).keys() == others.keys()
    assert all(one is others[name] for name, one in net.named_parameters())
    assert {name for name in left if name.endswith("weight")} == {
        f"stages.1.2.{part}.weight" for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert removed_blocks(net) == {"stages.1.2": before - after}


def test_a_module_that_does_its_block_alone_returns_its_input() -> None:
    net = resnet()
    take_out(net, images(), [resnet_block(0, 1)])
    assert list(stand_ins(net)) == ["stages.0.1"]
    x = torch.randn(2, 4, 5, 5)
    assert net.stages[0][1](x) is x


def zeroed_by_weights(net: nn.Module, *names: str) -> nn.Module:
    for name in names:
        layer = net.get_submodule(name)
        for one in layer.parameters():
            one.data.zero_()
    return net


@pytest.mark.parametrize(
    ("blocks", "ends", "became"),
    [
        ([attention(0)], ["layers.0.out"], {"layers.0.norm1", "layers.0.qkv", "layers.0.out"}),
        ([feed_forward(1)], ["layers.1.fc2"], {"layers.1.norm2", "layers.1.fc1", "layers.1.fc2"}),
        ([attention(2), feed_forward(2)], ["layers.2.out", "layers.2.fc2"], {"layers.2"}),
    ],
)
def test_functional_code_between_modules_stays_valid(blocks: list[Block], ends: list[str], became: set[str]) -> None:
    net = transformer().double()
    expected = zeroed_by_weights(copy.deepcopy(net), *ends)
    take_out(net, tokens(), blocks)
    assert set(stand_ins(net)) == became
    for x in (tokens(1), torch.randint(20, (1, 6)), torch.randint(20, (5, 9))):  # longer texts as well
        torch.testing.assert_close(net(x), expected(x), rtol=0, atol=1e-12)


def test_code_between_modules_gets_thin_tensors_where_it_can() -> None:
    net, seen = transformer(), []
    take_out(net, tokens(), [feed_forward(0)])
    net.layers[0].fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    net(tokens())
    assert seen == [(3, 6, 1)]  # instead of 32 features, on which the code computes GELU


def test_weights_at_zero_are_not_taken_for_a_block_that_does_nothing() -> None:
    net = resnet()
    zeroed_by_weights(net, "stages.0.1.bn2", "stages.0.2.bn2")  # as networks begin that are to train deep
    take_out(net, images(), [resnet_block(0, 1)])
    assert list(stand_ins(net)) == ["stages.0.1"]
    net.stages[0][2].bn2.weight.data.fill_(1.0)
    x = torch.randn(2, 4, 5, 5)
    assert not torch.equal(net.stages[0](x), x)


class Bounded(nn.Module):
    """The activation behind the sum changes large values of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.act(x + self.conv(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Bounded()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))


def test_an_activation_with_a_bound_stays() -> None:
    net = Outer()
    take_out(net, images(), [Block("net.conv", "identity", "net.conv", "net.conv", ("net.conv",), 10)])
    x = 100 * images()
    torch.testing.assert_close(net(x), net.net.first(x).relu().clamp(max=6).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.layer(x + self.layer(x)))


def test_a_module_that_runs_twice_is_refused_by_name() -> None:
    net = Shared()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BlockError, match="'layer' can't leave Shared: 'layer' runs 2 times in one pass"):
        take_out(net, torch.randn(3, 4), [Block("layer", "identity", "layer", "layer", ("layer",), 16)])
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert not stand_ins(net)


class Reads(nn.Module):
    """Reads a weight of the branch elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.layer(x)) * self.layer.weight.mean()


def test_a_network_that_needs_the_branch_elsewhere_is_refused_and_stays() -> None:
    net, x = Reads(), torch.randn(3, 4)
    expected = net(x)
    with pytest.raises(BlockError, match="'layer' can't leave Reads: without it"):
        take_out(net, x, [Block("layer", "identity", "layer", "layer", ("layer",), 16)])
    assert torch.equal(net(x), expected)


def test_torchs_own_transformer_layers_lose_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.enc(x)

    net = Net().double().eval()
    start, x = "enc.layers.0.", torch.randn(3, 5, 8, dtype=torch.float64)
    expected = zeroed_by_weights(copy.deepcopy(net), f"{start}linear2")(x)
    modules = tuple(start + part for part in ("norm2", "linear1", "dropout", "linear2", "dropout2"))
    take_out(net, x, [Block("mlp", "identity", f"{start}norm2", f"{start}linear2", modules, 256)])
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)  # its fused kernel is off
    net.train()(x)


def test_copies_lose_the_same_blocks_and_optimizers_keep_the_state_of_the_others() -> None:
    net, x = resnet().train(), images()
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW([{"params": net.stages.parameters()}, {"params": net.fc.parameters(), "lr": 0.5}])
    net(x).sum().backward()
    optimizer.step()
    moments = {
        name: optimizer.state[one]["exp_avg"].clone()
        for name, one in net.named_parameters()
        if one.grad is not None and name.startswith("stages")
    }
    left = take_out(net, x, [resnet_block(0, 1)], optimizers=[optimizer], copies=[average])
    assert left
    assert list(stand_ins(average)) == ["stages.0.1"]
    inside = {id(one) for one in net.parameters()}
    assert all(id(one) in inside for group in optimizer.param_groups for one in group["params"])
    assert all(id(one) in inside for one in optimizer.state)
    for name, one in net.named_parameters():
        if name.startswith("stages"):
            assert torch.equal(optimizer.state[one]["exp_avg"], moments[name])
    net(x).sum().backward()
    optimizer.step()


def test_an_optimizer_with_state_for_all_parameters_together_is_refused() -> None:
    net = resnet()
    with pytest.raises(ValueError, match="LBFGS keeps its parameters in a list of its own"):
        take_out(net, images(), [resnet_block(0, 1)], optimizers=[torch.optim.LBFGS(net.parameters())])
    assert not stand_ins(net)


def test_what_is_left_is_copied_pickled_and_exported() -> None:
    net, x = resnet(), images()
    take_out(net, x, GONE)
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False)
    assert onnx.load_model_from_string(file.getvalue()).graph.node
