from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress.pruning.groups import Neurons
from lightning_compress.pruning.neurons import find_neurons


class Plain(nn.Module):
    """Layers by keyword, and a forward pass given as a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def find(net: nn.Module, inputs: Any, layers: Sequence[str], **options: Any) -> dict[str, Neurons]:
    return {found.name: found for found in find_neurons(net, inputs, layers, **options)}


def tensors(found: Neurons) -> list[str]:
    return [member.tensor for member in found.members]


def silence(net: nn.Module, found: Neurons, channel: int) -> None:
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for member in found.members:
            parameters[member.tensor].index_fill_(member.dim, member.index[channel], 0.0)


def randomize(net: nn.Module) -> None:
    """Random values for everything, so that nothing is zero or one by accident."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)


# ------------------------------------------------------------------ members

IMAGE, SEQUENCE = torch.randn(3, 4, 6, 6), torch.randn(3, 5, 4)
BEFORE_THE_NONLINEARITY: dict[str, tuple[nn.Module, nn.Module, Tensor, int, list[str]]] = {
    # layer, what follows, input, dimension of the channels, members besides the weight
    "conv": (nn.Conv2d(4, 6, 3), nn.Identity(), IMAGE, 1, ["0.bias"]),
    "conv without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.Identity(), IMAGE, 1, []),
    "conv bn": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), IMAGE, 1, ["0.bias", "1.weight", "1.bias"]),
    "conv groupnorm": (nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), IMAGE, 1, ["0.bias", "1.weight", "1.bias"]),
    "conv instancenorm": (
        nn.Conv2d(4, 6, 3),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        IMAGE,
        1,
        ["0.bias", "1.weight", "1.bias"],
    ),
    "conv, instancenorm of nothing but itself": (nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6), IMAGE, 1, ["0.bias"]),
    "conv layernorm over everything": (
        nn.Conv2d(4, 6, 3),
        nn.LayerNorm((6, 4, 4)),
        IMAGE,
        1,
        ["0.bias", "1.weight", "1.bias"],
    ),
    "conv pool bn": (
        nn.Conv2d(4, 6, 3),
        nn.Sequential(nn.MaxPool2d(2), nn.Dropout(), nn.BatchNorm2d(6)),
        IMAGE,
        1,
        ["0.bias", "1.2.weight", "1.2.bias"],
    ),
    "grouped conv": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE, 1, ["0.bias", "1.weight", "1.bias"]),
    "depthwise conv": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), IMAGE, 1, ["0.bias", "1.weight", "1.bias"]),
    "transposed conv": (
        nn.ConvTranspose2d(4, 6, 3),
        nn.BatchNorm2d(6),
        IMAGE,
        1,
        ["0.bias", "1.weight", "1.bias"],
    ),
    "linear": (nn.Linear(4, 6), nn.Identity(), SEQUENCE, 2, ["0.bias"]),
    "linear layernorm": (nn.Linear(4, 6), nn.LayerNorm(6), SEQUENCE, 2, ["0.bias", "1.weight", "1.bias"]),
    "linear rmsnorm": (nn.Linear(4, 6), nn.RMSNorm(6), SEQUENCE, 2, ["0.bias", "1.weight"]),
    "linear rmsnorm without scale": (
        nn.Linear(4, 6),
        nn.RMSNorm(6, elementwise_affine=False),
        SEQUENCE,
        2,
        ["0.bias"],
    ),
    "linear bn": (nn.Linear(4, 6), nn.BatchNorm1d(6), SEQUENCE[:, 0], 1, ["0.bias", "1.weight", "1.bias"]),
}


