from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.binary.inputs import binarize_inputs, has_binary_inputs, input_scales
from lightning_compress.binary.signs import (
    binarize,
    channel_scales,
    draw_positive,
    glorot_coefficient,
    hard_sigmoid,
    holds_signs,
    real_gradient,
    sign,
    sign_through,
)
from lightning_compress.binary.weights import BinaryWeights, binarize_weights


def through(w: Tensor) -> Tensor:
    """sign(w) for autograd, written another way: the value of sign, the gradient of a clip to [-1, 1]."""
    clipped = w.clamp(-1, 1)
    return clipped + (torch.where(w >= 0, 1.0, -1.0) - clipped).detach()


# ---------------------------------------------------------------------- formulas


def test_the_sign_of_zero_is_plus_one() -> None:
    assert sign(torch.tensor([-0.0, 0.0, -1e-30, 3.0])).tolist() == [1, 1, -1, 1]
    assert sign_through(torch.tensor([-0.0, 0.0, -1e-30, 3.0])).tolist() == [1, 1, -1, 1]


@pytest.mark.parametrize("value", [-1.5, -1.0, -0.4, 0.0, 0.7, 1.0, 2.0])
def test_samples_have_the_probability_of_the_hard_sigmoid(value: float) -> None:
    generator = torch.Generator().manual_seed(1)
    share = float(draw_positive(torch.full((100_000,), value), generator).float().mean())
    expected = min(max((value + 1) / 2, 0.0), 1.0)
    assert float(hard_sigmoid(torch.tensor(value))) == pytest.approx(expected)
    assert share == pytest.approx(expected, abs=0.0 if expected in (0, 1) else 0.01)


