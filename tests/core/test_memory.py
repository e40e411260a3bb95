"""Two tensors over one memory: found whatever the view, and refused or frozen where one of them would be changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from support.small import quiet_trainer
from torch import Tensor, nn

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
    channel_groups,
)
from lightning_compress.core.memory import shared_memory


def _views(base: Tensor) -> dict[str, Tensor]:
    """Every kind of view of a tensor of 6 rows and 8 columns."""
    return {
        "base": base,
        "transposed": base.t(),
        "flat": base.view(-1),
        "left": base[:, :3],
        "right": base[:, 3:],
        "even": base[:, ::2],
        "odd": base[:, 1::2],
        "first rows": base[:2],
        "last rows": base[2:],
        "diagonal": base.diagonal(),
        "expanded": base[0, 0].expand(4),
        "one row, expanded": base[5:].expand(3, 8),
        "windows": base.view(-1).unfold(0, 5, 3),
        "bytes": base.view(torch.uint8),
        "halves": base.view(torch.int16)[:, 1::2],
        "real parts": torch.view_as_complex(base.view(6, 4, 2)).real,
        "empty": base[:0],
        "copy": base.clone(),
    }


def test_shared_memory_is_what_writing_shows() -> None:
    views = _views(torch.zeros(6, 8))
    found = shared_memory(views)
    for first, second in itertools.combinations(views, 2):
        fresh = _views(torch.zeros(6, 8))
        before = fresh[second].clone()
        for place in itertools.product(*map(range, fresh[first].shape)):
            fresh[first][place] = 255  # torch refuses to fill a view that reaches one place twice
        changed = not torch.equal(before, fresh[second])
        assert ((first, second) in found) == changed, (first, second)


def test_one_object_under_two_names_and_tensors_without_an_address_share_nothing() -> None:
    weight = nn.Parameter(torch.zeros(3))
    meta = torch.zeros(3, device="meta")
    lazy = nn.LazyLinear(2).weight
    tensors = {
        "a": weight,
        "b": weight,
        "meta": meta,
        "meta view": meta[:2],
        "lazy": lazy,
        "sparse": torch.eye(2).to_sparse(),
    }
    assert shared_memory(tensors) == []


class Tied(LightningModule):
    """An autoencoder whose decoder is a view of its encoder, or is computed from it."""

    def __init__(self, view: Callable[[Tensor], Tensor] | None, *, trained: bool = True) -> None:
        super().__init__()
        self.enc = nn.Linear(12, 6)
        self.dec = None
        if view is not None:
            self.dec = nn.Linear(6, 12, bias=False)
            self.dec.weight = nn.Parameter(view(self.enc.weight.detach()), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.enc(x))
        weight = self.enc.weight.t() if self.dec is None else self.dec.weight
        return F.linear(hidden, weight if weight.shape == (12, 6) else weight.repeat(1, 6)[:, :6].expand(12, 6))

    def training_step(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self(batch), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], 0.05)


TECHNIQUES: dict[str, Callable[..., Callback]] = {
    "qat": lambda **options: QuantizationAwareTrainingCallback(3, None, **options),
    "qat-inputs": lambda **options: QuantizationAwareTrainingCallback(None, 4, **options),
    "binary": BinaryWeightsCallback,
    "clustering": lambda **options: WeightClusteringCallback(4, **options),
    "pruning": lambda **options: IterativePruningCallback(0.5, schedule="one_shot", **options),
    "neurons": lambda **options: IterativePruningCallback(0.5, granularity="neuron", **options),
    "lasso": lambda **options: GroupLassoCallback(0.1, **options),
    "lasso-units": lambda **options: GroupLassoCallback(0.1, granularity="group", **options),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda weight: weight.t(),
    "viewed": lambda weight: weight.view(12, 6),
    "sliced": lambda weight: weight.t()[:, :1],
}


def fit(module: Tied, callback: Callback, steps: int = 12) -> None:
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.randn(8 * steps, 12), 8)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, loader)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("view", VIEWS)
def test_two_trained_parameters_over_one_memory_are_refused_before_the_first_step(technique: str, view: str) -> None:
    module = Tied(VIEWS[view])
    before = module.enc.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"enc\.weight \(6, 12\) and dec\.weight .* are two Parameters over one memory"
    ):
        fit(module, TECHNIQUES[technique]())
    assert torch.equal(before, module.enc.weight)


def test_a_frozen_view_that_no_technique_changes_follows_what_it_views() -> None:
    module = Tied(VIEWS["transposed"], trained=False)
    fit(module, QuantizationAwareTrainingCallback(3, None, target="enc"))
    assert max(len(row.unique()) for row in module.enc.weight) <= 7
    assert module.dec is not None
    assert torch.equal(module.dec.weight, module.enc.weight.t())


def test_a_tie_that_is_computed_goes_on_a_grid() -> None:
    module = Tied(None)
    fit(module, QuantizationAwareTrainingCallback(3, None))
    assert max(len(row.unique()) for row in module.enc.weight) <= 7


def test_groups_over_a_shared_memory_are_frozen() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    net[4].weight = nn.Parameter(net[0].weight.detach().t())
    frozen = {group.name: group.frozen for group in channel_groups(net, torch.zeros(2, 4))}
    assert frozen["0"] == "0.weight and 4.weight are two tensors over one memory"
    assert frozen["2"] == frozen["0"]  # its channels are columns of 4.weight
