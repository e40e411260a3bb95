"""What `EarlyExitHeads` trains, logs and leaves alone, against loops written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from support.registry import small_teacher
from support.small import CLASSES, FEATURES, SmallModule, plain, quiet_trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import DistillationModule
from lightning_compress.early_exit.gradients import scale_gradient
from lightning_compress.early_exit.heads import MapHead, heads_of
from lightning_compress.early_exit.module import EarlyExitHeads
from lightning_compress.early_exit.objective import EarlyExits
from lightning_compress.trainer.unwrap import objective_of

X = torch.zeros(2, FEATURES)
EXITS = ["net.norm", "net.hidden"]


def with_exits(module: LightningModule, exits: Any = EXITS, **options: Any) -> EarlyExitHeads:
    return EarlyExitHeads(module, exits, num_classes=CLASSES, example_inputs=X, **options)


def features_of(module: nn.Module, layers: list[str], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(layer).register_forward_hook(lambda m, a, out, layer=layer: found.__setitem__(layer, out))
        for layer in layers
    ]
    logits = module(x)
    for handle in handles:
        handle.remove()
    return logits, found


def trained_by_hand(module: SmallModule, losses: Any, *, epochs: int = 1) -> None:
    """Plain training: `losses(exit logits, full logits, y)` returns the loss."""
    heads = heads_of(module)
    assert heads is not None
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    module.train()
    for _ in range(epochs):
        for x, y in plain(0):
            full, features = features_of(module, list(heads.layers), x)
            exits = [head(features[layer]) for layer, head in heads.by_layer().items()]
            optimizer.zero_grad()
            losses(exits, full, y).backward()
            optimizer.step()
            schedule.step()


def sum_of_losses(weights: list[float]) -> Any:
    def losses(exits: list[Tensor], full: Tensor, y: Tensor) -> Tensor:
        return sum(w * F.cross_entropy(one, y) for w, one in zip(weights, [*exits, full], strict=True))  # type: ignore[return-value]

    return losses


@pytest.mark.parametrize("weights", ["equal", [0.3, 0.0, 1.0]])
def test_it_trains_on_the_weighted_sum_of_the_modules_own_losses(weights: Any) -> None:
    seed_everything(1)
    wrapped = with_exits(SmallModule(), weights=weights)
    by_hand = copy.deepcopy(wrapped)
    seed_everything(2)
    quiet_trainer(max_epochs=2).fit(wrapped, plain(0))
    seed_everything(2)
    trained_by_hand(by_hand, sum_of_losses([1.0, 1.0, 1.0] if weights == "equal" else weights), epochs=2)
    for (name, one), other in zip(wrapped.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_frozen_trains_the_heads_alone_on_the_network_as_it_evaluates() -> None:
    seed_everything(1)
    wrapped = with_exits(SmallModule(optimizer="adam"), train="frozen")
    before = copy.deepcopy(wrapped.state_dict())
    by_hand = copy.deepcopy(wrapped)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, before[name]) != ("exit_heads" in name), name
    assert all(one.requires_grad for one in wrapped.parameters()), "as before the fit"

    heads = heads_of(by_hand)
    assert heads is not None
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2, weight_decay=1e-2)
    by_hand.eval()
    for x, y in plain(0):
        with torch.no_grad():
            _, features = features_of(by_hand, list(heads.layers), x)
        optimizer.zero_grad()
        exits = [head(features[layer]) for layer, head in heads.by_layer().items()]
        sum(F.cross_entropy(one, y) for one in exits).backward()  # type: ignore[union-attr]
        optimizer.step()
    for name, value in heads.state_dict().items():
        assert torch.allclose(value, wrapped.state_dict()[f"exit_heads.{name}"], atol=1e-6), name


def gradients(**options: Any) -> dict[str, Tensor]:
    """The gradients of the first step."""
    seed_everything(1)
    wrapped = with_exits(SmallModule(), **options)
    found: dict[str, Tensor] = {}

    class Module(SmallModule):
        def on_after_backward(self) -> None:
            found.update({name: one.grad.clone() for name, one in self.named_parameters() if one.grad is not None})

    seed_everything(1)
    wrapped = with_exits(Module(), **options)
    seed_everything(2)
    quiet_trainer(max_steps=1).fit(wrapped, plain(0))
    return found


def test_exits_without_gradient_leave_the_network_as_it_trains_alone() -> None:
    stopped, alone = gradients(gradient="stop"), gradients(exits=())
    for name, gradient in alone.items():
        assert torch.equal(gradient, stopped[name]), name
    assert any(bool(value.any()) for name, value in stopped.items() if "exit_heads" in name)


def test_equilibrium_gives_each_classifier_its_share_at_every_layer() -> None:
    """Before both exits the three classifiers share equally, between the exits the last two do, then it is whole."""
    parts = [gradients(weights=[float(k == i) for k in range(3)]) for i in range(3)]
    balanced = gradients(gradient="equilibrium")
    for name, shares in (
        ("net.conv.weight", [3, 3, 3]),
        ("net.hidden.weight", [0, 2, 2]),
        ("net.head.weight", [0, 0, 1]),
    ):
        expected = sum(part[name] / share for part, share in zip(parts, shares, strict=True) if share)
        assert torch.allclose(balanced[name], expected, atol=1e-6), name  # type: ignore[arg-type]


def test_scaled_gradients_leave_the_value() -> None:
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.5), x)


def test_distilling_adds_the_divergence_from_the_full_network() -> None:
    seed_everything(1)
    wrapped = with_exits(SmallModule(), distill=0.4, temperature=3.0, weights="equal")
    by_hand = copy.deepcopy(wrapped)

    def losses(exits: list[Tensor], full: Tensor, y: Tensor) -> Tensor:
        target = (full.detach() / 3.0).softmax(1)
        total = F.cross_entropy(full, y)
        for one in exits:
            log_q = (one / 3.0).log_softmax(1)
            divergence = (target * (target.log() - log_q)).sum(1).mean()
            total = total + 0.6 * F.cross_entropy(one, y) + 0.4 * 9.0 * divergence
        return total

    seed_everything(2)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    seed_everything(2)
    trained_by_hand(by_hand, losses)
    for (name, one), other in zip(wrapped.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_no_exits_is_the_run_without_the_wrapper() -> None:
    results = []
    for wrap in (lambda module: module, lambda module: with_exits(module, exits=())):
        seed_everything(1)
        module = wrap(SmallModule())
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, plain(0), plain(1))
        results.append((module.state_dict(), trainer.callback_metrics))
    assert results[0][0].keys() == results[1][0].keys()
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    assert {k: float(v) for k, v in results[0][1].items()} == {k: float(v) for k, v in results[1][1].items()}


# ---------------------------------------------------------------------- what is logged


class Counting(SmallModule):
    """Has metrics, a list of outputs, a counter, a buffer and an epoch's end that uses them, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.logged_metric = MulticlassAccuracy(CLASSES, average="micro")
        self.own_metric = MulticlassAccuracy(CLASSES, average="micro")
        self.several = MetricCollection({"acc": MulticlassAccuracy(CLASSES, average="micro")})
        self.outputs: list[Tensor] = []
        self.batches = 0
        self.register_buffer("seen", torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_acc", (logits.argmax(1) == y).float().mean())
        self.logged_metric(logits, y)
        self.log("metric", self.logged_metric)
        self.own_metric.update(logits, y)
        self.several.update(logits, y)
        self.outputs.append((logits.argmax(1) == y).float())
        self.batches += 1
        self.seen += len(y)

    def on_validation_epoch_end(self) -> None:
        self.log("own", self.own_metric.compute())
        self.own_metric.reset()
        self.log_dict({f"several_{name}": value for name, value in self.several.compute().items()})
        self.several.reset()
        self.log("from_outputs", torch.cat(self.outputs).mean())
        self.outputs.clear()
        self.log("batches", float(self.batches))
        self.log("samples", self.seen.clone())
        self.batches = 0
        self.seen.zero_()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_every_exit_has_metrics_lists_and_counters_of_its_own(verb: str) -> None:
    seed_everything(1)
    wrapped = with_exits(Counting())
    trainer = quiet_trainer()
    for _ in range(2):  # the second time starts from nothing too
        found = getattr(trainer, verb)(wrapped, plain(1), verbose=False)[0]
        heads = heads_of(wrapped)
        assert heads is not None
        wrapped.eval()
        right: dict[str, list[Tensor]] = {"": [], "exit1/": [], "exit2/": [], "exit3/": []}
        with torch.no_grad():
            for x, y in plain(1):
                full, features = features_of(wrapped, list(heads.layers), x)
                exits = [head(features[layer]) for layer, head in heads.by_layer().items()]
                for name, logits in zip(right, [full, *exits, full], strict=True):
                    right[name].append((logits.argmax(1) == y).float())
        for name, hits in right.items():
            accuracy = float(torch.cat(hits).mean())
            for metric in ("val_acc", "metric", "own", "several_acc", "from_outputs"):
                assert found[f"{name}{metric}"] == pytest.approx(accuracy), (name, metric)
            assert (found[f"{name}batches"], found[f"{name}samples"]) == (12, 96), name
    assert (wrapped.batches, wrapped.outputs, float(wrapped.seen)) == (0, [], 0.0)


def test_a_hook_that_logs_nothing_runs_once() -> None:
    ends: list[int] = []

    class Module(Counting):
        def on_train_epoch_end(self) -> None:
            ends.append(self.current_epoch)

    quiet_trainer(max_epochs=2).fit(with_exits(Module()), plain(0))
    assert ends == [0, 1]


def test_losses_of_the_training_are_logged_for_each_exit(tmp_path: Any) -> None:
    trainer = quiet_trainer(max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(with_exits(SmallModule()), plain(0), plain(1))
    for name in ("train_loss", "val_acc"):
        assert {name, f"exit1/{name}", f"exit2/{name}", f"exit3/{name}"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["train_loss"] == trainer.callback_metrics["exit3/train_loss"]
    assert trainer.callback_metrics["train_loss"] != trainer.callback_metrics["exit1/train_loss"]


def test_a_replay_draws_the_same_random_numbers_and_leaves_no_trace_in_them() -> None:
    drawn: list[float] = []

    class Module(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            drawn.append(float(mix := torch.rand(())))
            return F.cross_entropy(self(x * (0.5 + mix)), y)

    seed_everything(1)
    wrapped = with_exits(Module())
    seed_everything(2)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    first, second, third = drawn[0::3], drawn[1::3], drawn[2::3]
    assert first == second == third
    assert len(set(first)) == len(first)


def test_distillation_inside_teaches_every_exit() -> None:
    seed_everything(1)
    inner = DistillationModule(SmallModule(), small_teacher(), alpha=0.5)
    trainer = quiet_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(with_exits(inner), plain(0))
    names = {name for name in trainer.callback_metrics if "distillation_loss" in name}
    assert names == {f"{exit}compress/distillation_loss" for exit in ("", "exit1/", "exit2/", "exit3/")}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": ["net.nothing"]}, "'net.nothing', which is no layer of SmallModule"),
        ({"exits": ["net.norm", "net.norm"]}, "'net.norm' twice"),
        ({"num_classes": 4}, "num_classes=4, and the network returns logits of shape"),
        ({"weights": [1.0]}, "each of 2 exits"),
        ({"weights": "more"}, "weights is one of equal, rising"),
        ({"train": "joined"}, "train is one of joint, frozen"),
        ({"distill": 2.0}, "distill is the share"),
        ({"head": lambda features, classes: nn.Flatten()}, "returns \\(2, 72\\), and the network \\(2, 3\\)"),
        ({"exits": None}, "has no exits"),
        *(({"exits": odd}, "exits is a list of names") for odd in (-1, True, 1.0, "net.norm", [2], [0.5, "net.norm"])),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"exits": EXITS, "num_classes": CLASSES, "example_inputs": X} | change
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_epochs=1).fit(EarlyExitHeads(SmallModule(), options.pop("exits"), **options), plain(0))


def test_layers_that_run_twice_or_never_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = nn.Linear(FEATURES, FEATURES)
            self.twice = nn.Linear(FEATURES, FEATURES)
            self.never = nn.Linear(FEATURES, FEATURES)
            self.last = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.twice(self.once(x))))

    class Module(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"'net\.twice' ran twice in one forward pass"):
        with_exits(Module(), ["net.twice"])
    with pytest.raises(ValueError, match=r"'net\.never' did not run"):
        with_exits(Module(), ["net.once", "net.never"])


