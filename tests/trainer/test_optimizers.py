"""Optimizers that are exchanged, work inside others, evaluate the loss several times, or step by other methods."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)

LR, RHO = 0.05, 0.2
DATA = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)))


class Net(LightningModule):
    def __init__(self, make: Callable[[Any], Any] = lambda parameters: torch.optim.SGD(parameters, lr=LR)) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return F.mse_loss(self.net(batch[0]), batch[0][:, :3])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **({"max_epochs": 2} | options))
    trainer.fit(module, DataLoader(DATA, batch_size=8))
    return trainer


class SharpnessAware(torch.optim.Optimizer):
    """Foret et al. 2021, as it is found in the wild: the second pass is taken at w + e, the step from w."""

    def __init__(self, parameters: Any, back: str) -> None:
        super().__init__(parameters, {"lr": LR})
        self.base = torch.optim.SGD(self.param_groups, lr=LR)
        self.back = back

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        moves = [p.grad * (RHO / norm) for p in parameters]
        before = [p.detach().clone() for p in parameters]
        for p, move in zip(parameters, moves, strict=True):
            p.add_(move)
        closure()
        for p, old, move in zip(parameters, before, moves, strict=True):
            if self.back == "copy":
                p.copy_(old)
            elif self.back == "data":
                p.data = old
            else:
                p.sub_(move)
        self.base.step()
        return loss


def grid(w: Tensor) -> Tensor:
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale).round().clamp(-127, 127) * scale


def signs(w: Tensor) -> Tensor:
    return torch.where(w >= 0, 1.0, -1.0)


@pytest.mark.parametrize("back", ["copy", "data", "subtract"])
@pytest.mark.parametrize(
    ("technique", "shown"),
    [
        (lambda: QuantizationAwareTrainingCallback(8, None), grid),
        (lambda: BinaryWeightsCallback(clip=None), signs),
        (lambda: IterativePruningCallback(0.5, schedule="one_shot", scope="layer"), None),
    ],
    ids=["qat", "binary", "pruning"],
)
def test_every_pass_of_a_step_sees_projected_weights(
    technique: Callable[[], Any], shown: Callable[[Tensor], Tensor] | None, back: str
) -> None:
    torch.manual_seed(0)
    module = Net(lambda parameters: SharpnessAware(parameters, back))
    hand = copy.deepcopy(module.net)
    callback = technique()
    fit(module, callback)

    matrices = [hand[0].weight, hand[2].weight]
    if shown is None:
        kept = {id(w): w.detach().abs() > w.detach().abs().flatten().sort()[0][w.numel() // 2 - 1] for w in matrices}
    parameters = list(hand.parameters())
    hidden = [p.detach().clone() for p in parameters]

    def gradients(at: list[Tensor], x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(parameters, at, strict=True):
                matrix = any(p is w for w in matrices)
                if shown is None:
                    p.copy_(torch.where(kept[id(p)], value, 0.0) if matrix else value)
                else:
                    p.copy_(shown(value) if matrix else value)
        hand.zero_grad()
        F.mse_loss(hand(x), x[:, :3]).backward()
        if shown is None:  # what is pruned has no part in the norm
            return [torch.where(kept[id(p)], p.grad, 0.0) if id(p) in kept else p.grad.clone() for p in parameters]
        return [p.grad.clone() for p in parameters]

    for _ in range(2):
        for (x,) in DataLoader(DATA, batch_size=8):
            first = gradients(hidden, x)
            norm = torch.stack([g.norm() for g in first]).norm()
            second = gradients([h + g * (RHO / norm) for h, g in zip(hidden, first, strict=True)], x)
            hidden = [h - LR * g for h, g in zip(hidden, second, strict=True)]
            if shown is None:
                pairs = zip(parameters, hidden, strict=True)
                hidden = [torch.where(kept[id(p)], h, 0.0) if id(p) in kept else h for p, h in pairs]
    for p, (name, parameter), h in zip(parameters, module.net.named_parameters(), hidden, strict=True):
        matrix = any(p is w for w in matrices)
        assert torch.allclose(callback.latent.get(f"net.{name}", parameter.detach()), h, atol=1e-5), name
        if shown is not None and matrix:
            assert torch.allclose(parameter.detach(), shown(h), atol=1e-2 if shown is grid else 0), name


class Slow(torch.optim.Optimizer):
    """Lookahead: an optimizer around another, which it gives the closure."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        self.optimizer = torch.optim.SGD(parameters, lr=LR)
        super().__init__(parameters, {"lr": LR})
        self.slow = [p.detach().clone() for p in parameters]

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


