"""A network switches to a width in place, and back, whatever happens to it in between."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.widths import cut_copy
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.core.answering import answering_now
from lightning_compress.quantization.input_grids import InputGrid, quantize_inputs
from lightning_compress.slimmable.norms import give_norms, norms_of, sliced_norms, take_norms
from lightning_compress.slimmable.switch import Switched, find_groups, set_width, thin_of, width_of
from lightning_compress.slimmable.widths import counts_at


def slimmable(norms: Any = "private") -> tuple[nn.Module, Tensor]:
    """A network with widths, whose statistics differ between them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    ).double()
    inputs = torch.randn(4, 3, 6, 6, dtype=torch.double)
    held = give_norms(network, channel_groups(network, inputs), [0.25, 0.5], norms)
    with torch.no_grad():
        for tensor in (*held.parameters(), *held.buffers()):
            if tensor.is_floating_point():
                tensor += torch.rand_like(tensor)
    return network.eval(), inputs


def by_hand(network: nn.Module, width: float, inputs: Tensor) -> Tensor:
    """The output of a copy that was cut, with the norms of the width."""
    plain = copy.deepcopy(network)
    vars(plain).pop("forward", None)
    held = norms_of(plain)
    assert held is not None
    groups = held.groups
    assert groups is not None
    norms = held.of(width)
    take_norms(plain)
    made = cut_copy(plain, groups, counts_at(groups, width), inputs) if width < 1.0 else plain
    with torch.no_grad():
        for path, norm in norms.items():
            for name, tensor in norm.state_dict().items():
                getattr(made.get_submodule(path), name).copy_(tensor)
        return made(inputs)


