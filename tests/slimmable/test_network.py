"""One width as a network of its own, and all of them in one module that takes `width=`."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.coding.files import load_compressed, save_compressed
from lightning_compress.core.evaluation import evaluating
from lightning_compress.deploy.onnx_file import save_onnx
from lightning_compress.deploy.program import capture
from lightning_compress.slimmable.network import SlimmableNetwork, extract
from lightning_compress.slimmable.norms import give_norms, norms_of
from lightning_compress.slimmable.switch import set_width, width_of


class Small(nn.Module):
    """A residual network with a concatenation; the norm without scale makes its groups inexact."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False))
        self.side = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.out = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([torch.relu(x + self.block(x)), self.side(x)], 1)
        return self.out(x.mean((2, 3)))


def slimmable(norms: Any = "private") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = Small()
    inputs = torch.randn(4, 3, 6, 6)
    held = give_norms(network, channel_groups(network, inputs), [0.25, 0.5], norms, allow_inexact=True)
    with torch.no_grad():
        for tensor in (*held.parameters(), *held.buffers()):
            tensor += torch.rand_like(tensor) if tensor.is_floating_point() else 3
    return network.eval(), inputs


@pytest.mark.parametrize("norms", ["private", "statistics", "recalibrate"])
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_the_extracted_network_is_the_switched_one(norms: str, width: float) -> None:
    network, inputs = slimmable(norms)
    set_width(network, 0.5)
    found = extract(network, width, inputs)
    assert width_of(network) == 0.5
    set_width(network, width)
    torch.testing.assert_close(found(inputs), network(inputs), rtol=1e-5, atol=1e-6)
    assert type(found) is Small
    assert list(found.state_dict()) == list(Small().state_dict())
    assert width_of(found) == 1.0
    assert norms_of(found) is None
    assert found.stem[0].out_channels == 8 * width
    found.train()(inputs).sum().backward()
    assert all(one.grad is not None for one in found.parameters())


def test_the_extracted_network_has_the_full_networks_double_precision_output() -> None:
    network, inputs = slimmable()
    network.double()
    found = extract(network, 0.25, inputs.double())
    set_width(network, 0.25)
    torch.testing.assert_close(found(inputs.double()), network(inputs.double()), rtol=1e-12, atol=1e-12)


def test_a_compressed_file_of_one_width(tmp_path: Path) -> None:
    network, inputs = slimmable()
    found = extract(network, 0.25, inputs)
    save_compressed(found, tmp_path / "thin.lc")
    back = load_compressed(tmp_path / "thin.lc", Small()).eval()
    assert torch.equal(back(inputs), found(inputs))


def test_a_program_of_one_width() -> None:
    network, inputs = slimmable()
    found = extract(network, 0.25, inputs)
    program = torch.export.export(found, (inputs,))
    torch.testing.assert_close(program.module()(inputs), found(inputs))


def test_onnx_of_one_width(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    network, inputs = slimmable()
    found = extract(network, 0.25, inputs)
    save_onnx(capture(found, inputs), tmp_path / "thin.onnx")  # compares the runtime's outputs


def test_a_width_that_was_not_trained_is_not_extracted() -> None:
    network, inputs = slimmable()
    with pytest.raises(ValueError, match=r"Width 0.75 has no statistics of its own"):
        extract(network, 0.75, inputs)
    with pytest.raises(ValueError, match="has no widths"):
        extract(Small(), 0.5, inputs)


def test_one_module_for_all_widths() -> None:
    network, inputs = slimmable()
    set_width(network, 0.25)
    network.train()
    slim = SlimmableNetwork(network)
    assert not any(module.training for module in slim.modules())
    assert network.training
    with evaluating(network):
        for width in (1.0, 0.5, 0.25):
            set_width(network, width)
            torch.testing.assert_close(slim(inputs, width=width), network(inputs), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"Width 0.3 has no statistics"):
        slim(inputs, width=0.3)


def test_one_module_survives_copies_pickles_loads_and_moves() -> None:
    network, inputs = slimmable()
    slim = SlimmableNetwork(network)
    expected = slim(inputs, width=0.25)
    for other in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(other(inputs, width=0.25), expected)
    fresh, _ = slimmable()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    other = SlimmableNetwork(fresh)
    other.load_state_dict(slim.state_dict())
    assert torch.equal(other(inputs, width=0.25), expected)
    assert torch.equal(other.to(torch.float64).to(torch.float32)(inputs, width=0.25), expected)
    assert slim.double()(inputs.double(), width=0.25).dtype == torch.float64
