"""Grids against torch's own fake quantization, brute force and autograd."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import load_compressed, save_compressed
from lightning_compress.binary.inputs import binarize_inputs
from lightning_compress.quantization.grids import on_symmetric_grid, weight_scales
from lightning_compress.quantization.input_grids import InputGrid, input_grids, on_grid, quantize_inputs
from lightning_compress.quantization.observers import ObservedInputs
from lightning_compress.quantization.weights import UniformWeights, quantize_weights

BITS = (2, 3, 4, 6, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("bits", BITS)
def test_weights_against_torch_per_channel(bits: int) -> None:
    w = torch.randn(6, 5, 3, 3, generator=generator())
    scales = weight_scales(w, bits)
    assert scales.shape == (6, 1, 1, 1)
    top = 2 ** (bits - 1) - 1
    expected = torch.fake_quantize_per_channel_affine(
        w, scales.flatten(), torch.zeros(6, dtype=torch.int32), 0, -top, top
    )
    found = on_symmetric_grid(w, scales, bits)
    near = (found - expected).abs() <= 1e-6 * scales  # torch multiplies with 1 / scale, and rounds some ties away
    assert near.float().mean() > 0.99
    assert ((found - expected).abs() <= 1.001 * scales).all()
    assert torch.equal(found, (found / scales).round() * scales)
    if bits >= 6:
        assert torch.allclose(scales.flatten() * top, w.flatten(1).abs().amax(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["normal", "laplace", "pruned"])
def test_scales_of_few_bits_are_near_the_best_by_brute_force(bits: int, kind: str) -> None:
    w = torch.randn(20, 300, generator=generator())
    if kind == "laplace":
        w = w.sign() * -torch.rand(w.shape, generator=generator(1)).log()
    if kind == "pruned":
        w = w * (w.abs() > 1.5)
    top = 2 ** (bits - 1) - 1
    covering = w.abs().amax(1, keepdim=True) / top

    def error(scales: Tensor) -> Tensor:
        return (w - scales * (w / scales).round().clamp(-top, top)).square().sum(1)

    best = torch.stack([error(covering * f) for f in torch.linspace(0.02, 1.2, 600)]).amin(0)
    found = error(weight_scales(w, bits).view(-1, 1))
    # Local minima lie close together at 4 and 5 bits; what the largest weight asks for is 1.3 to 4 times the best.
    assert float((found / best).mean()) < 1.15
    assert (found <= error(covering) + 1e-6).all()
    assert found.sum() < 0.95 * error(covering).sum()


def test_output_channels_of_transposed_convolutions_and_one_scale_for_all() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(4, 3, 1, generator=generator()) + 0.1)
    w = layer.weight.detach().clone()
    quantize_weights(layer, 8)
    for group in range(2):
        for channel in range(3):
            part = (slice(2 * group, 2 * group + 2), channel)
            scale = w[part].abs().max() / 127
            assert torch.allclose(layer.weight[part], (w[part] / scale).round() * scale, atol=1e-6)
    layer.weight.data = w.clone()
    quantize_weights(layer, 8, granularity="tensor")
    assert torch.allclose(layer.weight, (w / (w.abs().max() / 127)).round() * (w.abs().max() / 127), atol=1e-6)


def test_gradients_pass_straight_through_to_real_weights_that_have_not_rounded() -> None:
    """Against a loop by hand: gradient at the grid's point, step of the real weight."""
    layer = nn.Linear(6, 4, bias=False)
    w, x = layer.weight.detach().clone(), torch.randn(20, 8, 6, generator=generator())
    uniform = UniformWeights(layer, {"weight": 8})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for batch in x:
        optimizer.zero_grad()
        layer(batch).square().mean().backward()
        uniform.open()
        optimizer.step()
        uniform.close()

        scale = w.abs().amax(1, keepdim=True) / 127
        held = ((w / scale).round() * scale).requires_grad_()
        (gradient,) = torch.autograd.grad((batch @ held.T).square().mean(), held)
        w = w - 0.1 * gradient
    assert torch.allclose(uniform.latent["weight"], w, atol=1e-5)


def test_pruned_weights_stay_zero_and_rounded_ones_come_back() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.2, 0.0, 0.7]])
    uniform = UniformWeights(layer, {"weight": 2})
    assert layer.weight[0, 1] == layer.weight[0, 2] == 0

    def step(gradient: list[float]) -> None:
        layer.weight.grad = torch.tensor([gradient])
        uniform.open()
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
        uniform.close()

    step([0.0, -0.6, -0.6, 0.0])
    assert layer.weight[0, 1] > 0 == layer.weight[0, 2]
    layer.weight.data[0, 3] = 0.0  # as a mask does, between two steps
    step([0.0, 0.0, -0.6, -0.6])
    assert not layer.weight[0, 2:].any()
    assert not uniform.latent["weight"][0, 2:].any()


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.ConvTranspose1d(4, 6, 3)], ids=lambda one: type(one).__name__)
def test_a_cut_is_followed(layer: nn.Module) -> None:
    uniform = UniformWeights(layer, {"weight": 4})
    rows, columns = torch.tensor([1, 3]), torch.tensor([0, 2, 5])
    thin = layer.weight.detach()[rows][:, columns].clone()
    layer.weight.data = thin.clone()
    layer.weight.grad = None
    uniform.follow_cut(layer, {"weight": {0: rows, 1: columns}})
    assert uniform.holds()
    uniform.project()
    assert torch.equal(layer.weight.detach(), thin)