WEIGHTS = {
    "linear": (nn.Linear(5, 3), (1,)),
    "conv": (nn.Conv2d(4, 6, 3, groups=2), (1, 2, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (0, 2, 3)),
    "vector": (None, (0,)),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("pruned", [False, True])
def test_xnor_weights_and_their_gradient_against_autograd(name: str, pruned: bool) -> None:
    torch.manual_seed(0)
    layer, dims = WEIGHTS[name]
    w = (torch.randn(7) if layer is None else torch.randn_like(layer.weight)).requires_grad_()
    alive = torch.arange(w.numel()).view_as(w) % 3 > 0 if pruned else torch.ones_like(w, dtype=torch.bool)
    alpha = (w.abs() * alive).sum(dims, keepdim=True) / alive.sum(dims, keepdim=True)
    binary = alpha * through(w) * alive
    G = torch.randn_like(w)
    (expected,) = torch.autograd.grad((binary * G).sum(), w)

    options: dict[str, Any] = {"scaling": "mean", "alive": alive if pruned else None}
    options["groups"] = 1 if name == "transposed" else None
    assert torch.allclose(binarize(w, **options), binary, atol=1e-6)
    assert torch.allclose(real_gradient(G, w.detach(), **options), expected, atol=1e-6)
    assert (w.detach().abs() > 1).any()  # so that what the straight-through estimator drops is in the test


def test_scales_of_a_grouped_transposed_convolution() -> None:
    """Output channel o of group g is written by the input channels of g alone."""
    w = torch.randn(4, 3, 2)  # 2 groups of 2 input channels, 3 output channels each
    alpha = channel_scales(w, groups=2)
    for g in range(2):
        for o in range(3):
            assert alpha[g, 0, o, 0] == pytest.approx(float(w[2 * g : 2 * g + 2, o].abs().mean()))


def test_the_scale_is_the_best_one() -> None:
    w = torch.randn(1, 50, dtype=torch.float64)
    alpha = float(channel_scales(w))
    error = lambda a: float((w - a * sign(w)).square().sum())  # noqa: E731
    assert error(alpha) < min(error(alpha + 1e-3), error(alpha - 1e-3))


def test_the_gradient_of_scaled_weights_against_finite_differences() -> None:
    """Away from jumps, only the scale depends on w: the first of the two terms."""
    w, G = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    w[w.abs() <= 1] *= 5  # beyond 1 the straight-through term is off
    w[w.abs() <= 1] += 2 * w[w.abs() <= 1].sign()
    step = 1e-6
    for index in range(w.numel()):
        moved = [w.clone(), w.clone()]
        moved[0].view(-1)[index] += step
        moved[1].view(-1)[index] -= step
        up, down = ((binarize(one, scaling="mean") * G).sum() for one in moved)
        slope = float(up - down) / (2 * step)
        assert float(real_gradient(G, w, scaling="mean").view(-1)[index]) == pytest.approx(slope, abs=1e-6)


def test_without_scaling_the_gradient_passes_as_it_is() -> None:
    G, w = torch.randn(3, 4), 3 * torch.randn(3, 4)
    assert torch.equal(real_gradient(G, w), G)


def test_glorot_coefficient() -> None:
    assert glorot_coefficient((10, 20)) == pytest.approx((1.5 / 30) ** 0.5)
    assert glorot_coefficient((64, 32, 3, 3)) == pytest.approx((1.5 / (96 * 9)) ** 0.5)
    assert glorot_coefficient((7,)) == 1.0


# ---------------------------------------------------------------------- BinaryConnect in a loop


@pytest.mark.parametrize("scaled", [False, True])
def test_twenty_steps_of_binary_connect_against_numpy(scaled: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 16, 6))
    y = x @ rng.normal(size=(6, 4)) * 2
    w = rng.uniform(-0.3, 0.3, size=(4, 6))
    lr, real = 0.3, w.copy()
    factor = np.sqrt((4 + 6) / 1.5) if scaled else 1.0
    for step in range(20):
        binary = np.where(real >= 0, 1.0, -1.0)
        gradient = 2 * (x[step] @ binary.T - y[step]).T @ x[step] / y[step].size
        real = np.clip(real - factor * lr * gradient, -1.0, 1.0)
    assert (np.abs(real) == 1).any()
    assert (np.sign(real) != np.sign(w)).any()

    layer = nn.Linear(6, 4, bias=False).double()
    layer.weight.data = torch.from_numpy(w.copy())
    binary_weights = binarize_weights(layer, lr_scale="glorot" if scaled else "none")
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for step in range(20):
        optimizer.zero_grad()
        F.mse_loss(layer(torch.from_numpy(x[step])), torch.from_numpy(y[step])).backward()
        binary_weights.open()
        optimizer.step()
        binary_weights.close()
        assert layer.weight.detach().abs().unique().tolist() == [1.0]
    np.testing.assert_allclose(binary_weights.latent["weight"].numpy(), real, atol=1e-12)
    assert torch.equal(layer.weight.detach(), torch.from_numpy(np.where(real >= 0, 1.0, -1.0)))


def loop(layer: nn.Linear, binary: BinaryWeights, steps: int, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(8, layer.in_features, generator=generator)).square().mean().backward()
        binary.open()
        optimizer.step()
        binary.close()


def test_samples_are_drawn_anew_at_every_step_from_their_own_generator() -> None:
    samples = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Linear(40, 30)
        nn.init.constant_(layer.weight, 0.01)
        binary = BinaryWeights(layer, ["weight"], mode="stochastic", generator=torch.Generator().manual_seed(7))
        before = torch.get_rng_state()
        drawn = [layer.weight.detach().clone()]
        for _ in range(3):
            loop(layer, binary, 1)
            drawn.append(layer.weight.detach().clone())
            assert binary.holds()
        assert torch.equal(before, torch.get_rng_state())
        samples.append(drawn)
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
    assert 0.4 < float((samples[0][0] == 1).float().mean()) < 0.6
    assert all(0.2 < float((a != b).float().mean()) < 0.8 for a, b in zip(samples[0], samples[0][1:], strict=False))


def test_signs_and_real_values_can_be_shown_and_the_sample_comes_back() -> None:
    layer = nn.Linear(9, 4)
    binary = BinaryWeights(layer, ["weight"], mode="stochastic")
    loop(layer, binary, 2)
    sample, latent = layer.weight.detach().clone(), binary.latent["weight"].clone()
    binary.show()
    assert torch.equal(layer.weight.detach(), sign(latent))
    with binary.real():
        assert torch.equal(layer.weight.detach(), latent)
    assert torch.equal(layer.weight.detach(), sign(latent))
    binary.project()
    assert torch.equal(layer.weight.detach(), sample)
    assert not torch.equal(sample, sign(latent))


def test_state_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    layers, generators = [nn.Linear(9, 4), nn.Linear(9, 4)], [torch.Generator(), torch.Generator()]
    layers[0].weight.data[0, :3] = 0.0
    first = BinaryWeights(layers[0], ["weight"], mode="stochastic", generator=generators[0])
    loop(layers[0], first, 3)
    layers[1].load_state_dict(layers[0].state_dict())
    second = BinaryWeights(layers[1], ["weight"], mode="stochastic", generator=generators[1])
    second.load_state_dict(first.state_dict())
    generators[1].set_state(generators[0].get_state())
    assert torch.equal(layers[0].weight, layers[1].weight)
    for layer, binary in zip(layers, (first, second), strict=True):
        loop(layer, binary, 3)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(first.latent["weight"], second.latent["weight"])
    assert not layers[1].weight[0, :3].any()


@pytest.mark.parametrize("scaling", ["none", "mean"])
def test_weights_that_become_zero_stay_zero(scaling: Any) -> None:
    layer = nn.Linear(6, 4)
    layer.weight.data[1, 2] = 0.0
    binary = BinaryWeights(layer, ["weight"], scaling=scaling)
    loop(layer, binary, 2)
    layer.weight.data[0, 3] = 0.0  # as a mask does, between two steps
    loop(layer, binary, 3)
    assert layer.weight.grad is not None
    assert (layer.weight.grad == 0).nonzero().tolist() == [[0, 3], [1, 2]]  # nor do they count in the norm for clipping
    weight, latent = layer.weight.detach(), binary.latent["weight"]
    assert (weight == 0).nonzero().tolist() == [[0, 3], [1, 2]]
    assert (latent == 0).nonzero().tolist() == [[0, 3], [1, 2]]
    if scaling == "mean":
        for row, count in ((0, 5), (1, 5), (2, 6)):
            assert float(weight[row].abs().max()) == pytest.approx(float(latent[row].abs().sum() / count))


def test_a_channel_whose_real_values_are_zero_is_not_pruned() -> None:
    """It holds zeros as alpha is 0, and goes on training."""
    layer = nn.Linear(4, 2, bias=False)
    binary = BinaryWeights(layer, ["weight"], scaling="mean")
    binary.latent["weight"][0] = 0.0
    binary.project()
    assert not layer.weight[0].any()
    binary.take_writes()
    assert binary.alive == {}


@pytest.mark.parametrize("options", [{"mode": "stochastic"}, {"scaling": "mean"}], ids=str)
def test_a_cut_is_followed(options: Any) -> None:
    layer = nn.Linear(6, 4)
    layer.weight.data[1, 2] = 0.0
    binary = BinaryWeights(layer, ["weight"], **options)
    loop(layer, binary, 2)
    rows, columns, weight = torch.tensor([1, 3]), torch.tensor([0, 2, 5]), layer.weight.detach().clone()
    thin = weight[rows][:, columns]
    layer.weight.data, layer.bias.data, layer.in_features = thin.clone(), layer.bias.data[rows], 3
    layer.weight.grad = layer.bias.grad = None
    binary.follow_cut(layer, {"weight": {0: rows, 1: columns}, "bias": {0: rows}})
    assert binary.holds()
    binary.project()
    assert torch.equal(layer.weight.detach().sign(), thin.sign())
    loop(layer, binary, 2)
    assert layer.weight[0, 1] == 0
    assert binary.latent["weight"].shape == (2, 3)


def test_numbers_without_a_sign_are_refused() -> None:
    layer = nn.Linear(6, 4)
    layer.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite: 1 of 24 real values of weight\. Look"):
        BinaryWeights(layer, ["weight"])


def test_whether_weights_are_binary_can_be_seen() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    assert not holds_signs({"weight": layer.weight}, {"weight": 2})
    binary = BinaryWeights(layer, ["weight"], scaling="mean")
    assert holds_signs(binary.parameters, {"weight": 2})


# ---------------------------------------------------------------------- binary inputs


def test_the_gradient_of_a_sign_is_a_box() -> None:
    x = torch.linspace(-2, 2, 41, requires_grad=True)
    G = torch.randn(41)
    (sign_through(x) * G).sum().backward()
    assert torch.equal(x.grad, torch.where(x.detach().abs() <= 1, G, 0.0))
    mapped = torch.func.vmap(torch.func.grad(lambda one: 3 * sign_through(one)))(x.detach())
    assert torch.equal(mapped, torch.where(x.detach().abs() <= 1, 3.0, 0.0))


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), {}),
    "padded": (nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), bias=False), {"stride": 2, "padding": (1, 2)}),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), {"dilation": 2, "padding": "same"}),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_xnor_input_scaling_against_convolving_with_ones(name: str) -> None:
    torch.manual_seed(0)
    layer, options = CONVOLUTIONS[name]
    x = torch.randn(2, 4, 9, 9)
    ones = torch.ones(1, 4, *layer.kernel_size)
    K = F.conv2d(x.abs(), ones / ones.numel(), **options)
    bias = 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
    expected = K * F.conv2d(x.sign(), layer.weight, **options) + bias

    model = nn.Sequential(nn.Identity(), layer)
    inputs = binarize_inputs(model, activations="1", scale=True)
    assert torch.allclose(model(x), expected, atol=1e-5)
    inputs.remove()
    assert torch.equal(model(x), layer(x))


