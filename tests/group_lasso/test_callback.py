"""The callback, against a training loop that has the penalty in its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from support.compare import differences
from support.ranks import RankPair
from support.small import BATCH, FEATURES, SAMPLES, ManualModule, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor, nn

from lightning_compress import GroupLassoCallback, IterativePruningCallback
from lightning_compress.channels.cut import cut, shrink
from lightning_compress.channels.find import channel_groups
from lightning_compress.coding import load_compressed
from lightning_compress.group_lasso import callback as lasso_callback

EPOCH = SAMPLES // BATCH
STRENGTH = 0.03


class Plain(SmallModule):
    """Without dropout: the same batches give the same steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net.dropout = nn.Identity()

    def configure_optimizers(self) -> Any:
        return optimizer_of(self)


def optimizer_of(module: SmallModule) -> torch.optim.Optimizer:
    head = [*module.net.head.parameters()]
    others = [p for p in module.parameters() if all(p is not one for one in head)]
    return torch.optim.SGD([{"params": others}, {"params": head, "lr": 0.02}], lr=0.05, momentum=0.9, weight_decay=1e-3)


def hidden_rows(net: nn.Module) -> Tensor:
    return torch.cat([net.hidden.weight, net.hidden.bias[:, None]], 1)


def conv_rows(net: nn.Module) -> Tensor:
    parts = (net.conv.weight.flatten(1), net.conv.bias[:, None], net.norm.weight[:, None], net.norm.bias[:, None])
    return torch.cat(parts, 1)


NORMS: dict[str, Callable[[nn.Module], Tensor]] = {  # written out by hand for this network
    "filter": lambda net: torch.cat(
        [net.conv.weight.flatten(1).norm(dim=1), net.hidden.weight.norm(dim=1), net.head.weight.norm(dim=1)]
    ),
    "channel": lambda net: torch.cat(
        [net.conv.weight.norm().view(1), net.hidden.weight.norm(dim=0), net.head.weight.norm(dim=0)]
    ),
    "shape": lambda net: torch.cat(
        [net.conv.weight.norm(dim=0).flatten(), net.hidden.weight.norm(dim=0), net.head.weight.norm(dim=0)]
    ),
    "group": lambda net: torch.cat([conv_rows(net).norm(dim=1), hidden_rows(net).norm(dim=1)]),
}


def bare_loop(
    granularities: tuple[str, ...], *, accumulate: int, after_step: Callable[[SmallModule, float], None] | None = None
) -> SmallModule:
    """Two epochs with the penalty in the loss, or with something done after every step."""
    torch.manual_seed(0)
    module = Plain().double()
    optimizer = optimizer_of(module)
    x, y = (one.double() if one.is_floating_point() else one for one in dataset().tensors)
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH * accumulate):
            optimizer.zero_grad()
            for i in range(start, start + BATCH * accumulate, BATCH):
                loss = F.cross_entropy(module(x[i : i + BATCH]), y[i : i + BATCH])
                for granularity in granularities:
                    loss = loss + STRENGTH * NORMS[granularity](module.net).sum()
                (loss / accumulate).backward()
            optimizer.step()
            if after_step is not None:
                after_step(module, optimizer.param_groups[0]["lr"])
    return module


