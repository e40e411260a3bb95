"""What `SlimmableWidth` trains, logs and leaves alone, against loops written by hand over networks that are cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging
from support.registry import small_teacher
from support.small import BATCH, CLASSES, FEATURES, SmallModule, SmallNet, plain, quiet_trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import DistillationModule
from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.slimmable.norms import norms_of
from lightning_compress.slimmable.switch import width_of

X = torch.zeros(2, FEATURES)
WIDTHS = (0.25, 0.5, 1.0)


def slimmable(module: LightningModule, widths: Any = WIDTHS, **options: Any) -> SlimmableWidth:
    return SlimmableWidth(module, widths, **({"example_inputs": X} | options))


def thin_by_hand(module: SmallModule, width: float, *, of: nn.Module | None = None) -> SmallNet:
    """Return a network that is cut to a width, with the norms of this width."""
    net = copy.deepcopy(of if of is not None else module.net)
    x = torch.zeros(2, FEATURES, dtype=net.head.weight.dtype)  # type: ignore[union-attr]
    free = [group for group in channel_groups(net, x) if group.frozen is None]
    cut(net, x, keep={group.name: torch.arange(-int(-width * group.size // 1)) for group in free})
    held = norms_of(module)
    if of is None and held is not None:
        for name, tensor in held.state_dict().items():
            start = f"{width}.net.".replace(".", "_", 1)
            if name.startswith(start):
                net.get_submodule("norm").state_dict()[name.removeprefix(f"{start}norm.")].copy_(tensor)
    return net  # type: ignore[return-value]


def scattered(module: SmallModule, width: float, thin: SmallNet) -> dict[str, Tensor]:
    """Return the gradients of a thin network at the places of its numbers in the full network."""
    marker = copy.deepcopy(module.net)
    with torch.no_grad():
        for parameter in marker.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    places = dict(thin_by_hand(module, width, of=marker).named_parameters())
    found = {}
    for name, parameter in module.net.named_parameters():
        grad = torch.zeros(parameter.numel(), dtype=parameter.dtype)
        mine = thin.get_parameter(name).grad
        assert mine is not None
        found[name] = grad.index_add(0, places[name].detach().long().flatten(), mine.flatten()).view_as(parameter)
    return found


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p = (teacher.detach() / temperature).softmax(1)
    return (p * (p.log() - (student / temperature).log_softmax(1))).sum(1).mean()


class Watched(SmallModule):
    """Keeps its batch and gradients, and its weights and norms from before its first step; has no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net.dropout.p = 0.0
        self.found: dict[str, Tensor] = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batch, self.before = batch, copy.deepcopy(self.state_dict())

    def on_after_backward(self) -> None:
        self.found = {name: one.grad.clone() for name, one in self.named_parameters() if one.grad is not None}


def by_hand(module: Watched, widths: dict[float, bool], alpha: float, temperature: float) -> dict[str, Tensor]:
    """Return the gradients of the first step; `widths`: whether each has scales and shifts of its own."""
    module.load_state_dict(module.before)
    module.train()
    x, y = module.batch
    full = copy.deepcopy(module.net)
    logits = full(x)
    F.cross_entropy(logits, y).backward()
    expected = {f"net.{name}": parameter.grad.clone() for name, parameter in full.named_parameters()}  # type: ignore[union-attr]
    for width, private in widths.items():
        thin = thin_by_hand(module, width).train()
        out = thin(x)
        loss = (1 - alpha) * F.cross_entropy(out, y) + alpha * temperature**2 * divergence(logits, out, temperature)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, grad in scattered(module, width, thin).items():
            if private and name.startswith("norm."):
                mine = thin.get_parameter(name).grad
                assert mine is not None
                expected[f"width_norms.{str(width).replace('.', '_')}.net.{name}"] = mine
            else:
                expected[f"net.{name}"] += grad
    return expected