def test_a_step_that_changes_its_batch_in_place_is_refused() -> None:
    class Module(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0].mul_(2.0)), batch[1])

    with pytest.raises(ValueError, match="changes a tensor of its batch in place"):
        quiet_trainer(max_epochs=1).fit(with_exits(Module()), plain(0))


def test_a_network_that_computes_its_own_loss_is_refused() -> None:
    class Module(SmallModule):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            logits = self.net(x)
            return {"logits": logits} if y is None else {"logits": logits, "loss": F.cross_entropy(logits, y)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(*batch)["loss"]  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="computes its loss itself"):
        quiet_trainer(max_epochs=1).fit(with_exits(Module()), plain(0))


def test_heads_that_no_optimizer_trains_are_refused() -> None:
    class Module(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"parameters that no optimizer trains: exit_heads\.1\.mix"):
        quiet_trainer(max_epochs=1).fit(with_exits(Module()), plain(0))


@pytest.mark.parametrize("exits", [2, [0.1, 0.9]])
def test_exits_are_placed_by_their_share_of_the_cost(exits: Any) -> None:
    wrapped = with_exits(SmallModule(), exits)
    heads = heads_of(wrapped)
    assert heads is not None
    assert heads.layers == ("net.norm", "net.dropout"), "the last layers before 15 and 97 % of the cost are passed"
    with pytest.raises(ValueError, match="wants others"):
        with_exits(wrapped, 3)


