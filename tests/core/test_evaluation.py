from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.core.evaluation import caches_off, evaluating


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


class Configured(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def test_caches_are_off_where_a_config_has_them_and_then_as_before() -> None:
    @dataclass(frozen=True)
    class Frozen:
        use_cache: bool

    shared = SimpleNamespace(use_cache=True)
    model = nn.ModuleList(map(Configured, (shared, shared, Frozen(True), SimpleNamespace(use_cache=False), {}, None)))
    with caches_off(model):
        assert not any(getattr(one.config, "use_cache", False) for one in model)
    with pytest.raises(ZeroDivisionError), caches_off(model):
        1 / 0  # noqa: B018
    assert [getattr(one.config, "use_cache", None) for one in model] == [True, True, True, False, None, None]


def test_a_language_model_is_planned_as_if_it_had_no_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            use_cache=use_cache,
        )
        groups = channel_groups(LlamaForCausalLM(config), {"input_ids": torch.arange(10).view(2, 5)})
        found.append([(group.name, group.size, group.frozen) for group in groups])
        assert config.use_cache is use_cache
    assert found[0] == found[1]
    assert any(size == 12 and frozen is None for _, size, frozen in found[0])
