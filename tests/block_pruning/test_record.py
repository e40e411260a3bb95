"""Blocks that have left, in files and checkpoints: what another process gets, and what a plain class is told."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.residual import attention, feed_forward, images, resnet, resnet_block, tokens, transformer
from torch import nn

from lightning_compress import cut, load_compressed, save_compressed
from lightning_compress.block_pruning.prune import removed_blocks, take_out
from lightning_compress.block_pruning.stand_in import stand_ins
from lightning_compress.channels.find import channel_groups
from lightning_compress.core.records import KEY, RecordError
from lightning_compress.core.structure import following
from lightning_compress.quantization.input_grids import InputGrid, quantize_inputs

GONE = [resnet_block(0, 1), resnet_block(1, 0), resnet_block(2, 2)]


def without_blocks() -> nn.Module:
    net = resnet()
    take_out(net, images(), GONE)
    return net


@pytest.mark.parametrize("name", ["net.lcz", "net.pt"])
def test_load_compressed_takes_the_blocks_out_of_the_dense_class(name: str, tmp_path: Path) -> None:
    net = without_blocks()
    if name.endswith("pt"):
        torch.save(net.state_dict(), tmp_path / name)
    else:
        save_compressed(net, tmp_path / name)
    loaded = load_compressed(tmp_path / name, resnet(seed=5))
    assert torch.equal(loaded.eval()(images(1)), net(images(1)))
    assert removed_blocks(loaded) == removed_blocks(net)
    assert loaded.state_dict()._metadata == net.state_dict()._metadata


def test_zeros_between_functions_come_back_as_well(tmp_path: Path) -> None:
    net = transformer()
    take_out(net, tokens(), [attention(0), feed_forward(1)])
    save_compressed(net, tmp_path / "net.lcz")
    loaded = load_compressed(tmp_path / "net.lcz", transformer(seed=3))
    assert torch.equal(loaded(tokens(1)), net(tokens(1)))


def cut_in_half(net: nn.Module) -> nn.Module:
    free = [one for one in channel_groups(net, images()) if one.frozen is None and one.exact]
    return cut(net, images(), keep={one.name: range(one.size // 2) for one in (free[0], free[-1])})


def test_cuts_of_channels_come_before_and_after(tmp_path: Path) -> None:
    net = cut_in_half(resnet())
    take_out(net, images(), GONE)
    cut_in_half(net)
    save_compressed(net, tmp_path / "net.lcz")
    loaded = load_compressed(tmp_path / "net.lcz", resnet(seed=5))
    assert torch.equal(loaded.eval()(images(1)), net(images(1)))


def test_a_plain_class_is_told_what_has_left() -> None:
    state = without_blocks().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks have left: load_compressed takes the same blocks"):
        resnet().load_state_dict(state)
    with pytest.warns(UserWarning, match=r"still has them, .* at stages\.0\.1, stages\.1\.0\.conv1"):
        resnet().load_state_dict(state, strict=False)


def test_the_state_dict_of_the_dense_network_brings_blocks_back() -> None:
    dense, net = resnet(), without_blocks()
    net.double().load_state_dict(dense.state_dict())
    assert not stand_ins(net)
    assert {one.dtype for one in net.parameters()} == {torch.float64}
    torch.testing.assert_close(net.float()(images(1)), dense(images(1)))
    net(images()).sum().backward()
    assert all(one.grad is not None for one in net.parameters())


def test_a_state_dict_with_other_blocks_exchanges_them() -> None:
    net, other = without_blocks(), resnet(seed=2)
    take_out(other, images(), [resnet_block(0, 1), resnet_block(0, 2)])
    with following(net):
        net.load_state_dict(other.state_dict())
    assert list(removed_blocks(net)) == ["stages.0.1", "stages.0.2"]
    assert torch.equal(net(images(1)), other(images(1)))


def test_a_load_that_fails_changes_nothing() -> None:
    net, expected = without_blocks(), without_blocks()(images(1))
    state = resnet().state_dict()
    del state["fc.weight"]
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        copy.deepcopy(net).load_state_dict(state)
    assert torch.equal(net(images(1)), expected)


@pytest.mark.parametrize(
    "returns",
    [
        None,
        {},
        {"input": []},
        {"input": [0], "zeros": [1]},
        {"zeros": [[0, 0, 0]], "like": [0]},
        {"zeros": [-1], "like": [0]},
        {"items": [{"input": [0]}], "kind": "set"},
        {"constant": [1]},
        {"zeros": [1], "like": [0], "dtype": "object"},
    ],
)
def test_a_record_that_no_version_writes_is_refused(returns: object) -> None:
    state = without_blocks().state_dict()
    state._metadata["stages.0.1"][KEY]["depth"]["returns"] = returns
    net = resnet(seed=5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RecordError, match="which is no output"), following(net):
        net.load_state_dict(state)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())


def test_a_record_of_a_block_whose_tensors_come_is_refused() -> None:
    state, dense = without_blocks().state_dict(), resnet().state_dict()
    state["stages.0.1.conv1.weight"] = dense["stages.0.1.conv1.weight"]
    net = resnet(seed=5)
    with (
        pytest.raises(RecordError, match=r"has left, and the state dict has its 'stages\.0\.1\.conv1\.weight'"),
        following(net),
    ):
        net.load_state_dict(state)


def test_blocks_with_hooks_leave_a_network_that_can_still_be_copied() -> None:
    """The hooks of a block's layers, as for quantized inputs, belong to layers that are no longer alive."""
    net = resnet()
    grids = {name: InputGrid(0.1, 0, 8) for name, one in net.named_modules() if isinstance(one, nn.Conv2d)}
    quantize_inputs(net, grids)
    take_out(net, images(), GONE)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(images()), net(images()))
    twin.load_state_dict(resnet(seed=5).state_dict())
    assert not stand_ins(twin)