def test_xnor_input_scaling_of_grouped_circular_and_linear_layers() -> None:
    x = torch.randn(2, 4, 7)
    layer = nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular")
    scales = input_scales(layer, x)
    wrapped = torch.cat([x[..., -1:], x, x[..., :1]], dim=-1).abs()
    for group in range(2):
        means = wrapped[:, 2 * group : 2 * group + 2].mean(1).unfold(-1, 3, 1).mean(-1)
        for channel in range(3 * group, 3 * group + 3):
            assert torch.allclose(scales[:, channel], means)
    rows = torch.randn(2, 3, 5)
    assert torch.allclose(input_scales(nn.Linear(5, 4), rows), rows.abs().sum(-1, keepdim=True) / 5)


def test_gradients_pass_through_signs_and_scales() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    G = torch.randn(4, 3)
    by_hand = x.clone().requires_grad_()
    expected = by_hand.abs().mean(1, keepdim=True) * F.linear(through(by_hand), layer.weight) + layer.bias
    (expected * G).sum().backward()

    model = nn.ModuleDict({"layer": layer})
    binarize_inputs(model, activations="layer", scale=True)
    mine = x.clone().requires_grad_()
    (layer(mine) * G).sum().backward()
    assert torch.allclose(mine.grad, by_hand.grad, atol=1e-6)