def fit(*callbacks: Callback, module: LightningModule | type = Plain, data: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = module() if isinstance(module, type) else module  # with the same weights every time
    trainer = quiet_trainer(**({"callbacks": list(callbacks), "max_epochs": 2} | options))
    trainer.fit(module, data or plain(0))
    return module


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for name, value in left.state_dict().items():
        torch.testing.assert_close(value, right.state_dict()[name], rtol=1e-11, atol=1e-11, msg=name)


# ---------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("granularity", list(NORMS))
def test_training_is_that_of_a_loop_with_the_penalty_in_the_loss(granularity: Any) -> None:
    expected = bare_loop((granularity,), accumulate=2)
    callback = GroupLassoCallback(STRENGTH, granularity=granularity)
    assert_same(fit(callback, precision="64-true", accumulate_grad_batches=2), expected)


def test_filters_and_channels_together_as_in_the_paper() -> None:
    expected = bare_loop(("filter", "channel"), accumulate=1)
    callbacks = [GroupLassoCallback(STRENGTH, granularity=one) for one in ("filter", "channel")]
    assert_same(fit(*callbacks, precision="64-true"), expected)


def test_the_units_of_a_named_network_are_those_of_the_whole() -> None:
    whole = fit(GroupLassoCallback(STRENGTH, granularity="group"))
    part = GroupLassoCallback(STRENGTH, granularity="group", network="net", example_inputs=torch.zeros(2, FEATURES))
    assert_same(fit(part), whole)


def test_clipping_counts_the_penalty() -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.largest = 0.0

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            norm = torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()
            self.largest = max(self.largest, float(norm))

    watch = Watch()
    fit(GroupLassoCallback(1.0), watch, gradient_clip_val=0.1)
    assert watch.largest == pytest.approx(0.1, rel=1e-3)


def test_two_optimizers_each_get_the_penalty_of_their_own_parameters() -> None:
    dense = fit(module=ManualModule, max_steps=2)
    module = fit(GroupLassoCallback(STRENGTH), module=ManualModule, max_steps=2)
    torch.manual_seed(0)
    start = ManualModule().net.conv.weight.detach()
    # The first step by SGD differs by exactly lr * strength * w / ||w||; the second optimizer's step comes after it.
    direction = start / start.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(module.net.conv.weight, dense.net.conv.weight - 0.05 * STRENGTH * direction)


@pytest.mark.parametrize("proximal", [False, True])
def test_a_training_step_that_is_skipped_changes_nothing(proximal: bool) -> None:
    class Skipping(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    torch.manual_seed(0)
    before = Skipping()
    module = fit(GroupLassoCallback(1.0, proximal=proximal), module=copy.deepcopy(before), max_epochs=1)
    for left, right in zip(module.parameters(), before.parameters(), strict=True):
        assert torch.equal(left, right)


# ---------------------------------------------------------------------- 16-mixed


class Silent(Plain):
    """A loss without a gradient: what moves the weights is the penalty."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.0 * self(batch[0]).float().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_gradients_of_16_mixed_are_unscaled_when_the_penalty_is_added() -> None:
    torch.manual_seed(0)
    start = Silent().net.hidden.weight.detach()
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    module = fit(GroupLassoCallback(STRENGTH), module=Silent, plugins=plugins, max_steps=1)
    expected = start - 0.1 * STRENGTH * start / start.norm(dim=1, keepdim=True)
    torch.testing.assert_close(module.net.hidden.weight.detach(), expected)


# ---------------------------------------------------------------------- the proximal variant


def shrink_by_hand(module: SmallModule, lr: float) -> None:
    """Rows of the conv unit and of the hidden unit, one by one."""
    net = module.net
    units = [
        *([net.conv.weight[i], net.conv.bias[i], net.norm.weight[i], net.norm.bias[i]] for i in range(6)),
        *([net.hidden.weight[i], net.hidden.bias[i]] for i in range(16)),
    ]
    with torch.no_grad():
        for unit in units:
            norm = float(torch.cat([one.reshape(-1) for one in unit]).norm())
            for one in unit:
                one.mul_(max(0.0, 1 - lr * 5 * STRENGTH / norm) if norm else 0.0)


def test_the_proximal_variant_is_a_loop_that_shrinks_after_every_step() -> None:
    expected = bare_loop((), accumulate=2, after_step=shrink_by_hand)
    callback = GroupLassoCallback(5 * STRENGTH, granularity="group", proximal=True)
    module = fit(callback, precision="64-true", accumulate_grad_batches=2)
    assert_same(module, expected)


def test_whole_units_become_exactly_zero_and_can_be_cut_out() -> None:
    callback = GroupLassoCallback(0.4, granularity="group", proximal=True)
    module = fit(callback, max_epochs=8)
    inputs = torch.randn(4, FEATURES)
    zero = {}
    for group in channel_groups(module, inputs):
        nonzero = torch.zeros(group.size, dtype=torch.bool)
        for member in (one for one in group.members if one.produces):
            tensor = module.get_parameter(member.tensor)
            for i in range(group.size):
                nonzero[i] |= bool(tensor.index_select(member.dim, member.index[i]).any())
        zero[group.name] = int((~nonzero).sum())
    assert 0 < zero["net.hidden"] < 16
    assert zero["net.head"] == 0
    assert callback.group_sparsity == pytest.approx((zero["net.conv"] + zero["net.hidden"]) / 22)
    module.eval()
    before = module(inputs)
    shrink(module, inputs)
    assert module.net.hidden.out_features == 16 - zero["net.hidden"]
    torch.testing.assert_close(module(inputs), before)


def test_the_gradient_alone_makes_no_exact_zeros_where_the_proximal_step_does() -> None:
    rough, exact = (GroupLassoCallback(0.4, proximal=proximal) for proximal in (False, True))
    weights = [fit(callback, max_epochs=6).net.hidden.weight for callback in (rough, exact)]
    assert weights[0].all()
    assert (weights[1] == 0).all(1).any()
    assert rough.group_sparsity == 0 < exact.group_sparsity


def test_group_sparsity_is_logged_under_a_name_of_its_own() -> None:
    callbacks = [GroupLassoCallback(0.4, proximal=True), GroupLassoCallback(0.1, granularity="shape", proximal=True)]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=3)
    trainer.fit(Plain(), plain(0))
    for name, callback in zip(("compress/group_sparsity", "compress/group_sparsity_2"), callbacks, strict=True):
        assert float(trainer.callback_metrics[name]) == pytest.approx(callback.group_sparsity)
        assert name in trainer.progress_bar_metrics


def test_channels_that_leave_during_the_fit_leave_the_penalty() -> None:
    class Cut(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 0:
                inputs = torch.zeros(2, FEATURES)
                cut(pl_module, inputs, keep={"net.hidden": list(range(1, 16, 2))}, optimizers=trainer.optimizers)

    for granularity in ("filter", "group"):
        callback = GroupLassoCallback(STRENGTH, granularity=granularity)
        fit(callback, Cut())
        assert sum(one.norms().numel() for one in callback._groups) == 6 + 8 + (3 if granularity == "filter" else 0)


# ---------------------------------------------------------------------- what is zero leaves


def shrinking(strength: float = 0.4, **options: Any) -> GroupLassoCallback:
    return GroupLassoCallback(strength, granularity="group", proximal=True, shrink="on_fit_end", **options)


def test_what_is_zero_at_the_fits_end_leaves_the_network(tmp_path: Path) -> None:
    masked = fit(GroupLassoCallback(0.4, granularity="group", proximal=True), max_epochs=8)
    torch.manual_seed(0)
    module, lasso = Plain(), shrinking()
    trainer = quiet_trainer(callbacks=[lasso], max_epochs=8)
    trainer.fit(module, plain(0))
    left = int(hidden_rows(masked.net).any(1).sum())
    assert module.net.hidden.out_features == module.net.head.in_features == left < 16
    assert_same(module, shrink(masked, torch.randn(4, FEATURES)))

    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    inputs = torch.randn(4, FEATURES)
    expected = module.eval()(inputs)
    torch.testing.assert_close(load_compressed(tmp_path / "thin.ckpt", Plain()).eval()(inputs), expected)
    other = Plain()
    tester = quiet_trainer(callbacks=[shrinking()])
    tester.test(other, plain(), ckpt_path=tmp_path / "thin.ckpt", verbose=False, weights_only=True)
    torch.testing.assert_close(other.eval()(inputs), expected)
    quiet_trainer(callbacks=[lasso], max_epochs=1).fit(module, plain(0))
    assert module.net.hidden.out_features <= left


class Three(SmallModule):
    """Two hidden layers, whose live neurons are easily counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.net.append(nn.Linear(8, 3))

    def alive(self) -> int:
        return sum(int((self.net[at].weight.abs().sum(1) > 0).sum()) for at in (1, 3))


@pytest.mark.parametrize("target", ["net.*", "net.3"])
@pytest.mark.parametrize("end_epoch", [1.0, 9.0])
def test_channels_that_another_callback_masks_may_be_cut_out_by_the_penalty(target: str, end_epoch: float) -> None:
    module = Three()
    pruning = IterativePruningCallback(
        0.5,
        granularity="neuron",
        scope="layer",
        schedule="linear",
        shrink="never",
        every_n_steps=2,
        end_epoch=end_epoch,
    )
    lasso = GroupLassoCallback(0.01, granularity="group", proximal=True, shrink="on_fit_end", target=target)
    for others in ([lasso], []):  # and a second fit goes on with what is left
        quiet_trainer(callbacks=[pruning, *others], max_epochs=2).fit(module, plain())
        assert module.net[3].weight.shape[0] < 8
        assert (module.net[1].weight.shape[0] < 12) == (target == "net.*")
        assert pruning.sparsity == pytest.approx(1 - module.alive() / 20)
        if end_epoch > 2:
            return


def test_a_named_network_is_cut_within_the_module() -> None:
    module = fit(shrinking(network="net", example_inputs=torch.zeros(2, FEATURES)), max_epochs=8)
    assert_same(module, fit(shrinking(), max_epochs=8))
    assert module.net.hidden.out_features < 16
    assert "lightning_compress.structure" in module.state_dict()._metadata[""]


def test_masks_of_a_pruning_callback_go_with_what_is_zero() -> None:
    pruning = IterativePruningCallback(0.5, end_epoch=1.5, every_n_steps=4)
    module = fit(pruning, shrinking(), max_epochs=8)
    assert module.net.hidden.out_features < 16
    for name, mask in pruning.masks.items():
        assert mask.shape == module.get_parameter(name).shape
        assert not module.get_parameter(name)[~mask].any()


def test_the_network_is_planned_once_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effects that are declared before the fit need the channels, and so do the fit and the cut at its end."""
    planned: list[Any] = []
    monkeypatch.setattr(lasso_callback, "channel_groups", lambda *args: planned.append(args) or channel_groups(*args))
    module = fit(IterativePruningCallback(0.5, end_epoch=1.5, target="net.conv"), shrinking(), max_epochs=8)
    assert len(planned) == 1
    assert module.net.hidden.out_features < 16


def test_a_layer_that_is_zero_as_a_whole_stays() -> None:
    with pytest.warns(UserWarning, match=r"All channels of 'net\.hidden' are zero.*smaller strength than 50"):
        module = fit(shrinking(50.0, target="net.hidden"))
    assert module.net.hidden.out_features == 16
    assert not hidden_rows(module.net).any()


# ---------------------------------------------------------------------- beside pruning


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_pruned_weights_stay_zero_and_the_amount_is_met(granularity: Any, proximal: bool) -> None:
    pruning = IterativePruningCallback(0.5, granularity=granularity, end_epoch=1.5, every_n_steps=4)
    lasso = GroupLassoCallback(0.01, proximal=proximal, granularity="filter" if granularity == "weight" else "group")
    module = fit(pruning, lasso, max_epochs=3)
    assert pruning.sparsity == pytest.approx(0.5, abs=0.03)
    for name, mask in pruning.masks.items():
        assert not module.get_parameter(name)[~mask].any()
    alone = fit(IterativePruningCallback(0.5, granularity=granularity, end_epoch=1.5, every_n_steps=4), max_epochs=3)
    assert NORMS["filter"](module.net).sum() < NORMS["filter"](alone.net).sum()


def test_channels_that_leave_during_the_fit_leave_the_penalty_too() -> None:
    settings: dict[str, Any] = {"granularity": "neuron", "end_epoch": 1.5, "every_n_steps": 6, "shrink": "during_fit"}
    lasso = GroupLassoCallback(0.01, granularity="group", proximal=True)
    module = fit(IterativePruningCallback(0.5, scope="layer", **settings), lasso, max_epochs=3)
    sizes = [module.net.conv.out_channels, module.net.hidden.out_features]
    assert sizes == [3, 8]
    assert [one.norms().numel() for one in lasso._groups] == sizes


def test_ranks_agree_when_channels_are_pruned_under_the_penalty(rank_pair: RankPair, tmp_path: Path) -> None:
    beside = (GroupLassoCallback(0.05, granularity="group", proximal=True),)
    first, second = rank_pair.run("support.jobs:fit_on_ranks", tmp_path, entry="pruning-neurons", callbacks=beside)
    second["weights"] |= {key: first["weights"][key] for key in first["weights"] if "running" in key}  # each rank's own
    for part in ("weights", "optimizers"):
        assert differences(first[part], second[part]) == []


@pytest.mark.parametrize("proximal", [False, True])
def test_a_penalty_that_makes_no_group_zero_says_so(proximal: bool) -> None:
    lasso = GroupLassoCallback(1e-6, proximal=proximal)
    advice = r"use a larger strength than 1e-06" + (r"\." if proximal else ", and proximal=True")
    with pytest.warns(UserWarning, match=r"has made no group zero \(the smallest .* can be left out: " + advice):
        quiet_trainer(callbacks=[lasso], max_epochs=1).fit(SmallModule(), plain(0), plain())
