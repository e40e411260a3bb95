from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.pruning.criteria import sample_gradients
from lightning_compress.pruning.criteria.sample_gradients import SampleGradients, bias_gradients, weight_gradients

torch.set_num_threads(1)


def gradients_of_samples(model, x, parameter, objective=lambda y: y.square().sum()) -> Tensor:
    """The oracle: one forward and one backward pass per sample, alone in its batch."""
    return torch.stack([torch.autograd.grad(objective(model(x[n : n + 1])), parameter)[0] for n in range(len(x))])


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (3,)),
    "linear at positions": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear at a grid of positions": (lambda: nn.Linear(3, 4), (2, 3, 3)),
    "conv1d, stride, padding, dilation": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 10)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 6, 7)),
    "conv2d, stride that leaves a rest": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 4, 4)),
    "conv2d, same with an even kernel": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (2, 6, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 4, 4)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 5, 5)),
    "conv1d, replicate": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "transposed 1d, output padding beyond the stride": (
        lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, dilation=4, output_padding=3),
        (2, 4),
    ),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2), (4, 3, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, padding=1, dilation=2), (2, 3, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_a_loop_over_samples(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(4, *shape, dtype=torch.double)
    y = layer(x)
    (delta,) = torch.autograd.grad(y.square().sum(), y)
    torch.testing.assert_close(weight_gradients(layer, x, delta), gradients_of_samples(layer, x, layer.weight))
    torch.testing.assert_close(bias_gradients(layer, x, delta), gradients_of_samples(layer, x, layer.bias))


class Twice(nn.Module):
    """One layer called twice; its output, at positions a view, is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.shared(torch.relu_(self.shared(x))))


class Tied(nn.Module):
    """One parameter in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, groups=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


NETWORKS = {
    "shared layer": (Twice, (3,), "shared.weight"),
    "shared layer, bias": (Twice, (3,), "shared.bias"),
    "shared layer at positions": (Twice, (4, 3), "shared.weight"),
    "tied layers": (Tied, (3,), "first.weight"),
    "called by keyword": (ByKeyword, (3,), "layer.weight"),
    "conv before in-place relu": (convolutional, (1, 3, 3), "0.weight"),
    "transposed conv before in-place relu": (convolutional, (1, 3, 3), "2.weight"),
    "bias before in-place relu": (convolutional, (1, 3, 3), "2.bias"),
    "linear": (convolutional, (1, 3, 3), "5.weight"),
}


def watched(model: nn.Module, name: str, x: Tensor, **options) -> tuple[SampleGradients, Tensor]:
    watcher = SampleGradients(model, [name], criterion="fisher", **options)
    handles = watcher.watch()
    output = model(x)
    for handle in handles:
        handle.remove()
    return watcher, output


@pytest.mark.parametrize("power", [torch.square, torch.abs])
@pytest.mark.parametrize("chunk", [1, 100, 2**24])
@pytest.mark.parametrize("name", NETWORKS)
def test_sums_equal_a_loop_over_samples(name, chunk, power, monkeypatch):
    monkeypatch.setattr(sample_gradients, "_CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    make, shape, target = NETWORKS[name]
    model = make().double()
    x = torch.randn(5, *shape, dtype=torch.double)
    watcher, output = watched(model, target, x)
    calls = watcher.backward(output.square().sum())
    expected = power(gradients_of_samples(model, x, model.get_parameter(target))).sum(0)
    torch.testing.assert_close(watcher.sums(calls, power)[target], expected)


@pytest.mark.parametrize("name", [name for name, (*_, target) in NETWORKS.items() if target.endswith("weight")])
def test_channel_products_equal_a_loop_over_samples(name):
    torch.manual_seed(0)
    make, shape, target = NETWORKS[name]
    model = make().double()
    weight = model.get_parameter(target)
    x = torch.randn(5, *shape, dtype=torch.double)
    watcher, output = watched(model, target, x, keep_products=True)
    products = watcher.channel_products(watcher.backward(output.square().sum()))[target]
    channel_dim = 1 if "transposed" in name else 0
    other_dims = [dim for dim in range(weight.dim()) if dim != channel_dim]
    expected = torch.stack([(g * weight).sum(other_dims) for g in gradients_of_samples(model, x, weight)])
    torch.testing.assert_close(products, expected)


def test_the_ordinary_backward_is_as_without():
    torch.manual_seed(0)
    model, x = convolutional().double(), torch.randn(5, 1, 3, 3, dtype=torch.double)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    watcher, output = watched(model, "0.weight", x)
    loss = output.square().sum()
    watcher.backward(loss)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_calls_that_take_no_part_are_left_out():
    model = nn.Linear(3, 2).double()
    watcher = SampleGradients(model, ["weight"], criterion="fisher")
    watcher.watch()
    x = torch.randn(4, 3, dtype=torch.double)
    with torch.no_grad():
        model(torch.randn(7, 3, dtype=torch.double))
    model(torch.randn(9, 3, dtype=torch.double))
    calls = watcher.backward(model(x).square().sum())
    expected = gradients_of_samples(model, x, model.weight).square().sum(0)
    torch.testing.assert_close(watcher.sums(calls, torch.square)["weight"], expected)


def test_a_hook_that_replaces_the_output_does_not_come_between():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.double)
    model.register_forward_hook(lambda module, args, output: 3 * output)
    watcher, output = watched(model, "weight", x)
    calls = watcher.backward(output.square().sum())
    expected = gradients_of_samples(model, x, model.weight).square().sum(0)
    torch.testing.assert_close(watcher.sums(calls, torch.square)["weight"], expected)


def test_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model, x = Checkpointed().double(), torch.randn(4, 3, dtype=torch.double)
    watcher = SampleGradients(model, ["body.0.weight"], criterion="fisher")
    watcher.watch()
    loss = model(x).square().sum()
    calls = watcher.backward(loss)
    loss.backward()
    expected = gradients_of_samples(model, x, model.body[0].weight).square().sum(0)
    torch.testing.assert_close(watcher.sums(calls, torch.square)["body.0.weight"], expected)


@pytest.mark.parametrize("shape", [(8,), (5, 8)])
def test_low_precision_gradients_are_summed_in_float32(shape):
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4), torch.randn(64, *shape)
    with torch.autocast("cpu", torch.bfloat16):
        watcher, output = watched(model, "weight", x)
    assert output.dtype is torch.bfloat16
    (call,) = watcher.backward(output.float().square().sum())
    assert call.delta.dtype is torch.bfloat16
    pairs = zip(call.x.double().view(64, -1, 8), call.delta.double().view(64, -1, 4), strict=True)
    expected = sum((delta.T @ x).square() for x, delta in pairs)
    torch.testing.assert_close(watcher.sums([call], torch.square)["weight"], expected.float())
    approximately = gradients_of_samples(model, x, model.weight).square().sum(0)
    torch.testing.assert_close(expected.float(), approximately, rtol=0.05, atol=0)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def tied_to_embedding() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize(
    ("model", "name", "layer"),
    [
        (nn.Sequential(nn.Embedding(4, 2)), "0.weight", "'0', a Embedding"),
        (nn.Sequential(nn.BatchNorm1d(4)), "0.weight", "'0', a BatchNorm1d"),
        (nn.Sequential(Scaled(4, 2)), "0.weight", "'0', a Scaled"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "'', a MultiheadAttention"),
        (tied_to_embedding(), "head.weight", "'embed', a Embedding"),
    ],
)
def test_other_layers_are_refused_by_name(model, name, layer):
    with pytest.raises(ValueError, match=f"{name}.*belongs to {layer}.*taylor"):
        SampleGradients(model, [name], criterion="fisher")


class Folded(nn.Module):
    """Moves positions into the batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.folded = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])


def test_rows_that_are_no_samples_are_refused_by_name():
    model = Folded()
    watcher = SampleGradients(model, ["first.weight", "folded.weight"], criterion="fisher")
    watcher.watch()
    output = model(torch.randn(4, 5, 3))
    with pytest.raises(ValueError, match=r"with 4 samples 'folded' was given shape \(20, 3\)"):
        watcher.backward(output.sum())


@pytest.mark.parametrize(("layer", "x"), [(nn.Linear(3, 2), torch.ones(3)), (nn.Conv1d(3, 2, 1), torch.ones(3, 3))])
def test_an_input_without_a_batch_is_refused(layer, x):
    watcher, output = watched(nn.Sequential(layer), "0.weight", x)
    with pytest.raises(ValueError, match="'0' was given shape"):
        watcher.backward(output.sum())
