from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.core.evaluation import evaluating


class _Restless(nn.Module):
    """Writes to its buffers in every forward pass, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, track_running_stats=True)
        self.frozen = nn.Dropout().eval()
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        self.absent = torch.ones(1)
        self.register_buffer("added", torch.ones(1))
        torch.rand(3)
        return self.norm(self.linear(x))


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "buffers": {name: (id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()},
        "keys": list(model.state_dict()),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    model = _Restless()
    before = _snapshot(model)
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not model(torch.randn(4, 2)).requires_grad
            assert _snapshot(model) != before
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert _snapshot(model) == before
    assert model.absent is None


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()  # eval: backward needs the running statistics
    loss = model(torch.randn(4, 2)).sum()
    with evaluating(model):
        model(torch.randn(4, 2))
    loss.backward()


def test_what_the_model_caches_can_still_be_trained_on() -> None:
    class Caching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "cache"):
                self.cache = torch.ones(2) * 3
            return super().forward(x) * self.cache

    model = Caching(2, 2)
    with evaluating(model):
        model(torch.randn(4, 2))
    model(torch.randn(4, 2)).sum().backward()
    assert model.weight.grad is not None


def test_modules_that_act_on_a_change_of_mode_are_told() -> None:
    class Merging(nn.Module):
        merged = False

        def train(self, mode: bool = True) -> Merging:
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging())
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_modules_work() -> None:
    model = torch.jit.script(nn.BatchNorm1d(2))
    with evaluating(model):
        assert not model.training
    assert model.training