@pytest.mark.parametrize(
    ("options", "private", "alpha"),
    [
        ({"norms": "private"}, True, 0.5),
        ({"norms": "private", "weights": [0.5, 0.25, 2.0]}, True, 0.5),
        ({"norms": "statistics", "distill": 0.0}, False, 0.0),
        ({"norms": "recalibrate", "distill": 0.3, "temperature": 3.0, "order": None}, False, 0.3),
        ({"universal": True}, False, 1.0),
    ],
)
def test_the_gradient_of_a_step_is_that_of_a_loop_over_cut_networks(
    options: dict[str, Any], private: bool, alpha: float
) -> None:
    seed_everything(1)
    module = Watched().double()
    wrapped = slimmable(module, example_inputs=X.double(), **({"weights": "equal"} | options))
    quiet_trainer(max_steps=1, precision="64-true").fit(wrapped, plain(0))
    objective = wrapped._objective()
    used = [0.25, *objective._drawn] if options.get("universal") else [0.25, 0.5]
    weights = options.get("weights", [1.0] * (len(used) + 1))
    of_full = by_hand(module, {}, 0.0, 1.0)
    expected = {name: weights[-1] * grad for name, grad in of_full.items()}
    for width, weight in zip(used, weights, strict=False):
        for name, grad in by_hand(module, {width: private}, alpha, options.get("temperature", 1.0)).items():
            zeros = torch.zeros_like(grad)
            expected[name] = expected.get(name, zeros) + weight * (grad - of_full.get(name, zeros))
    assert expected.keys() == module.found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(module.found[name], grad, atol=1e-12, rtol=1e-12)


def test_rising_weights_rise_to_the_place_of_each_width() -> None:
    wrapped = slimmable(SmallModule(), example_inputs=X, weights="rising")
    seen: list[list[float]] = []

    class Watching(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(wrapped._objective().weights.at(len(seen)))

    trainer = quiet_trainer(max_epochs=2, callbacks=[Watching()])
    trainer.fit(wrapped, plain(0))
    steps = trainer.global_step
    for share, ours in ((1 / 3, [one[0] for one in seen]), (2 / 3, [one[1] for one in seen])):
        rise = [min(1.0, 1.5 * step / steps) for step in range(steps)]  # over the first two thirds of the fit
        assert ours == pytest.approx([0.01 + (share - 0.01) * one for one in rise])
    assert {one[2] for one in seen} == {1.0}


def test_one_width_is_the_run_without_the_wrapper() -> None:
    results = []
    for wrap in (lambda module: module, lambda module: slimmable(module, (1.0,))):
        seed_everything(1)
        module = wrap(SmallModule())
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, plain(0), plain(1))
        results.append((module.state_dict(), trainer.callback_metrics))
    assert results[0][0].keys() == results[1][0].keys()
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    assert {k: float(v) for k, v in results[0][1].items()} == {k: float(v) for k, v in results[1][1].items()}


@pytest.mark.parametrize("order", [None, "magnitude"])
def test_the_full_network_is_the_original(order: str | None) -> None:
    module = SmallModule().double().eval()
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    expected = module(x)
    wrapped = slimmable(module, order=order, example_inputs=X.double())
    assert torch.equal(wrapped(x), expected) if order is None else torch.allclose(wrapped(x), expected, atol=1e-12)


# ---------------------------------------------------------------------- what is logged


