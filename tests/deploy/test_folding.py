from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.deploy.folding import fold_batch_norm


def awake(model: nn.Module) -> nn.Module:
    """Norms that do something: factors of both signs, and statistics of some data."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.2, 3.0)
            nn.init.normal_(module.running_mean)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False), (2, 4, 6, 6)),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 6)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (2, 3)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    ],
    ids=["conv", "grouped, no affine", "1d", "linear", "transposed"],
)
def test_the_network_computes_what_it_computed(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = awake(nn.Sequential(layer, norm, nn.ReLU()))
    weight = model[0].weight
    x = torch.randn(shape)
    expected = model(x)
    assert fold_batch_norm(model, x) is model
    assert norms(model) == 0
    assert model[0].weight is weight
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_integers_stay_under_factors_of_both_signs(layer: nn.Conv2d) -> None:
    integers = torch.randint(-127, 128, layer.weight.shape).float()
    scales = torch.rand(6) + 0.1
    rows = scales if isinstance(layer, nn.Conv2d) else scales.view(2, 3).repeat_interleave(2, 0)
    layer.weight.data = integers * (
        rows[:, None, None, None] if isinstance(layer, nn.Conv2d) else rows[..., None, None]
    )
    model = awake(nn.Sequential(layer, nn.BatchNorm2d(6)))
    norm = model[1]
    expected = scales.double() * (norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps))
    fold_batch_norm(model, torch.randn(2, 4, 6, 6), scales={"0": scales})
    outputs = layer.weight if isinstance(layer, nn.Conv2d) else layer.weight.unflatten(0, (2, 2)).transpose(1, 2)
    whole = integers if isinstance(layer, nn.Conv2d) else integers.unflatten(0, (2, 2)).transpose(1, 2)
    outputs, whole = (one.reshape(6, -1) for one in (outputs, whole))
    assert (expected < 0).any()
    assert torch.equal(outputs, whole * expected.float()[:, None])


class Net(nn.Module):
    """A convolution and a norm, joined in a way that must stay."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=kind != "batch")
        if kind in ("tied", "tied aside"):
            self.other = nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.conv.weight
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.conv)
        if kind == "hook":
            self.conv.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: Tensor) -> Tensor:
        kind, y = self.kind, self.conv(x)
        if kind == "add":
            return self.norm(y + x)
        if kind == "shared layer":
            return self.norm(y) + self.conv(2 * x)
        if kind == "shared norm":
            return self.norm(y) + self.norm(2 * x)
        if kind == "second reader":
            return self.norm(y) + y
        if kind in ("tied", "tied aside"):
            return self.norm(y) + self.other(x)
        if kind == "weight read":
            return self.norm(y) + self.conv.weight.sum()
        return self.norm(y)


KINDS = [
    "add",
    "shared layer",
    "shared norm",
    "second reader",
    "tied",
    "tied aside",
    "weight read",
    "batch",
    "weight norm",
    "hook",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_must_not_fold_stays(kind: str) -> None:
    model = awake(Net(kind))
    x = torch.randn(2, 3, 5, 5)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    fold_batch_norm(model, x)
    assert norms(model) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_a_norm_of_a_sequence_stays() -> None:
    model = awake(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    fold_batch_norm(model, torch.randn(2, 4, 3))
    assert norms(model) == 1


def test_modes_stay_and_nothing_is_learned_from_the_example() -> None:
    model = awake(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), Net("add"))).train()
    model[3].requires_grad_(False)
    model[0] = nn.Conv2d(3, 3, 3)
    model[1] = nn.BatchNorm2d(3)
    statistics = model[3].norm.running_mean.clone()
    fold_batch_norm(model, torch.randn(2, 3, 6, 6))
    assert [one.training for one in model] == [True] * 4
    assert torch.equal(model[3].norm.running_mean, statistics)
