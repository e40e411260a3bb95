from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.measure import footprint as module
from lightning_compress.measure.footprint import Footprint, compare_latency, measure, summarize_latency


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 100), nn.ReLU(inplace=True), nn.Linear(100, 30), nn.Linear(30, 50))


def footprint(model: nn.Module, example_inputs: Any, *, repeats: int) -> Footprint:
    return measure(model, example_inputs, repeats=repeats, file_bytes=lambda model: 0)


def _measure(model: nn.Module, example_inputs: Any) -> Footprint:
    return footprint(model, example_inputs, repeats=1)


def test_parameters_count_once_and_buffers_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert _measure(model, torch.randn(3, 6)).parameters == 36 + 6 + 6 + 6 + 6


def test_zeros_are_no_nonzeros_whatever_their_sign() -> None:
    model = nn.Linear(4, 5, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 21.0).reshape(5, 4))
        model.weight[1] = 0.0
        model.weight[2] = -0.0
        model.weight[3, 0] = float("nan")
    assert _measure(model, torch.randn(3, 4)).nonzero == 20 - 8


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False)
        self.register_buffer("scale", torch.ones(20))
        self.register_buffer("view", self.first.weight.detach()[:5])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h) + h  # at the sum: h, second(h) and the result


class _Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 10)
        part = wide[:, :2]
        del wide  # its memory lives on in the view
        doubled = part * 2
        del part
        return doubled + 1


@pytest.mark.parametrize(
    ("model", "example_inputs", "resident", "forward"),
    [
        (_mlp(), torch.randn(4, 10), 1000 + 100 + 3000 + 30 + 1500 + 50, 4 * (100 + 30)),
        (_Residual(), torch.randn(4, 20), 400 + 400 + 20, 4 * 20 * 3),
        (_Views(), torch.randn(4, 10), 0, 4 * 100 + 4 * 2),
        (nn.Flatten(), torch.randn(4, 10, 10), 0, 0),
        (nn.Sequential(*[nn.Linear(8, 8)] * 5), torch.randn(3, 8), 64 + 8, 3 * (8 + 8)),
    ],
    ids=["chain", "residual", "views", "nothing made", "tied"],
)
def test_peak_memory_is_that_of_the_known_live_set(
    model: nn.Module, example_inputs: Tensor, resident: int, forward: int
) -> None:
    assert _measure(model, example_inputs).peak_memory == 4 * (resident + forward)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_peak_memory_is_at_least_the_live_set() -> None:
    model, x = nn.Linear(1024, 1024, bias=False).cuda(), torch.randn(512, 1024, device="cuda")
    live = 4 * (1024 * 1024 + 512 * 1024)
    assert live <= _measure(model, x).peak_memory <= 1.1 * live