class Counting(SmallModule):
    """Has a metric, a list of outputs, a counter and an epoch's end that uses them, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.outputs: list[Tensor] = []
        self.batches = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_acc", (logits.argmax(1) == y).float().mean())
        self.accuracy(logits, y)
        self.log("metric", self.accuracy)
        self.outputs.append((logits.argmax(1) == y).float())
        self.batches += 1

    def on_validation_epoch_end(self) -> None:
        self.log("from_outputs", torch.cat(self.outputs).mean())
        self.log("batches", float(self.batches))
        self.outputs.clear()
        self.batches = 0

    def test_step(self, batch: Any, batch_idx: int) -> None:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()


def accuracy(network: Any) -> float:
    network.eval()
    with torch.no_grad():
        return float(torch.cat([network(x).argmax(1) == y for x, y in plain(1)]).float().mean())


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_every_width_has_metrics_lists_and_counters_of_its_own(verb: str) -> None:
    seed_everything(1)
    wrapped = slimmable(Counting())
    quiet_trainer(max_epochs=2).fit(wrapped, plain(0), plain(1))
    expected = {"": accuracy(wrapped.net), "width1.0/": accuracy(wrapped.net)}
    expected |= {f"width{width}/": accuracy(thin_by_hand(wrapped, width)) for width in (0.25, 0.5)}
    assert len(set(expected.values())) > 1
    for _ in range(2):  # the second time starts from nothing too
        found = getattr(quiet_trainer(), verb)(wrapped, plain(1), verbose=False)[0]
        for folder, value in expected.items():
            for metric in ("val_acc", "metric", "from_outputs"):
                assert found[f"{folder}{metric}"] == pytest.approx(value), (folder, metric)
            assert found[f"{folder}batches"] == 96 / BATCH


def test_a_width_that_is_set_is_what_runs_but_for_a_fit() -> None:
    seed_everything(1)
    wrapped = slimmable(SmallModule())
    quiet_trainer(max_epochs=2).fit(wrapped, plain(0))
    wrapped.set_width(0.5)
    thin = thin_by_hand(wrapped, 0.5)
    found = quiet_trainer().test(wrapped, plain(1), verbose=False)[0]
    assert found == {"test_acc": pytest.approx(accuracy(thin))}
    predicted = quiet_trainer().predict(wrapped, plain(1))
    assert predicted is not None
    for some, (x, _) in zip(predicted, plain(1), strict=True):
        torch.testing.assert_close(some, thin(x).detach())

    twins = []
    for width in (0.5, 1.0):
        again = copy.deepcopy(wrapped)
        again.set_width(width)
        seed_everything(3)
        quiet_trainer(max_epochs=1).fit(again, plain(0), plain(1))
        twins.append(again.state_dict())
        assert again.eval()(X).shape == (2, CLASSES)
    assert [name for name in twins[0] if not torch.equal(twins[0][name], twins[1][name])] == []


def test_a_step_draws_the_same_random_numbers_at_every_width() -> None:
    drawn: list[float] = []

    class Module(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            drawn.append(float(mix := torch.rand(())))
            return F.cross_entropy(self(batch[0] * (0.5 + mix)), batch[1])

    quiet_trainer(max_epochs=1).fit(slimmable(Module()), plain(0))
    assert drawn[0::3] == drawn[1::3] == drawn[2::3]
    assert len(set(drawn)) == len(drawn) // 3


def test_distillation_inside_teaches_every_width() -> None:
    inner = DistillationModule(SmallModule(), small_teacher(), alpha=0.5)
    trainer = quiet_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(slimmable(inner), plain(0))
    names = {name for name in trainer.callback_metrics if "distillation_loss" in name}
    assert names == {f"{width}compress/distillation_loss" for width in ("", "width0.25/", "width0.5/", "width1.0/")}


class Labelled(SmallModule):
    """Its network computes the loss itself, as those of transformers do when they get labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(*batch)["loss"]
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(*batch)["loss"])