@pytest.mark.parametrize("name", BEFORE_THE_NONLINEARITY)
@pytest.mark.parametrize("training", [False, True])
def test_a_channel_whose_members_are_zero_emits_exactly_zero(name: str, training: bool) -> None:
    layer, norm, x, dim, more = BEFORE_THE_NONLINEARITY[name]
    net = nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).train(training)
    net(x)
    randomize(net)
    found = find(net, x, ["0"])["0"]
    assert found.frozen is None
    assert tensors(found) == ["0.weight", *more]
    channels = layer(x).shape[dim]
    assert found.size == channels
    assert all(member.index.shape == (channels, 1) for member in found.members)

    before = net[:2](x)
    assert (before.movedim(dim, 0).flatten(1) != 0).any(1).all()
    silence(net, found, 2)
    after = net[:2](x).movedim(dim, 0).flatten(1)
    assert [channel for channel in range(channels) if not after[channel].any()] == [2]


def test_a_silenced_channel_leaves_the_others_alone() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    net(IMAGE)
    randomize(net.eval())
    before = net[:3](IMAGE)
    silence(net, find(net, IMAGE, ["0"])["0"], 1)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(net[:3](IMAGE)[:, others], before[:, others])


def test_a_norm_behind_a_residual_sum_belongs_to_nobody() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x) + x)).flatten(1))

    net = Plain(
        forward,
        conv1=nn.Conv2d(4, 6, 1),
        bn1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 6, 1),
        bn2=nn.BatchNorm2d(6),
        head=nn.Linear(6 * 36, 2),
    )
    found = find(net, IMAGE, ["conv1", "conv2", "head"])
    assert tensors(found["conv1"]) == ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"]
    assert tensors(found["conv2"]) == ["conv2.weight", "conv2.bias"]
    assert [layer.frozen is None for layer in found.values()] == [True, True, False]


def test_a_norm_that_also_sees_other_values_belongs_to_nobody() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.norm(self.a(x)), self.norm(self.b(x))
        c = self.norm_c(self.c(x) + torch.ones(5, 6))
        d = self.norm_d(self.d(x)) + self.norm_d(torch.ones(6))
        return self.head(F.relu(a + b + c + d))

    norms = {name: nn.LayerNorm(6) for name in ("norm", "norm_c", "norm_d")}
    net = Plain(forward, **{name: nn.Linear(4, 6) for name in "abcd"}, **norms, head=nn.Linear(6, 2))
    for name, layer in find(net, SEQUENCE, list("abcd")).items():
        assert tensors(layer) == [f"{name}.weight", f"{name}.bias"]


def test_every_norm_of_a_layer_that_is_called_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm1(self.fc(x))) + F.relu(self.norm2(self.fc(-x))))

    net = Plain(forward, fc=nn.Linear(4, 6), norm1=nn.LayerNorm(6), norm2=nn.LayerNorm(6), head=nn.Linear(6, 2))
    norms = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    assert tensors(find(net, SEQUENCE, ["fc"])["fc"]) == ["fc.weight", "fc.bias", *norms]

    shared = Plain(
        lambda self, x: self.head(F.relu(self.norm(self.fc(x))) + F.relu(self.norm(self.fc(-x)))),
        fc=nn.Linear(4, 6),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 2),
    )
    assert tensors(find(shared, SEQUENCE, ["fc"])["fc"]) == ["fc.weight", "fc.bias", "norm.weight", "norm.bias"]


def test_names_are_those_of_named_parameters_and_follow_the_order_asked_for() -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    net = nn.ModuleDict({"backbone": inner, "unused": nn.Linear(2, 2)})
    names = ["backbone.2", "unused", "backbone.0", "backbone.0"]
    found = find_neurons(net, SEQUENCE, names, network=inner)
    assert [layer.name for layer in found] == ["backbone.2", "unused", "backbone.0"]
    parameters = dict(net.named_parameters())
    assert all(member.tensor in parameters for layer in found for member in layer.members)


# ------------------------------------------------------------------ the output layer