def test_heads_are_made_from_a_peeked_batch_where_nothing_else_is_given() -> None:
    wrapped = EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES)
    assert heads_of(wrapped) is None
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    assert heads_of(wrapped) is not None


@pytest.mark.parametrize("extents", [(7, 9), (2, 3), (14, 8)])
def test_the_head_of_a_map_mixes_maxima_and_means_of_windows(extents: tuple[int, int]) -> None:
    def windows(extent: int) -> list[slice]:
        parts = min(4, extent)
        return [slice(i * extent // parts, -(-(i + 1) * extent // parts)) for i in range(parts)]

    head = MapHead((3, *extents), CLASSES)
    torch.nn.init.constant_(head.mix, 0.3)
    x = torch.randn(2, 3, *extents, requires_grad=True)
    parts = [x[:, :, rows, columns] for rows in windows(extents[0]) for columns in windows(extents[1])]
    mixed = torch.stack([0.3 * part.amax((2, 3)) + 0.7 * part.mean((2, 3)) for part in parts], 2)
    expected = head.linear(mixed.flatten(1))
    found = head(x)
    torch.testing.assert_close(found, expected)
    by_hand, by_head = (torch.autograd.grad(one.square().sum(), x)[0] for one in (expected, found))
    torch.testing.assert_close(by_head, by_hand)


@pytest.mark.parametrize(
    ("options", "weights"),
    [({}, "rising"), ({"train": "frozen"}, "equal"), ({"gradient": "stop"}, "equal"), ({"weights": "equal"}, "equal")],
)
def test_the_default_weights_rise_where_exits_train_the_layers_before_them(options: Any, weights: str) -> None:
    assert objective_of(with_exits(SmallModule(), **options), EarlyExits).settings["weights"] == weights
