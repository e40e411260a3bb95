"""Every expected activation is computed by hand from the layer's output, without the trace."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_compress.pruning.criteria.activation_trace import Activation, ActivationTrace
from lightning_compress.pruning.criteria.tensor_tags import TensorMarks


class Net(nn.Module):
    """A convolution, and whatever the test puts behind it."""

    def __init__(self, tail: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer or nn.Conv2d(2, 3, 3)
        self.tail = tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self.layer(x))


IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def activations(model: nn.Module, layers: Sequence[str], *inputs: Tensor) -> dict[str, list[Tensor]]:
    """Copies of what is reported while the model runs, by layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(activation: Activation) -> None:
        layer = model.get_submodule(activation.layer)
        assert activation.tensor.shape[activation.dim] == layer.weight.shape[0]
        found[activation.layer].append(activation.tensor.detach().clone())

    with ActivationTrace(model, layers, on_activation=keep):
        model(*inputs)
    return found


def the_only(model: nn.Module, *inputs: Tensor) -> Tensor:
    (tensor,) = activations(model, ["layer"], *inputs)["layer"]
    return tensor


def output(net: Net) -> Tensor:
    return net.layer(IMAGES).detach()


# ------------------------------------------------------------------ the non-linearity


def test_conv_bn_relu_is_measured_behind_the_relu() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    (found,) = activations(net, ["0"], IMAGES)["0"]

    conv = torch.einsum("nchwij,ocij->nohw", IMAGES.unfold(2, 3, 1).unfold(3, 3, 1), net[0].weight)
    conv = conv + net[0].bias.view(1, 3, 1, 1)
    mean, variance = conv.mean((0, 2, 3), keepdim=True), conv.var((0, 2, 3), keepdim=True, correction=0)
    expected = ((conv - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(found, expected)
    assert (conv == 0).sum() == 0
    assert 0.2 < (found == 0).float().mean() < 0.8


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "aten.relu": torch.ops.aten.relu.default,
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.LeakyReLU inplace": nn.LeakyReLU(0.1, inplace=True),
    "nn.ELU": nn.ELU(),
    "F.elu_": F.elu_,
    "nn.GELU": nn.GELU(),
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "nn.SiLU": nn.SiLU(),
    "nn.Mish": nn.Mish(),
    "torch.sigmoid": torch.sigmoid,
    "Tensor.sigmoid_": lambda x: x.sigmoid_(),
    "torch.special.expit": torch.special.expit,
    "F.sigmoid": F.sigmoid,
    "nn.LogSigmoid": nn.LogSigmoid(),
    "torch.tanh": torch.tanh,
    "Tensor.tanh": lambda x: x.tanh(),
    "nn.Softplus": nn.Softplus(),
    "nn.Softsign": nn.Softsign(),
    "nn.Softshrink": nn.Softshrink(),
    "nn.Hardshrink": nn.Hardshrink(),
    "nn.Tanhshrink": nn.Tanhshrink(),
    "nn.Hardswish": nn.Hardswish(),
    "nn.Hardsigmoid": nn.Hardsigmoid(),
    "nn.Hardtanh": nn.Hardtanh(),
    "nn.PReLU": nn.PReLU(3),
    "nn.SELU": nn.SELU(),
    "nn.CELU": nn.CELU(),
    "nn.Threshold": nn.Threshold(0.1, 0.0),
    "torch.clamp": lambda x: torch.clamp(x, min=0),
    "Tensor.clamp_min": lambda x: x.clamp_min(0),
    "Tensor.clamp_": lambda x: x.clamp_(0, 6),
    "torch.maximum": lambda x: torch.maximum(x, 0.1 * x),
    "torch.sin": torch.sin,
}


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_every_form_of_a_nonlinearity_is_seen(name: str) -> None:
    function = NONLINEARITIES[name]
    net = Net(lambda x: function(x).flatten(1).sum(1))
    torch.testing.assert_close(the_only(net, IMAGES), function(output(net).clone()).detach(), rtol=0, atol=0)


CARRIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm": nn.BatchNorm2d(3),
    "group_norm": nn.GroupNorm(3, 3),
    "instance_norm": nn.InstanceNorm2d(3),
    "layer_norm": nn.LayerNorm((3, 4, 4)),
    "rms_norm": nn.RMSNorm(4),
    "functional batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "eval dropout": nn.Dropout().eval(),
    "max_pool2d": nn.MaxPool2d(2),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "avg_pool2d": nn.AvgPool2d(2),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(1),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d(2),
    "interpolate": nn.Upsample(scale_factor=2),
    "scalars": lambda x: (2 * x - 1) / 3 + 0.5,
    "rsub": lambda x: 1 - x,
    "in-place scalars": lambda x: x.mul_(2).add_(1),
    "a learned scale": lambda x: x * torch.full((3, 1, 1), 0.5),
    "cast": lambda x: x.double().to(torch.float32),
    "contiguous, clone": lambda x: x.contiguous(memory_format=torch.channels_last).clone(),
    "identity": nn.Identity(),
    "nothing to do": lambda x: x.flatten(4).to(x.dtype) if x.dim() > 4 else x.reshape(x.shape).view_as(x),
    "a mask": lambda x: x * (torch.arange(4) > 1),
    "masked_fill": lambda x: x.masked_fill(torch.arange(4) > 1, 0.0),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_channels_are_followed_to_the_nonlinearity(name: str) -> None:
    function = CARRIERS[name]
    net = Net(lambda x: F.relu(function(x)).flatten(1))
    expected = function(output(net).clone()).clamp(min=0).detach()
    torch.testing.assert_close(the_only(net, IMAGES), expected, rtol=0, atol=0)


def test_linear_layers_have_their_channels_last() -> None:
    net = Net(nn.Sequential(nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)), nn.Linear(3, 5))
    x = torch.randn(2, 7, 3)
    expected = F.gelu(F.layer_norm(net.layer(x), (5,)))
    torch.testing.assert_close(the_only(net, x), expected.detach())


