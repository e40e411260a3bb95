"""Planning and cutting run the user's network: afterwards it is as it was, and its own habits do not disturb them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, SegformerConfig, SegformerForSemanticSegmentation

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x).relu())


class Caching(Net):
    """Keeps tables for the next call in a dict, a list and an entry."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        if len(x) not in self.tables:
            self.tables[len(x)] = torch.sin(torch.arange(len(x) * 3.0)).view(len(x), 3)
            self.seen.append(x)
            self.shift = x.new_ones(3)
        return super().forward(x + self.tables[len(x)] + self.shift)


class Attribute(Net):
    """Has a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.others = torch.tensor([0.4, 0.5, 0.6]), [torch.ones(3)]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x - self.mean + self.others[0])


class Centred(Net):
    """Moves a buffer in training mode, as centring, codebooks and spectral norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        if self.training:
            self.centre.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return y - self.centre


@pytest.mark.parametrize("make", [Caching, Attribute, Centred])
@pytest.mark.parametrize("warm", [False, True], ids=["never run", "run before"])
def test_habits_of_a_network_neither_freeze_it_nor_change_it(make: type[Net], warm: bool) -> None:
    net = make().eval()
    if warm:
        net(X)
    untouched = copy.deepcopy(net)
    (group,) = channel_groups(net, X).free()
    assert (group.name, group.size) == ("first", 8)
    assert net.__dict__.keys() == untouched.__dict__.keys()
    assert torch.equal(net(X), untouched(X))
    with torch.no_grad():
        untouched.last.weight[:, [1, 2]] = 0
    cut(net, X, keep={"first": [0, 3, 4, 5, 6, 7]})
    torch.testing.assert_close(net(X), untouched(X))


def test_hooks_that_a_forward_pass_registers_are_not_registered_twice() -> None:
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        output_hidden_states=True,
        attn_implementation="eager",
    )
    model, inputs = BertModel(config).eval(), {"input_ids": torch.arange(10).view(2, 5)}
    channel_groups(model, inputs)
    assert len(model(**inputs).hidden_states) == 3


def test_a_network_runs_after_it_was_planned_before_its_first_pass() -> None:
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=14,
    )
    torch.manual_seed(0)
    model, x = SegformerForSemanticSegmentation(config).eval(), torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(model)(x).logits
    channel_groups(model, {"pixel_values": x})
    assert torch.equal(model(x).logits, expected)


def test_an_output_from_before_the_cut_does_not_disturb_training_after_it() -> None:
    net = Net()
    earlier = net(X)
    net(X).sum().backward()
    cut(net, X, keep={"first": [0, 3, 5]})
    net(X).sum().backward()
    assert net.first.weight.grad is not None
    assert net.first.weight.grad.shape == (3, 3)
    assert earlier.requires_grad


def test_groups_are_found_behind_torch_compile_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    net: Any = torch.compile(Net(), backend=backend)
    (group,) = channel_groups(net, X).free()
    cut(net, X, keep={group.name: [0, 1]})
    assert not compiled
    assert net(X).shape == (4, 2)


class Nothing(Net):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Nothing(), X, "Nothing returns no tensor"),
        (Net(), [X], "must be a tensor, a tuple of positional arguments or a dict"),
        (Net().to("meta"), X, "first.weight is on the meta device"),
        (torch.jit.script(nn.Sequential(nn.Linear(3, 2))), X, "is a script of torch.jit"),
    ],
    ids=["no output", "a list", "meta", "script"],
)
def test_what_cannot_be_planned_is_named(model: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_groups(model, inputs)


def test_a_checkpoint_that_widens_a_cut_network_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    dense = copy.deepcopy(net.state_dict())
    cut(net, X, keep={"first": [0, 3, 5]})
    thin = copy.deepcopy(net.state_dict())
    net.load_state_dict(thin)
    assert "takes the shapes" not in caplog.text
    net.load_state_dict(dense)
    assert "takes the shapes of a checkpoint from before its channels left: 50 numbers where it had 20" in caplog.text