def test_the_file_finds_the_grid_and_four_bits_take_half_of_eight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, sizes = nn.Linear(300, 100, bias=False), {}
    for bits in (8, 4, 2):
        net = copy.deepcopy(dense)
        quantize_weights(net, bits)
        size = save_compressed(net, tmp_path / "net.lcz", coder="none")
        assert "grid" in str(size)
        assert torch.equal(load_compressed(tmp_path / "net.lcz")["weight"], net.weight)
        sizes[bits] = size.bytes - 400  # the scales
    assert sizes[4] / sizes[8] == pytest.approx(0.5, abs=0.02)
    assert sizes[2] / sizes[8] < 0.25  # three values


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize("bits", BITS)
def test_inputs_are_the_nearest_level_with_a_clipped_gradient(bits: int) -> None:
    grid = InputGrid.covering(-0.7, 2.1, bits)
    x = (4 * torch.randn(500, generator=generator())).requires_grad_()
    y = on_grid(x, torch.tensor(grid.scale), torch.tensor(float(grid.zero_point)), bits)
    levels = torch.tensor(grid.levels())
    assert 0.0 in grid.levels()
    nearest = levels[(x.detach()[:, None] - levels).abs().argmin(1)]
    assert torch.allclose(y, nearest)
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(other, grid.scale, grid.zero_point, 0, 2**bits - 1).sum().backward()
    assert torch.equal(x.grad, other.grad)
    mapped = torch.func.vmap(torch.func.grad(lambda one: on_grid(one, torch.tensor(1.0), torch.tensor(0.0), 2)))
    assert mapped(torch.tensor([-2.0, 1.2, 7.0])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("low", "high"), [(0.3, 2.0), (-2.0, -0.3), (0.0, 0.0), (-1e-30, 5.0)])
def test_a_grid_always_holds_zero(low: float, high: float) -> None:
    grid = InputGrid.covering(low, high, 4)
    assert 0.0 in grid.levels()
    assert min(grid.levels()) <= min(low, 0) + grid.scale
    assert max(grid.levels()) >= max(high, 0) - grid.scale


def make() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).eval()


def test_grids_travel_with_copies_and_files_and_leave_no_trace(tmp_path: Path) -> None:
    net, x = make(), torch.randn(5, 1, 8, generator=generator())
    real, keys = net(x), list(net.state_dict())
    grids = {"0": InputGrid(0.25, 7, 4), "3": InputGrid(0.125, 0, 4)}
    handle = quantize_inputs(net, grids)
    expected = net(x)
    assert not torch.equal(real, expected)
    assert list(net.state_dict()) == keys
    twin = copy.deepcopy(net)
    handle.remove()
    assert torch.equal(net(x), real)
    assert input_grids(net) == {}
    assert torch.equal(twin(x), expected)
    assert input_grids(twin) == grids

    save_compressed(twin, tmp_path / "net.lcz")
    torch.save(twin.state_dict(), tmp_path / "net.pt")
    for name in ("net.lcz", "net.pt"):
        loaded = load_compressed(tmp_path / name, make())
        assert torch.equal(loaded(x), expected)
        assert input_grids(loaded) == grids
        loaded.load_state_dict(make().state_dict())  # of before
        assert torch.equal(loaded(x), real)
        loaded.load_state_dict(dict(twin.state_dict()))  # has lost its metadata, which says nothing
        assert input_grids(loaded) == {}
    assert make().load_state_dict(load_compressed(tmp_path / "net.lcz"), strict=True)

    binarize_inputs(net, scale=True)
    save_compressed(net, tmp_path / "binary.lcz")
    assert torch.equal(load_compressed(tmp_path / "binary.lcz", make())(x), net(x))
    quantize_inputs(net, grids)  # in its place
    assert torch.equal(net(x), expected)


def test_grids_work_in_a_compiled_network() -> None:
    net, x = make(), torch.randn(5, 1, 8, generator=generator())
    quantize_inputs(net, {"3": InputGrid(0.25, 0, 4)})
    assert torch.equal(torch.compile(net, backend="eager")(x), net(x))


def test_ranges_are_moving_averages_over_training_steps_alone() -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    inputs = ObservedInputs(net, ["0"], 8, smoothing=0.75)
    assert inputs.unseen() == ["0"]
    for batches in ([1.0, 3.0], [-2.0], []):
        for value in batches:  # micro-batches of one step
            net(torch.tensor([[value]]))
        inputs.update(inputs.seen())
    with torch.no_grad():
        net.eval()(torch.tensor([[99.0]]))
    inputs.update(inputs.seen())
    low, high = inputs.ranges[0].tolist()
    assert (low, high) == pytest.approx((0.25 * -2, 0.75 * 3))
    net.train()(torch.tensor([[float("nan")]]))
    inputs.update(inputs.seen())
    assert inputs.ranges[0].tolist() == [low, high]
    with pytest.raises(ValueError, match="Inputs of 0 were NaN or infinite"):
        inputs.check_finite()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bits", [1, 9, True, 2.5, 0, "8"])
def test_bits_out_of_range_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number from 2 to 8; got"):
        UniformWeights(nn.Linear(2, 2), {"weight": bits})
    with pytest.raises(ValueError, match=r"bits must be a whole number from 2 to 8; got"):
        InputGrid(1.0, 0, bits)


def test_what_can_not_be_put_on_a_grid_is_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite: 1 of 4 real values of weight"):
        quantize_weights(layer)
    with pytest.raises(ValueError, match="granularity must be 'channel' or 'tensor'"):
        quantize_weights(nn.Linear(2, 2), granularity="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Sequential has no layer 'fc'"):
        quantize_inputs(make(), {"fc": InputGrid(1.0, 0, 8)})
    for options in ({"scale": 0.0}, {"scale": float("nan")}, {"zero_point": 256}):
        with pytest.raises(ValueError, match="must be"):
            InputGrid(**({"scale": 1.0, "zero_point": 0, "bits": 8} | options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_weights(make(), {"0": 8, "3": None})