def test_an_optimizer_inside_another_does_not_end_its_step() -> None:
    torch.manual_seed(0)
    module = Net(Slow)
    hand, callback = copy.deepcopy(module.net), QuantizationAwareTrainingCallback(8, None)
    fit(module, callback)
    hidden = {name: p.detach().clone() for name, p in hand.named_parameters()}
    for _ in range(2):
        for (x,) in DataLoader(DATA, batch_size=8):
            with torch.no_grad():
                for name, p in hand.named_parameters():
                    p.copy_(grid(hidden[name]) if p.dim() > 1 else hidden[name])
            hand.zero_grad()
            F.mse_loss(hand(x), x[:, :3]).backward()
            for name, p in hand.named_parameters():
                hidden[name] -= 0.5 * LR * p.grad
    for name in ("0.weight", "2.weight"):
        assert torch.allclose(callback.latent[f"net.{name}"], hidden[name], atol=1e-5)


class OwnMethods(torch.optim.Optimizer):
    """Steps by two methods of its own."""

    def __init__(self, parameters: Any, base: bool) -> None:
        super().__init__(parameters, {"lr": LR})
        self.base = torch.optim.SGD(self.param_groups, lr=LR) if base else None

    @torch.no_grad()
    def first_step(self) -> None:
        self.moves = [0.01 * p.grad for group in self.param_groups for p in group["params"]]
        for p, move in zip((p for group in self.param_groups for p in group["params"]), self.moves, strict=True):
            p.add_(move)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, move in zip((p for group in self.param_groups for p in group["params"]), self.moves, strict=True):
            p.sub_(move)
            if self.base is None:
                p.data.sub_(LR * p.grad)
        if self.base is not None:
            self.base.step()


class Manual(Net):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            step()


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("technique", [lambda: QuantizationAwareTrainingCallback(4, None), BinaryWeightsCallback])
def test_an_optimizer_that_steps_by_methods_of_its_own_is_refused(technique: Callable[[], Any], base: bool) -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="step"):
        fit(Manual(lambda parameters: OwnMethods(parameters, base)), technique())


@pytest.mark.parametrize("base", [True, False])
def test_masks_hold_whatever_the_methods_are_called(base: bool) -> None:
    torch.manual_seed(0)
    module = Manual(lambda parameters: OwnMethods(parameters, base))
    pruning = IterativePruningCallback(0.5, schedule="one_shot")
    fit(module, pruning)
    assert sum(int((p == 0).sum()) for p in module.parameters()) == 36
    assert pruning.sparsity == 0.5


class Anew(Callback):
    """Makes an optimizer in every epoch, at an address that an earlier one had."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0:
            held = []
            trainer.strategy.optimizers = []
            gc.collect()
            for _ in range(60):
                held.append(torch.optim.SGD(pl_module.parameters(), lr=LR, momentum=0.9))
                if id(held[-1]) in self.addresses:
                    break
            trainer.strategy.optimizers = [held[-1]]
        self.addresses |= {id(one) for one in trainer.optimizers}


@pytest.mark.parametrize("regrow", [False, True])
def test_masks_hold_with_optimizers_that_are_made_anew(regrow: bool) -> None:
    torch.manual_seed(0)
    module, moved = Net(), []

    class Moves(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            moved.append(pl_module.net[0].weight.detach().clone())

    pruning = IterativePruningCallback(0.5, end_epoch=2.0, regrow=regrow)
    fit(module, Anew(), pruning, Moves(), max_epochs=6)
    assert sum(int((p == 0).sum()) for p in module.parameters()) == 36
    assert pruning.sparsity == 0.5
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(moved))


def test_parameters_that_move_to_another_group_are_projected() -> None:
    """The number of parameters stays the same when one replaces another."""

    class Exchange(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            layer = pl_module.net[2 * (trainer.current_epoch % 2)]
            trainer.optimizers[0].param_groups[0]["params"] = [layer.weight]

    torch.manual_seed(0)
    module = Net(lambda parameters: torch.optim.SGD(list(parameters)[:1], lr=LR))
    start = [module.net[0].weight.detach().clone(), module.net[2].weight.detach().clone()]
    technique = BinaryWeightsCallback(target=["net.0", "net.2"])
    fit(module, Exchange(), technique, max_epochs=4)
    for name, before in zip(("net.0.weight", "net.2.weight"), start, strict=True):
        assert not torch.equal(technique.latent[name], before)
        assert module.get_parameter(name).detach().abs().unique().tolist() == [1.0]


@pytest.mark.parametrize(
    "technique",
    [
        lambda: IterativePruningCallback(0.5, target="net.0"),
        lambda: IterativePruningCallback(0.5, target="net.0", regrow=True),
        lambda: IterativePruningCallback(0.5, target="net.0", criterion="taylor"),
        lambda: QuantizationAwareTrainingCallback(4, None, target="net.0"),
        lambda: BinaryWeightsCallback(target="net.0"),
        lambda: WeightClusteringCallback(4, target="net.0"),
        lambda: GroupLassoCallback(0.1, target="net.0"),
        lambda: GroupLassoCallback(0.1, target="net.0", proximal=True),
    ],
)
def test_an_optimizer_may_step_nothing_that_is_targeted(technique: Callable[[], Any]) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(layer.parameters(), lr=LR) for layer in (self.net[0], self.net[2])]

    torch.manual_seed(0)
    module = Two()
    before = copy.deepcopy(module.net.state_dict())
    fit(module, technique(), max_epochs=3)
    assert all(not torch.equal(before[name], value) for name, value in module.net.state_dict().items())


class Normalized(torch.optim.Optimizer):
    """Takes the entries of a parameter together, as LAMB, Adafactor and Muon do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(LR * p.grad / p.grad.norm().clamp(min=1e-6))
        return loss