def small(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), activation, nn.Linear(8, 8), nn.Linear(8, 2))


def test_all_layers_but_the_first_see_signs_and_no_key_changes() -> None:
    model = small(nn.Hardtanh())
    keys, seen = list(model.state_dict()), {}
    for name in ("0", "3", "4"):
        model[int(name)].register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].unique()}))
    assert binarize_inputs(model).names == ["3", "4"]
    model(torch.randn(16, 6))
    assert [len(seen[name]) for name in ("0", "3", "4")] == [16 * 6, 2, 2]
    assert list(model.state_dict()) == keys
    assert binarize_inputs(model, exclude="4").names == ["3"]
    assert binarize_inputs(model, exclude="0").names == ["3", "4"]  # the first layer keeps its inputs and its weights
    assert binarize_inputs(model, activations=["0", "4"]).names == ["0", "4"]
    assert binarize_inputs(model, activations=False).names == []


def test_hooks_are_put_once_and_are_copied_with_the_model() -> None:
    import copy
    import pickle

    model = small(nn.Hardtanh())
    for _ in range(2):
        inputs = binarize_inputs(model, scale=True)
    assert len(model[3]._forward_pre_hooks) == len(model[3]._forward_hooks) == 1
    x = torch.randn(16, 6)
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert has_binary_inputs(other[3])
        assert torch.equal(other(x), expected)
    inputs.remove()
    assert not has_binary_inputs(model[3])
    assert not torch.equal(model(x), expected)


def test_layers_behind_a_relu_are_refused_by_name() -> None:
    model = small(nn.ReLU())
    binarize_inputs(model)
    with pytest.raises(ValueError, match=r"The inputs of 3 are never negative, .* Put a batch norm.* before 3"):
        model(torch.randn(16, 6))
    model.eval()(torch.randn(16, 6))


def test_a_network_that_runs_in_another_order_is_refused() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(8, 2), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    model = Backwards()
    binarize_inputs(model)
    with pytest.raises(
        ValueError, match=r"keeps the inputs of head real, .* stem runs before it\. .* activations=\['...'\]"
    ):
        model(torch.randn(64, 6))
    binarize_inputs(model).remove()
    binarize_inputs(model, activations=["head"])
    model(torch.randn(64, 6))


def test_what_has_no_binary_inputs_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 2))
    with pytest.raises(ValueError, match=r"1 is a ConvTranspose1d, for which XNOR-Net has no scaling"):
        binarize_inputs(model, scale=True)
    with pytest.raises(ValueError, match=r"matches 1, whose weights are not binary: add these layers to target"):
        binarize_inputs(model, activations=["1"], exclude="1")