def test_transposed_and_1d_and_3d_convolutions() -> None:
    for layer, shape in ((nn.ConvTranspose2d(2, 4, 3), (3, 2, 5, 5)), (nn.Conv1d(2, 4, 3), (3, 2, 5))):
        found = []
        net, x = Net(F.relu, layer), torch.randn(shape)
        with ActivationTrace(net, ["layer"], on_activation=found.append):
            net(x)
        assert [(a.dim, a.tensor.shape[1]) for a in found] == [(1, 4)]
        torch.testing.assert_close(found[0].tensor, layer(x).relu())


# ------------------------------------------------------------------ sums, branches, gates


class Residual(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.short = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv2(self.relu(self.conv1(x))))
        if self.inplace:
            y += self.short(x)
        else:
            y = y + self.short(x)
        return self.relu(y)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_relu_after_a_sum_counts_for_both_branches(inplace: bool) -> None:
    net = Residual(inplace)
    found = activations(net, ["conv1", "conv2", "short"], IMAGES)
    first = net.conv1(IMAGES).clamp(min=0)
    total = F.batch_norm(net.conv2(first), None, None, training=True) + net.short(IMAGES)
    torch.testing.assert_close(found["conv1"], [first.detach()])
    torch.testing.assert_close(found["conv2"], [total.clamp(min=0).detach()])
    torch.testing.assert_close(found["short"], [total.clamp(min=0).detach()])


def test_all_consumers_are_reported_and_one_relu_may_serve_them_all() -> None:
    relu = nn.ReLU()
    net = Net(lambda x: relu(x).sum() + torch.tanh(x).sum() + relu(-x).sum())
    y = output(net)
    torch.testing.assert_close(activations(net, ["layer"], IMAGES)["layer"], [y.relu(), y.tanh(), (-y).relu()])


def test_a_preactivated_stream_is_reported_behind_every_relu() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.block(F.relu(x))
            return F.relu(x)

    net = Stream()
    found = activations(net, ["stem", "block"], IMAGES)
    stem = net.stem(IMAGES)
    end = (stem + net.block(stem.relu())).relu()
    torch.testing.assert_close(found["stem"], [stem.relu().detach(), end.detach()])
    torch.testing.assert_close(found["block"], [end.detach()])


def test_a_layer_that_is_called_twice_is_reported_twice() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    twice = nn.Sequential(net, net)
    x = torch.randn(5, 3)
    torch.testing.assert_close(activations(twice, ["0.0"], x)["0.0"], [net(x).detach(), net(net(x)).detach()])


GATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "swish": (lambda x: x * torch.sigmoid(x), F.silu),
    "quick gelu": (lambda x: torch.sigmoid(1.702 * x) * x, lambda x: x / (1 + torch.exp(-1.702 * x))),
    "gelu, erf": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
}


@pytest.mark.parametrize("name", GATES)
def test_a_self_gated_nonlinearity_is_its_product(name: str) -> None:
    by_hand, reference = GATES[name]
    net = Net(lambda x: by_hand(x).flatten(1))
    torch.testing.assert_close(the_only(net, IMAGES), reference(output(net)))


def test_the_tanh_gelu_of_transformers() -> None:
    def new_gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    net = Net(lambda x: new_gelu(x).flatten(1))
    torch.testing.assert_close(the_only(net, IMAGES), F.gelu(output(net), approximate="tanh"))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return F.relu(x * gate).flatten(1)


