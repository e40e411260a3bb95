"""The penalty on singular values: its proximal step by numpy and by its optimality, and training by a plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small import BATCH, SAMPLES, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback, LowRankCallback, NuclearNormCallback
from lightning_compress.low_rank import shrink_ranks, weight_matrices


def by_numpy(matrix: Tensor, threshold: float) -> Tensor:
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy(u @ np.diag(np.maximum(s - threshold, 0)) @ vh)


def nuclear(matrix: Tensor) -> float:
    return float(np.linalg.svd(matrix.numpy(), compute_uv=False).sum())


def test_the_step_minimises_distance_and_nuclear_norm() -> None:
    """0.5 |V - W|^2 + t |V|_* is convex: V is its minimum if no neighbour in any direction is lower."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False).double()
    w = layer.weight.detach().clone()
    shrink_ranks(weight_matrices(layer), 0.3)
    v = layer.weight.detach()

    def objective(one: Tensor) -> float:
        return 0.5 * float((one - w).square().sum()) + 0.3 * nuclear(one)

    least = objective(v)
    for size in (1e-1, 1e-3):
        for _ in range(50):
            assert objective(v + size * torch.randn_like(v)) > least
    for k in range(4):  # also along the matrix's own directions
        u, _, vh = np.linalg.svd(w.numpy())
        ray = torch.from_numpy(np.outer(u[:, k], vh[k]))
        assert min(objective(v + 1e-3 * ray), objective(v - 1e-3 * ray)) > least


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(7, 5),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (1, 3), groups=2),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Embedding(9, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_each_group_of_a_layer_is_a_matrix_of_its_outputs(layer: Any) -> None:
    layer = layer.double()
    w = layer.weight.detach().clone()
    groups = getattr(layer, "groups", 1)
    shrink_ranks(weight_matrices(layer, target="weight"), 0.2)
    for before, after in zip(w.chunk(groups), layer.weight.detach().chunk(groups), strict=True):
        if isinstance(layer, nn.ConvTranspose2d):
            before, after = before.transpose(0, 1), after.transpose(0, 1)
        expected = by_numpy(before.flatten(1), 0.2)
        torch.testing.assert_close(after.flatten(1), expected, rtol=1e-10, atol=1e-12)


def loop(strength: float, every: int) -> SmallModule:
    """Two epochs of the small network in which hidden and head are shrunk after every few steps."""
    torch.manual_seed(0)
    module = SmallModule()
    module.net.dropout = nn.Identity()
    module.double()
    found: Any = module.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    x, y = dataset().tensors
    taken, steps = 0.0, 0
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(module(x.double()[start : start + BATCH]), y[start : start + BATCH]).backward()
            optimizer.step()
            taken, steps = taken + strength * optimizer.param_groups[0]["lr"], steps + 1
            if steps % every == 0:
                for weight in (module.net.hidden.weight, module.net.head.weight):
                    weight.data = by_numpy(weight.detach(), taken)
                taken = 0.0
            schedule.step()
    return module


def fitted(callback: Any, **options: Any) -> SmallModule:
    torch.manual_seed(0)
    module = SmallModule()
    module.net.dropout = nn.Identity()
    quiet_trainer(callbacks=[callback], **({"max_epochs": 2, "precision": "64-true"} | options)).fit(module, plain(0))
    return module


@pytest.mark.parametrize("every", [1, 5])
def test_training_is_that_of_a_loop_that_shrinks_after_its_steps(every: int) -> None:
    callback = NuclearNormCallback(0.6, exclude="net.conv", every_n_steps=every)
    module, expected = fitted(callback), loop(0.6, every)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-8, atol=1e-10, msg=name)
    assert callback.rank_left() < 1


def test_low_rank_in_the_next_fit_keeps_what_was_left() -> None:
    """With every step the ranks that are left are those of the trained weights, and an energy of 1 keeps them alone."""
    callback = NuclearNormCallback(1.0, target="net.hidden", every_n_steps=1)
    module = fitted(callback)
    left = int(torch.linalg.matrix_rank(module.net.hidden.weight.detach()))
    assert callback.rank_left() == left / 16
    assert 0 < left < 12
    low_rank = LowRankCallback(energy=1.0, target="net.hidden", data="none")
    quiet_trainer(callbacks=[low_rank], max_epochs=1, precision="64-true").fit(module, plain(0))
    assert module.net.hidden.numbers == {"rank": left}


@pytest.mark.parametrize(("strength", "rate"), [(0.0, 0.1), (1.0, 0.0)])
def test_nothing_changes_without_strength_or_learning_rate(strength: float, rate: float) -> None:
    class Plain(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=rate)

    ends = []
    for callbacks in ([], [NuclearNormCallback(strength, target="net.hidden", every_n_steps=1)]):
        torch.manual_seed(0)
        module = Plain()
        quiet_trainer(callbacks=callbacks, max_epochs=1).fit(module, plain(0))
        ends.append(module.net.hidden.weight)
    assert torch.equal(*ends)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength must be a finite number, 0 or more; got -1"):
        NuclearNormCallback(-1)
    with pytest.raises(ValueError, match=r"every_n_steps must be a whole number, 1 or more; got 0"):
        NuclearNormCallback(1.0, every_n_steps=0)
    with pytest.raises(ValueError, match=r"net\.norm\.weight has shape \(6,\): a vector has no rank"):
        fitted(NuclearNormCallback(1.0, target=["net.hidden", "net.norm.weight"]))
    pruning = IterativePruningCallback(0.5)
    with pytest.raises(ValueError, match=r"changes all entries of net\.conv\.weight.* in an earlier fit"):
        quiet_trainer(callbacks=[pruning, NuclearNormCallback(1.0)]).fit(SmallModule(), plain(0))


def test_weights_that_are_not_finite_are_named() -> None:
    module = SmallModule()
    nn.init.constant_(module.net.hidden.weight, torch.nan)
    with pytest.raises(ValueError, match=r"can't decompose net\.hidden\.weight, whose entries must be finite"):
        quiet_trainer(callbacks=[NuclearNormCallback(1.0, target="net.hidden", every_n_steps=1)]).fit(module, plain(0))