@pytest.mark.parametrize("scaled", [False, True])
def test_pruned_entries_do_not_count_where_gradients_are_taken_together(scaled: bool) -> None:
    class Poisoned(Net):
        def on_before_backward(self, *_: Any) -> None:
            if not self.net[0].weight._backward_hooks:
                self.net[0].weight.register_hook(lambda g: torch.where(self.net[0].weight == 0, torch.nan, g))

    torch.manual_seed(0)
    module, pruning = Poisoned(Normalized), IterativePruningCallback(0.5, schedule="one_shot")
    before = module.net[0].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fit(module, pruning, **({"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if scaled else {}))
    after = module.net[0].weight.detach()
    assert after.isfinite().all()
    assert not torch.equal(after, torch.where(pruning.masks["net.0.weight"], before, 0.0)), "every step was skipped"


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_of_pruned_weights_that_are_not_finite_do_no_harm(granularity: Any, clip: float | None) -> None:
    """Against the same masks by `torch.where`, in a loop by hand."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return w.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.where(ctx.saved_tensors[0] == 0, float("nan"), gradient)

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, Broken.apply(self.weight), self.bias)  # type: ignore[no-untyped-call]

    torch.manual_seed(0)
    module = Net()
    module.net[0] = Layer(6, 8)
    hand = copy.deepcopy(module.net)
    neurons: dict[str, Any] = {"shrink": "never", "example_inputs": torch.zeros(2, 6), "network": "net"}
    pruning = IterativePruningCallback(
        0.5,
        granularity=granularity,
        schedule="one_shot",
        scope="layer",
        target="net.0",
        **(neurons if granularity == "neuron" else {}),
    )
    fit(module, pruning, gradient_clip_val=clip)
    masks = {name.removeprefix("net."): mask for name, mask in pruning.masks.items()}
    optimizer = torch.optim.SGD(hand.parameters(), lr=LR)
    for _ in range(2):
        for (x,) in DataLoader(DATA, batch_size=8):
            with torch.no_grad():
                for name, mask in masks.items():
                    p = hand.get_parameter(name)
                    p.copy_(torch.where(mask, p, 0.0))
            optimizer.zero_grad()
            F.mse_loss(hand(x), x[:, :3]).backward()
            for name, mask in masks.items():
                p = hand.get_parameter(name)
                p.grad = torch.where(mask, p.grad, 0.0)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(hand.parameters(), clip)
            optimizer.step()
    for name, value in hand.state_dict().items():
        if name in masks:
            value = torch.where(masks[name], value, 0.0)
        assert torch.allclose(module.net.state_dict()[name], value, atol=1e-6), name


def test_hooks_of_a_fit_are_gone_when_it_has_ended_or_failed() -> None:
    before = len(_global_optimizer_post_hooks)
    fit(Net(), QuantizationAwareTrainingCallback(4, None))
    assert len(_global_optimizer_post_hooks) == before

    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Net(), QuantizationAwareTrainingCallback(4, None), Fails())
    assert len(_global_optimizer_post_hooks) == before