def check(network: nn.Module, inputs: Tensor) -> None:
    """Every width computes what its cut copy does, with and without gradients; the network runs at width 0.5 then."""
    for width in (0.25, 1.0, 0.5):
        set_width(network, width)
        assert width_of(network) == width
        expected = by_hand(network, width, inputs)
        torch.testing.assert_close(network(inputs).detach(), expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(network(inputs), expected, rtol=1e-12, atol=1e-12)


def through_pickle(network: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(network))


def through_a_file(network: nn.Module) -> nn.Module:
    held = io.BytesIO()
    torch.save(network, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


def trained(network: nn.Module) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    x = torch.randn(8, 3, 6, 6, dtype=torch.double)
    network.train()
    for _ in range(2):
        sum(network(x).square().sum() for _ in range(2)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def loaded(network: nn.Module) -> nn.Module:
    state = {name: one * 1.25 if one.is_floating_point() else one for name, one in network.state_dict().items()}
    network.load_state_dict(state)
    return network


def quantized(network: nn.Module) -> nn.Module:
    quantize_inputs(network, {"3": InputGrid(0.25, 0, 8)})
    return network


def written(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.data.mul_(torch.rand_like(parameter) < 0.5)  # as a mask may
    return network


FATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda network: network,
    "a deepcopy": copy.deepcopy,
    "a pickle": through_pickle,
    "a file": through_a_file,
    "another type and back": lambda network: network.to(torch.float32).to(torch.float64),
    "a load": loaded,
    "training": trained,
    "quantized inputs": quantized,
    "writes through .data": written,
}


@pytest.mark.parametrize("norms", ["private", "statistics", "recalibrate"])
@pytest.mark.parametrize("fate", FATES)
def test_widths_survive(fate: str, norms: str) -> None:
    network, inputs = slimmable(norms)
    check(network, inputs)  # width 0.5 stays
    other = FATES[fate](network)
    assert width_of(other) == 0.5
    torch.testing.assert_close(other(inputs).detach(), by_hand(other, 0.5, inputs), rtol=1e-12, atol=1e-12)
    check(other, inputs)
    check(network, inputs)


def test_a_copy_shares_nothing_with_the_network() -> None:
    network, inputs = slimmable()
    set_width(network, 0.5)
    other = copy.deepcopy(network)
    before = network(inputs).detach()
    with torch.no_grad():
        other[0].weight.zero_()
    assert torch.equal(network(inputs), before)
    assert answering_now(other) is not answering_now(network)


def test_keys_stay_but_for_the_norms() -> None:
    network, _ = slimmable()
    keys = [name for name in network.state_dict() if not name.startswith("width_norms.")]
    set_width(network, 0.25)
    assert [name for name in network.state_dict() if not name.startswith("width_norms.")] == keys
    set_width(network, 1.0)
    take_norms(network)
    assert list(network.state_dict()) == keys
    assert "forward" not in vars(network)


def test_the_full_network_is_untouched_bit_for_bit() -> None:
    network, inputs = slimmable()
    plain = copy.deepcopy(network)
    take_norms(plain)
    check(network, inputs)
    set_width(network, 1.0)
    assert torch.equal(network(inputs), plain(inputs))


def test_hooks_run_once_at_every_width() -> None:
    network, inputs = slimmable()
    set_width(network, 0.5)
    network(inputs)
    seen: list[tuple[str, int]] = []
    handles = [
        network.register_forward_hook(lambda module, args, output: seen.append(("network", output.shape[1]))),
        network[3].register_forward_hook(lambda module, args, output: seen.append(("layer", output.shape[1]))),
    ]
    network(inputs)
    assert seen == [("layer", 6), ("network", 4)]
    for handle in handles:
        handle.remove()
    network(inputs)
    assert len(seen) == 2


def test_widths_by_group() -> None:
    network, inputs = slimmable()
    groups = norms_of(network).groups
    share = {"0": 0.5, "3": 1.0}
    with pytest.raises(ValueError, match="Width by group has no statistics of its own for norms, such as '1'"):
        set_width(network, share)
    assert width_of(network) == 1.0
    held = sliced_norms(network, groups, counts_at(groups, share))
    keys = list(network.state_dict())
    set_width(network, share, norms=held)
    assert width_of(network) == share
    assert list(network.state_dict()) == keys
    expected = cut_copy(_plain(network), groups, {"0": 4}, inputs)(inputs)
    torch.testing.assert_close(network(inputs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(network)(inputs), expected, rtol=1e-12, atol=1e-12)
    other = {"0": 1.0, "3": 0.25}
    with pytest.raises(ValueError, match="Width by group has no statistics of its own"):
        set_width(network, other)
    set_width(network, other, norms=sliced_norms(network, groups, counts_at(groups, other)))
    other_expected = cut_copy(_plain(network), groups, {"3": 3}, inputs)(inputs)
    torch.testing.assert_close(network(inputs), other_expected, rtol=1e-12, atol=1e-12)
    set_width(network, share)  # it has kept its statistics
    torch.testing.assert_close(network(inputs), expected, rtol=1e-12, atol=1e-12)


def _plain(network: nn.Module) -> nn.Module:
    found = copy.deepcopy(network)
    vars(found).pop("forward", None)
    take_norms(found)
    return found


def test_a_width_that_was_not_trained() -> None:
    network, inputs = slimmable()
    with pytest.raises(ValueError, match=r"Width 0.75 has no statistics .*'1'.* choose one of 0.25, 0.5, 1, or recal"):
        set_width(network, 0.75)
    with pytest.raises(ValueError, match=r"Width 0.5 has norms of its own already"):
        set_width(network, 0.5, norms={})
    groups = norms_of(network).groups
    set_width(network, 0.75, norms=sliced_norms(network, groups, counts_at(groups, 0.75)))
    expected = cut_copy(_plain(network), groups, {"0": 6, "3": 9}, inputs)(inputs)
    torch.testing.assert_close(network(inputs), expected, rtol=1e-12, atol=1e-12)


def test_a_network_without_norms_runs_at_any_width() -> None:
    network = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    inputs = torch.randn(2, 3)
    give_norms(network, channel_groups(network, inputs), [0.5])
    set_width(network, 0.3)
    assert answering_now(network)[0].out_features == 3
    with pytest.raises(ValueError, match=r"Width 0.99 keeps every channel"):
        set_width(network, 0.99)
    assert width_of(network) == 0.3


def test_without_widths_or_groups() -> None:
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no widths: wrap its module in SlimmableWidth"):
        set_width(plain, 0.5)
    assert width_of(plain) == 1.0
    network, inputs = slimmable()
    norms_of(network).groups = None
    with pytest.raises(ValueError, match=r"groups of Sequential are not known.*find_groups"):
        set_width(network, 0.5)
    find_groups(network, inputs)
    check(network, inputs)
    find_groups(network, inputs)  # at width 0.5
    assert width_of(network) == 0.5
    check(network, inputs)


def test_thin_networks_are_kept() -> None:
    network, inputs = slimmable()
    assert thin_of(network, 0.5) is thin_of(network, 0.5)
    set_width(network, 0.25)
    network(inputs)
    first = thin_of(network, 0.5)
    set_width(network, 0.5)
    assert answering_now(network) is first.module


@pytest.mark.filterwarnings("ignore")
def test_a_switched_network_pickles_without_its_thin_networks() -> None:
    network, inputs = slimmable()
    plain = len(pickle.dumps(network))
    check(network, inputs)
    assert isinstance(vars(network)["forward"], Switched)
    assert len(pickle.dumps(network)) < plain + 2000