class _Clock:
    """Time passes only where a network runs: `duration(i)` seconds in its i-th forward pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def network(self, name: str, duration: Callable[[int], float]) -> nn.Module:
        clock = self

        class Network(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                assert not self.training
                assert not torch.is_grad_enabled()
                clock.now += duration(clock.order.count(name))
                clock.order.append(name)
                return x

        return Network()


def test_latencies_are_medians_of_warm_passes_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, x = _Clock(monkeypatch), torch.ones(2, 1)
    seconds_of_dense = [1000.0, 1000.0, 1000.0, 3.1, 2.9, 2.8, 3.2, 3.0]  # the first three warm it up
    dense = clock.network("dense", seconds_of_dense.__getitem__)
    small = clock.network("small", lambda _: 0.25)
    assert compare_latency({"dense": (dense, x), "small": (small, x)}, repeats=5) == {"dense": 3.0, "small": 0.25}
    turns = [clock.order[i : i + 2] for i in range(0, 16, 2)]
    assert all(sorted(turn) == ["dense", "small"] for turn in turns)
    assert ["dense", "small"] in turns
    assert ["small", "dense"] in turns, "in one order another process could interrupt always the same network"
    assert dense.training


def test_latency_of_a_footprint_is_that_of_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _Clock(monkeypatch).network("only", lambda i: 100.0 + i)
    assert footprint(network, torch.ones(2, 1), repeats=5).latency == 105.0  # passes 3, 4, 5, 6, 7


def test_interrupted_passes_do_not_make_a_network_slower_than_itself() -> None:
    """Another process takes turns of 6 ms, a pass takes 1 ms: the medians of the same network differ 7 times."""
    alone, shared = [1.0] * 3 + [7.0] * 2, [7.0] * 3 + [1.0] * 2
    found = summarize_latency({"dense": alone * 40, "compressed": shared * 40})
    assert found["dense"].seconds == found["compressed"].seconds == 1.0
    assert found["dense"].spread > 0.5
    assert not found["dense"].busy
    calm = summarize_latency({"dense": [2.0, 2.1, 1.9, 2.0] * 5, "compressed": [1.0, 1.1, 0.9, 1.0] * 5})
    assert (calm["dense"].seconds, calm["compressed"].seconds, calm["dense"].busy) == (2.0, 1.0, False)


@pytest.mark.parametrize("change", [lambda i: i < 20, lambda i: i % 2 == 0], ids=["halves", "every other"])
def test_latencies_that_cannot_be_compared_are_called_busy(change: Callable[[int], bool]) -> None:
    """One network's undisturbed passes get slower for a while, the other's do not: no ratio of them means anything."""
    moving = [1.0 if change(i) else 1.5 for i in range(40)]
    found = summarize_latency({"dense": moving, "compressed": [1.0] * 40})
    assert found["dense"].busy
    assert found["compressed"].busy
    together = summarize_latency({"dense": moving, "compressed": [2 * value for value in moving]})
    assert not together["dense"].busy, "the clock frequency moved, and the ratio did not"
    assert together["compressed"].seconds == 2 * together["dense"].seconds


def test_macs_are_per_sample_and_what_is_not_counted_is_said() -> None:
    class Summing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).cumsum(1)

    cost = _measure(Summing(4, 5), torch.randn(16, 4))
    assert (cost.macs, cost.uncounted) == (20, ("aten.cumsum",))


@pytest.mark.parametrize("spread", [tuple, lambda pair: dict(zip(("input1", "input2"), pair, strict=True))])
def test_example_inputs_may_be_positions_or_keywords(spread: Callable[[Any], Any]) -> None:
    example_inputs = spread((torch.randn(4, 2), torch.randn(4, 3)))
    assert _measure(nn.Bilinear(2, 3, 5), example_inputs).parameters == 2 * 3 * 5 + 5


def test_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    model[1].eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model(torch.randn(3, 1, 8, 8)).sum().backward()
    calls.clear()
    before = copy.deepcopy({name: (p.detach(), p.grad) for name, p in model.named_parameters()})
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    statistics = copy.deepcopy(dict(model.named_buffers()))
    random = torch.get_rng_state()
    hooks = (dict(nn.modules.module._global_forward_hooks), dict(nn.modules.module._global_forward_pre_hooks))

    footprint(model, torch.randn(3, 1, 8, 8, generator=torch.Generator()), repeats=2)

    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])
        assert parameter.requires_grad
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, statistics[name])
    assert torch.equal(torch.get_rng_state(), random)
    assert (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks) == hooks
    assert len(calls) == 3 + 2 + 1 + 1  # warm-up, timed, counted, memory
    model(torch.randn(3, 1, 8, 8))
    assert len(calls) == 8


def test_network_that_fails_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        _measure(model, torch.randn(2, 4))
    assert all(child.training for child in model.modules())


@pytest.mark.parametrize(
    ("model", "example_inputs", "repeats", "message"),
    [
        ("lenet", torch.ones(2, 3), 1, "model must be a torch.nn.Module; got str"),
        (nn.Linear(3, 2), torch.ones(0, 3), 1, r"at least one sample.*\(0, 3\)"),
        (nn.Linear(3, 2), None, 1, "got None"),
        (nn.Linear(3, 2), torch.ones(2, 3, device="meta"), 1, "inputs are on meta, but the model is on cpu"),
        (nn.Linear(3, 2, device="meta"), torch.ones(2, 3), 1, r"weight of L\w+ has no values yet"),
        (nn.LazyLinear(2), torch.ones(2, 3), 1, r"weight of L\w+ has no values yet"),
        (nn.Linear(3, 2), torch.ones(2, 3), 0, "repeats .* must be at least 1; got 0"),
    ],
)
def test_bad_input_is_refused(model: Any, example_inputs: Any, repeats: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        footprint(model, example_inputs, repeats=repeats)


def test_lazy_network_stays_lazy() -> None:
    model = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="lazy"):
        _measure(model, torch.ones(2, 3))
    assert model.has_uninitialized_params()