def test_a_network_that_computes_its_own_loss_does_so_at_every_width() -> None:
    seed_everything(1)
    wrapped = slimmable(Labelled())
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    found = quiet_trainer().validate(wrapped, plain(1), verbose=False)[0]
    wrapped.eval()
    for width in (0.25, 0.5):
        thin = thin_by_hand(wrapped, width).eval()
        losses = [float(F.cross_entropy(thin(x), y)) for x, y in plain(1)]
        assert found[f"width{width}/val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_compiled_network_has_widths() -> None:
    class Module(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    wrapped = slimmable(Module(), network="net")
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(wrapped, plain(0), plain(1))
    assert "width0.25/val_acc" in trainer.callback_metrics


def test_a_network_that_writes_into_its_inputs_is_refused() -> None:
    class Module(SmallModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mul_(2.0) if self.training else x * 2.0)

    with pytest.raises(ValueError, match="changes a tensor of its batch in place"):
        quiet_trainer(max_epochs=1).fit(slimmable(Module()), plain(0))


# ---------------------------------------------------------------------- universal


def test_universal_training_draws_widths_and_computes_statistics_of_those_that_are_wanted() -> None:
    seed_everything(1)
    wrapped, drawn = slimmable(Watched(), universal=True), []

    class Module(Watched):
        def on_train_batch_end(self, *args: Any) -> None:
            drawn.append(tuple(wrapped._objective()._drawn))

    wrapped = slimmable(Module(), universal=True)
    seen: list[Tensor] = []
    wrapped.net.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(wrapped, plain(0))
    assert len(set(drawn)) > 5
    assert all(0.25 <= width < 1.0 for some in drawn for width in some)
    inputs = [x for x, _ in plain(0)][-5:]
    for width in (0.25, 0.5):
        thin = thin_by_hand(wrapped, width)
        features = [thin.conv(x.unsqueeze(1)).transpose(1, 2).flatten(0, 1) for x in inputs]
        held = norms_of(wrapped)
        assert held is not None
        norm = held.of(width)["net.norm"]
        torch.testing.assert_close(norm.running_mean, torch.stack([one.mean(0) for one in features]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([one.var(0) for one in features]).mean(0))


def test_a_width_that_was_not_trained_needs_statistics() -> None:
    seed_everything(1)
    wrapped = slimmable(SmallModule(), universal=True)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    with pytest.raises(ValueError, match=r"0\.4.*no statistics"):
        wrapped.set_width(0.4)
    wrapped._trainer = None  # as after a load
    wrapped.set_width(0.25)  # the full network's inputs are what counts
    wrapped.recalibrate(plain(0), widths=[0.4], batches=3)
    wrapped.set_width(0.4)
    wrapped.eval()
    assert wrapped.extract(0.4).net.hidden.out_features == 7
    torch.testing.assert_close(wrapped(X), wrapped.extract(0.4)(X))


def test_statistics_are_computed_anew_whichever_width_is_set() -> None:
    seed_everything(1)
    wrapped = slimmable(SmallModule(), universal=True)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    held = norms_of(wrapped)
    assert held is not None
    found = []
    for now in (1.0, 0.5):
        wrapped.set_width(now)
        wrapped.recalibrate(plain(0), batches=3)
        assert width_of(wrapped) == now
        found.append({name: one.clone() for name, one in held.named_buffers()})
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    for width in ({"net.hidden": 0.5}, {"net.conv": 0.5}):  # one after the other
        wrapped.recalibrate(plain(0), widths=[width], batches=3)
    for width in ({"net.hidden": 0.5}, {"net.conv": 0.5}):
        wrapped.set_width(width)
        torch.testing.assert_close(wrapped.eval()(X), wrapped.extract(width).eval()(X))


def test_statistics_need_what_the_network_is_called_with() -> None:
    class Elsewhere(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net.head(torch.zeros(1, 16))

    wrapped = slimmable(Elsewhere(), network="net")
    with pytest.raises(ValueError, match="has not called the network 'net'"):
        wrapped.recalibrate(plain(0))


# ---------------------------------------------------------------------- use, and refusals


def test_averages_that_know_nothing_of_widths_are_refused() -> None:
    wrapped = slimmable(SmallModule(), example_inputs=X)
    trainer = quiet_trainer(max_epochs=2, callbacks=[StochasticWeightAveraging(swa_lrs=0.1)])
    with pytest.raises(ValueError, match="statistics of norms anew for the full network alone"):
        trainer.fit(wrapped, plain(0))
    assert trainer.global_step == 0


def test_widths_are_found_from_a_peeked_batch_where_nothing_else_is_given() -> None:
    wrapped = SlimmableWidth(SmallModule(), WIDTHS)
    assert norms_of(wrapped) is None
    with pytest.raises(ValueError, match="no widths yet"):
        wrapped.set_width(0.5)
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    wrapped.set_width(0.5)


def test_the_deployed_and_the_extracted_network_are_the_width() -> None:
    seed_everything(1)
    wrapped = slimmable(SmallModule(), network="net")
    quiet_trainer(max_epochs=1).fit(wrapped, plain(0))
    wrapped.eval()
    deployed, x = wrapped.deploy(), torch.randn(4, FEATURES)
    for width in (0.25, 0.5, 1.0):
        wrapped.set_width(width)
        extracted = wrapped.extract(width)
        assert type(extracted) is SmallNet
        torch.testing.assert_close(extracted.eval()(x), wrapped(x))
        torch.testing.assert_close(deployed(x, width=width), wrapped(x))
    wrapped.set_width(1.0)
    points = wrapped.operating_points()
    assert [one.name for one in points] == ["width 0.25", "width 0.5"]
    with points[0].answering():
        found = quiet_trainer().test(wrapped, plain(1), verbose=False)[0]
    assert found == {"test_acc": pytest.approx(accuracy(points[0].network))}


class OwnForward(SmallModule):
    """Predicts by its forward."""

    predict_step = LightningModule.predict_step

    def forward(self, x: Any) -> Tensor:
        return self.net(x[0] if isinstance(x, list) else x)


def test_a_module_predicts_by_its_forward_at_a_width() -> None:
    seed_everything(1)
    wrapped = slimmable(OwnForward())
    wrapped.set_width(0.5)
    found = quiet_trainer().predict(wrapped, plain(1))
    expected = [wrapped.eval()(batch) for batch in plain(1)]
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_width_is_extracted_in_the_precision_of_the_fit(precision: Any) -> None:
    seed_everything(1)
    wrapped = slimmable(SmallModule())
    quiet_trainer(max_epochs=1, precision=precision).fit(wrapped, plain(0))
    dtype = torch.float64 if precision == "64-true" else torch.bfloat16
    assert {one.dtype for one in wrapped.extract(0.5).parameters()} == {dtype}
    assert [one.name for one in wrapped.operating_points()] == ["width 0.25", "width 0.5"]
    assert wrapped.deploy()(X.to(dtype), width=0.5).dtype == dtype


class NoNorms(SmallModule):
    """Its norm averages over channels, so that none of the convolution's may leave without changing the function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES))  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [0.0, 1.0]}, "above 0 and at most 1"),
        ({"widths": [0.5, 1.5]}, "above 0 and at most 1"),
        ({"widths": [0.5, 0.5]}, "0.5 twice"),
        ({"widths": [0.49, 0.5]}, "keep the same channels"),
        ({"widths": None}, "has no widths"),
        ({"norms": "public"}, "norms is one of private, statistics, recalibrate"),
        ({"universal": True, "norms": "private"}, "no norms of their own"),
        ({"universal": True, "weights": [1.0, 1.0, 1.0]}, "which count alike"),
        ({"weights": "heavy"}, "weights is one of equal, rising"),
        ({"distill": 2.0}, "distill is the share"),
        ({"temperature": 0.0}, "temperature is a number above 0"),
        ({"order": "beauty"}, "order"),
        ({"network": "nothing"}, "no submodule"),
        ({"module": NoNorms}, "inexact"),
        ({"module": lambda: SmallModule().to(torch.float32), "network": "net.head"}, "No channel of the network"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_the_module_as_it_was(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"widths": WIDTHS, "example_inputs": X, "module": SmallModule} | change
    module = options.pop("module")()
    before = copy.deepcopy(module.state_dict())
    if options.get("network") == "net.head":
        options["example_inputs"] = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=message):
        SlimmableWidth(module, options.pop("widths"), **options)
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