@dataclass
class Prediction:
    logits: Tensor
    note: str = ""


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "as it is": lambda self, x: self.b(F.relu(self.a(x))),
    "softmax": lambda self, x: self.b(F.relu(self.a(x))).softmax(-1),
    "sigmoid, pooled": lambda self, x: torch.sigmoid(self.b(F.relu(self.a(x)))).mean(1),
    "reshaped": lambda self, x: self.b(F.relu(self.a(x))).transpose(1, 2).flatten(1)[:, 3:],
    "normalised": lambda self, x: F.normalize(F.layer_norm(self.b(F.relu(self.a(x))), (4,))),
    "added to the input": lambda self, x: x + self.b(F.relu(self.a(x))),
    "the largest": lambda self, x: self.b(F.relu(self.a(x))).argmax(-1),
    "in a tuple": lambda self, x: (x, [self.b(F.relu(self.a(x)))]),
    "in a dict": lambda self, x: {"loss": None, "logits": self.b(F.relu(self.a(x)))},
    "in a dataclass": lambda self, x: Prediction(self.b(F.relu(self.a(x)))),
    "written into a buffer": lambda self, x: _into(torch.zeros(3, 9, 4), self.b(F.relu(self.a(x)))),
    "written into a view": lambda self, x: _into_view(torch.zeros(3, 9, 4), self.b(F.relu(self.a(x)))),
    "times a fixed matrix": lambda self, x: self.b(F.relu(self.a(x))) @ torch.eye(4),
    "attended to": lambda self, x: F.scaled_dot_product_attention(x, x, self.b(F.relu(self.a(x)))),
    "concatenated": lambda self, x: torch.cat([x, self.b(F.relu(self.a(x)))], 1),
}


def _into(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[:, 2:7] = x
    return buffer


def _into_view(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[:, 2:7].copy_(x)
    return buffer


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_layer_that_makes_the_output_is_frozen(name: str) -> None:
    net = Plain(OUTPUTS[name], a=nn.Linear(4, 6), b=nn.Linear(6, 4))
    found = find(net, SEQUENCE, ["a", "b"])
    assert found["a"].frozen is None
    assert found["b"].frozen == "its output is the network's output"


INNER: dict[str, Callable[[Any, Tensor], Any]] = {
    "a layer that is not asked for": lambda self, x: self.other(self.a(x)),
    "a functional": lambda self, x: F.linear(self.a(x), self.other.weight),
    "a parameter": lambda self, x: self.a(x) @ self.weight,
    "a transposed parameter": lambda self, x: self.a(x) @ self.other.weight.t(),
    "einsum": lambda self, x: torch.einsum("btc,cd->btd", self.a(x), self.weight),
    "lstm": lambda self, x: self.lstm(self.a(x))[0],
    "attention": lambda self, x: self.attention(*[self.a(x)] * 3)[0],
}


@pytest.mark.parametrize("name", INNER)
def test_a_layer_before_another_weight_is_free(name: str) -> None:
    net = Plain(
        INNER[name],
        a=nn.Linear(4, 6),
        other=nn.Linear(6, 2),
        lstm=nn.LSTM(6, 3),
        attention=nn.MultiheadAttention(6, 2, batch_first=True),
    )
    net.weight = nn.Parameter(torch.randn(6, 2))
    assert find(net, SEQUENCE, ["a"])["a"].frozen is None


def test_all_layers_that_end_in_the_residual_stream_of_a_headless_network_are_output_layers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        return F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)

    net = Plain(forward, stem=nn.Linear(4, 6), up=nn.Linear(6, 8), down=nn.Linear(8, 6))
    found = find(net, SEQUENCE, ["stem", "up", "down"])
    assert [layer.frozen is None for layer in found.values()] == [False, True, False]


# ------------------------------------------------------------------ other reasons


def test_a_layer_that_is_not_called_is_frozen() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2))
    net.spare = nn.Linear(2, 2)
    net.forward = lambda x: net[1](net[0](x))  # type: ignore[method-assign]
    found = find(net, SEQUENCE, ["spare", "0.self_attn.out_proj", "0.linear1", "0.linear2"])
    assert found["spare"].frozen == "it was not called in the forward pass of the example inputs"
    assert found["0.self_attn.out_proj"].frozen == found["spare"].frozen
    assert found["0.linear1"].frozen is found["0.linear2"].frozen is None