def test_squeeze_and_excite() -> None:
    net = SqueezeExcite()
    found = activations(net, ["conv", "squeeze", "excite"], IMAGES)
    y = net.conv(IMAGES)
    squeezed = net.squeeze(y.mean((2, 3), keepdim=True)).relu()
    gate = net.excite(squeezed).sigmoid()
    torch.testing.assert_close(found["conv"], [(y * gate).relu().detach()])
    torch.testing.assert_close(found["squeeze"], [squeezed.detach()])
    torch.testing.assert_close(found["excite"], [gate.detach()])


def test_gated_linear_unit() -> None:
    class Glu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    net, x = Glu(), torch.randn(2, 4, 3)
    found = activations(net, ["gate", "up", "down"], x)
    gate = F.silu(net.gate(x))
    torch.testing.assert_close(found["gate"], [gate.detach()])
    torch.testing.assert_close(found["up"], [(gate * net.up(x)).detach()])
    torch.testing.assert_close(found["down"], [net(x).detach()])


# ------------------------------------------------------------------ no non-linearity


ENDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "the end": (lambda x: x, lambda x: x),
    "the end, in a dict": (lambda x: {"y": 2 * x}, lambda x: 2 * x),
    "a matmul": (lambda x: (x + 1) @ torch.ones(4, 1), lambda x: x + 1),
    "a reshape": (lambda x: F.relu((x * 3).flatten(1)), lambda x: x * 3),
    "a concatenation": (lambda x: F.relu(torch.cat([x, x], 1)), lambda x: x),
    "a softmax": (lambda x: x.softmax(1), lambda x: x),
    "pooling": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.mean((2, 3), keepdim=True)),
    "the first of two": (lambda x: (x.flatten(1).sum(), (x * 2).flatten(1)), lambda x: x),
}


@pytest.mark.parametrize("name", ENDS)
def test_without_a_nonlinearity_it_is_where_something_else_takes_the_channels(name: str) -> None:
    tail, expected = ENDS[name]
    net = Net(tail)
    torch.testing.assert_close(the_only(net, IMAGES), expected(output(net)))


def test_the_loss_takes_the_logits() -> None:
    net, found = nn.Linear(3, 4), []
    model, x = nn.Sequential(net), torch.randn(5, 3)
    with ActivationTrace(model, ["0"], on_activation=found.append):
        F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close([a.tensor for a in found], [net(x)])


def test_questions_and_metrics_do_not_take_the_channels() -> None:
    def tail(x: Tensor) -> Tensor:
        assert x.shape[1] == x.size(1) == 3
        F.relu(x.detach()).mean()
        x.argmax(1)
        x = x * torch.rand_like(x).gt(-1)
        return F.relu(x)

    net = Net(tail)
    torch.testing.assert_close(the_only(net, IMAGES), output(net).relu())


def test_a_norm_by_hand_does_not_hide_the_nonlinearity() -> None:
    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.pow(2).mean(1, keepdim=True) + 1).sqrt()

    net = Net(lambda x: F.relu(norm(x)).flatten(1))
    torch.testing.assert_close(the_only(net, IMAGES), norm(output(net)).relu())


def test_a_change_in_place_before_the_report_is_an_error() -> None:
    def tail(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        flat += 1
        return flat

    with pytest.raises(ValueError, match=r"'layer', a tensor of shape \(4, 3, 4, 4\), was modified in place"):
        activations(Net(tail), ["layer"], IMAGES)


def test_a_change_in_place_after_the_report_is_too_late_to_matter() -> None:
    net = Net(lambda x: F.relu(x).mul_(0).flatten(1))
    torch.testing.assert_close(the_only(net, IMAGES), output(net).relu())


# ------------------------------------------------------------------ where it has to live


def clean(net: nn.Module) -> bool:
    hooks = sum(len(module._forward_hooks) for module in net.modules())
    return hooks == 0 and not _get_current_function_mode_stack()


def test_hooks_and_mode_are_gone_after_end_and_after_an_exception() -> None:
    net = Net(F.relu)
    found: list[Activation] = []
    trace = ActivationTrace(net, ["layer"], on_activation=found.append)
    trace.begin()
    assert not clean(net)
    net(IMAGES)
    trace.end()
    trace.end()
    assert clean(net)
    assert len(found) == 1

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("in the user's model")

    net.tail = fail
    with pytest.raises(RuntimeError, match="user's model"), trace:
        net(IMAGES)
    assert clean(net)
    trace.begin()
    with pytest.raises(RuntimeError, match="user's model"):
        net(IMAGES)
    net.tail = F.relu
    trace.begin()  # the step before never came to its end
    net(IMAGES)
    trace.end()
    assert clean(net)
    assert len(found) == 2


def test_tensors_are_not_kept_alive() -> None:
    alive: list[bool] = []
    outputs: list[weakref.ref[Tensor]] = []
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU())
    for layer in net:
        layer.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    with torch.no_grad(), ActivationTrace(net, ["0", "2"], on_activation=lambda a: None):
        y = net(IMAGES)
        gc.collect()
        alive = [ref() is not None for ref in outputs]
        assert y is outputs[-1]()
    assert alive == [False, False, False, True]
    del y
    assert outputs[-1]() is None


def test_a_mark_does_not_pass_to_another_tensor_with_the_same_id() -> None:
    marks: TensorMarks[str] = TensorMarks()
    for _ in range(1000):
        tensor = torch.empty(1)
        marks.set(tensor, "mark")
        assert marks.get(tensor) == "mark"
        used = id(tensor)
        del tensor
        tensor = torch.empty(1)
        if id(tensor) == used:
            break
    else:
        pytest.fail("no id came back in 1000 attempts")
    assert marks.get(tensor) is None


def test_autocast() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    x = torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = activations(net, ["0", "3"], x)
        first = F.relu(F.layer_norm(F.linear(x, net[0].weight, net[0].bias), (4,)))
        second = F.relu(F.linear(first, net[3].weight, net[3].bias))
    torch.testing.assert_close(found, {"0": [first.detach()], "3": [second.detach()]})
    assert found["3"][0].dtype is torch.bfloat16


@pytest.mark.parametrize("layer", [nn.Linear(6, 3), nn.Conv2d(2, 6, 3)], ids=["linear", "conv"])
def test_the_models_own_hooks(layer: nn.Module) -> None:
    net = Net(nn.Sequential(nn.Identity(), nn.ReLU()), layer)
    seen: list[str] = []
    net.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.layer.register_forward_hook(lambda module, args, out: out + 1)
    for module in net.modules():  # these make every module take and return views
        module.register_full_backward_hook(lambda module, gin, gout: seen.append(type(module).__name__))
    x = IMAGES.clone().requires_grad_()
    (found,) = activations(net, ["layer"], x)["layer"]
    torch.testing.assert_close(found, net(x).detach())
    assert (found == 0).any()
    net(x).sum().backward()
    assert "ReLU" in seen


def test_the_backward_pass_is_the_same() -> None:
    net = Residual(inplace=True)
    net(IMAGES).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    with ActivationTrace(net, ["conv1", "conv2", "short"], on_activation=lambda a: None):
        loss = net(IMAGES).square().mean()
    loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    net = Net(lambda x: x)
    block = nn.Sequential(net.layer, nn.ReLU())
    net.forward = lambda x: checkpoint(block, x, use_reentrant=reentrant).sum()  # type: ignore[method-assign]
    found: list[Activation] = []
    with ActivationTrace(net, ["layer"], on_activation=found.append):
        loss = net(IMAGES.clone().requires_grad_())
    loss.backward()
    torch.testing.assert_close([a.tensor for a in found], [output(net).relu()])
    assert net.layer.weight.grad is not None


def test_custom_autograd_functions_are_seen_through() -> None:
    class Mirror(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return -x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    net = Net(lambda x: F.relu(Mirror.apply(x)))
    torch.testing.assert_close(the_only(net, IMAGES), (-output(net)).relu())


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_layer(training: bool) -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(3, 5, 8)
    found = activations(net, ["linear1", "linear2"], x)
    middle = net.norm1(x + net.self_attn(x, x, x, need_weights=False)[0])
    hidden = net.linear1(middle).relu()
    torch.testing.assert_close(found["linear1"], [hidden.detach()])
    torch.testing.assert_close(found["linear2"], [net.norm2(middle + net.linear2(hidden)).detach()])
    with torch.no_grad():
        torch.testing.assert_close(activations(net, ["linear1"], x), {"linear1": [hidden]})


def test_compiled_modules_run_eagerly_while_watched() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = Net(lambda x: F.relu(x))
    compiled = torch.compile(net, backend=backend)
    compiled(IMAGES)
    found: list[Activation] = []
    for _ in range(2):
        with ActivationTrace(net, ["layer"], on_activation=found.append):
            compiled(IMAGES)
        compiled(IMAGES)
    torch.testing.assert_close([a.tensor for a in found], [output(net).relu()] * 2)
    assert len(graphs) == 1  # neither compiled while watched, nor anew because of it


def test_what_is_no_layer_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="Sequential has no layer 'fc'"):
        ActivationTrace(net, ["fc"], on_activation=print)
    with pytest.raises(ValueError, match="'1' is a BatchNorm1d, but only linear layers and convolutions"):
        ActivationTrace(net, ["0", "1"], on_activation=print)