def test_what_cannot_be_silenced_is_frozen() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.bare(self.conv(F.relu(self.transposed(x)))))
        x = self.computed(x.mean((2, 3)))
        x = self.tied(F.relu(x))
        return self.head(F.relu(self.partner(F.relu(x))))

    net = Plain(
        forward,
        transposed=nn.ConvTranspose2d(4, 6, 3, groups=2),
        conv=nn.Conv2d(6, 6, 3),
        bare=nn.BatchNorm2d(6, affine=False),
        computed=weight_norm(nn.Linear(6, 6)),
        tied=nn.Linear(6, 6),
        partner=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )
    net.partner.weight = net.tied.weight
    found = find(net, IMAGE, ["transposed", "conv", "computed", "tied", "partner"])
    reasons = {name: layer.frozen or "" for name, layer in found.items()}
    assert "grouped transposed" in reasons["transposed"]
    assert "batch_norm without a scale per channel" in reasons["conv"]
    assert "computed from other parameters" in reasons["computed"]
    assert reasons["tied"] == reasons["partner"] == "its weight is shared: tied, partner"
    assert {name: layer.size for name, layer in found.items()} == dict.fromkeys(found, 6)
    assert tensors(found["partner"])[0] == "tied.weight"


# ------------------------------------------------------------------ nothing changes


class Restless(nn.Module):
    """Changes all that it can in a forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.bn = nn.BatchNorm1d(6).eval()
        self.register_buffer("calls", torch.tensor(0))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = F.batch_norm(self.fc(x), self.bn.running_mean, self.bn.running_var, training=True)
        x = F.dropout(x, 0.5) + torch.rand(6)
        if self.fail:
            raise RuntimeError("in the user's model")
        assert not self.training
        return self.head(F.relu(x))


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_changed(fail: bool) -> None:
    net = Restless()
    net.fail = fail
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in net.named_buffers()}
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="user's model") if fail else nullcontext():
        find_neurons(net, torch.ones(3, 4), ["fc"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert {name: id(buffer) for name, buffer in net.named_buffers()} == buffers
    assert net.training
    assert net.fc.training
    assert not net.bn.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    "inputs",
    [(SEQUENCE, torch.ones(3, 5, 4)), {"x": SEQUENCE, "mask": torch.ones(3, 5, 4)}],
    ids=["positional", "by keyword"],
)
def test_example_inputs(inputs: Any) -> None:
    net = Plain(lambda self, x, mask: self.head(F.relu(self.fc(x * mask))), fc=nn.Linear(4, 6), head=nn.Linear(6, 2))
    assert [layer.frozen is None for layer in find(net, inputs, ["fc", "head"]).values()] == [True, False]


def test_a_masked_transformer_encoder_takes_no_shortcut() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    net = Plain(
        lambda self, x: self.head(self.encoder(x, src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(4, 2),
    )
    found = find(net, SEQUENCE, [name for name, module in net.named_modules() if isinstance(module, nn.Linear)])
    assert [name for name, layer in found.items() if layer.frozen is None] == [
        f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    ]


def test_bad_input() -> None:
    net = Plain(lambda self, x: float(self.fc(x).sum()), fc=nn.Linear(4, 6), norm=nn.LayerNorm(6))
    with pytest.raises(ValueError, match="the network's output is a float without a tensor"):
        find_neurons(net, SEQUENCE, ["fc"])
    with pytest.raises(ValueError, match="'norm' is a LayerNorm, but only linear layers and convolutions"):
        find_neurons(net, SEQUENCE, ["fc", "norm"])
    with pytest.raises(ValueError, match="Plain has no layer 'conv'"):
        find_neurons(net, SEQUENCE, ["conv"])
