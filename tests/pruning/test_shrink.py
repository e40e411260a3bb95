"""Masked channels leave the network: at the fit's end or during it, and everything that a Trainer offers goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.small import SmallModule, SmallNet, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback
from lightning_compress.channels.cut import cut, shrink
from lightning_compress.channels.load import adopt_state

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


def pruning(amount: float = 0.5, **options: Any) -> IterativePruningCallback:
    settings: dict[str, Any] = {"granularity": "neuron", "end_epoch": 2.0, "every_n_steps": 6} | options
    return IterativePruningCallback(amount, **settings)


def run(
    callback: IterativePruningCallback, *others: Any, make: Callable[[], LightningModule] = SmallModule, **options: Any
) -> Any:
    seed_everything(1, verbose=False)
    module = make()
    trainer = quiet_trainer(callbacks=[*others, callback], **options)
    trainer.fit(module, shuffled(), plain())
    return trainer, module


def widths(module: Any) -> tuple[int, int]:
    return module.net.conv.out_channels, module.net.hidden.out_features


def test_the_thin_network_computes_what_the_masked_one_does() -> None:
    _, masked = run(pruning(shrink="never"))
    _, thin = run(pruning(shrink="on_fit_end"))
    assert widths(masked) == (6, 16)
    assert sum(widths(thin)) == 11  # half of 22
    torch.testing.assert_close(thin.eval()(X), masked.eval()(X))
    assert type(thin.net) is SmallNet


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_during_the_fit_is_the_same_training(optimizer: str) -> None:
    """Channels that are gone take no part; those that stay train as they do beside masked ones."""

    class Module(SmallModule):
        def __init__(self) -> None:
            super().__init__(optimizer)
            self.net.dropout.p = 0.0  # draws as many numbers as there are neurons
            self.double()

        def configure_optimizers(self) -> Any:
            kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
            options = {} if optimizer == "adam" else {"momentum": 0.9}
            return kind(self.parameters(), lr=0.01, **options)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0].double()), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    # One event: a second one would score weights that read silent channels, which only the masked network still has.
    options: dict[str, Any] = {
        "schedule": "one_shot",
        "start_epoch": 1.0,
        "end_epoch": None,
        "example_inputs": X.double(),
    }
    _, late = run(pruning(shrink="on_fit_end", **options), make=Module)
    _, early = run(pruning(shrink="during_fit", **options), make=Module)
    assert widths(late) == widths(early)
    for (name, one), other in zip(late.state_dict().items(), early.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("shrink", ["on_fit_end", "during_fit"])
def test_what_comes_after(shrink: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, monitor="val_loss")
    callback = pruning(shrink=shrink)
    trainer, module = run(callback, checkpoint, enable_checkpointing=True)
    before, reached = module.eval()(X), widths(module)
    trainer.test(module, plain(), verbose=False)
    torch.save(module.net, tmp_path / "net.pt")
    torch.testing.assert_close(torch.load(tmp_path / "net.pt", weights_only=False)(X), before)
    torch.testing.assert_close(torch.compile(module.net, backend="eager")(X), before)
    torch.testing.assert_close(copy.deepcopy(module)(X), before)
    trainer.test(module, plain(), ckpt_path="best", verbose=False, weights_only=True)

    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    thin = torch.load(tmp_path / "thin.ckpt", weights_only=True)
    fresh = SmallModule().eval()
    adopt_state(fresh, thin["state_dict"])
    torch.testing.assert_close(fresh(X), module.eval()(X))

    new = SmallModule()
    seed_everything(1, verbose=False)
    again = quiet_trainer(callbacks=[pruning(shrink=shrink)], max_epochs=6)
    again.fit(new, shuffled(), plain(), ckpt_path=checkpoint.last_model_path, weights_only=True)
    assert widths(new) == reached


class AttentionModule(SmallModule):
    """A network whose heads, which shapes do not reveal, are cut."""

    def __init__(self) -> None:
        super().__init__()
        net: Any = nn.Sequential(nn.Unflatten(1, (3, 4)), _Attention(), nn.Flatten(), nn.Linear(12, 3))
        self.net = net


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [SmallModule, AttentionModule])
@pytest.mark.parametrize(
    "options", [{}, {"shrink": "during_fit"}, {"network": "net", "example_inputs": X}], ids=["end", "during", "part"]
)
def test_the_network_of_a_module_can_be_saved_by_itself(
    make: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    target = ["*in_proj_weight"] if make is AttentionModule else None
    _, module = run(pruning(target=target, **options), checkpoint, make=make, enable_checkpointing=True)
    resumed = make()
    trainer = quiet_trainer(callbacks=[pruning(target=target, **options)])
    trainer.fit(resumed, shuffled(), plain(), ckpt_path=tmp_path / "step=12.ckpt")
    for thin in (module, resumed):
        fresh = make()
        assert thin.net.state_dict().keys() == fresh.net.state_dict().keys()
        assert any(one.shape != two.shape for one, two in zip(thin.parameters(), fresh.parameters(), strict=True))
        adopt_state(fresh.net, thin.net.state_dict())
        assert torch.equal(fresh.eval().net(X), thin.eval().net(X))


def test_a_new_process_tests_a_thin_checkpoint(tmp_path: Path) -> None:
    trainer, module = run(pruning(shrink="during_fit"))
    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    dense = SmallModule()
    tester = quiet_trainer(callbacks=[pruning(shrink="during_fit")])
    (first,) = tester.test(dense, plain(), ckpt_path=tmp_path / "thin.ckpt", verbose=False, weights_only=True)
    (second,) = quiet_trainer().test(module, plain(), verbose=False)
    assert first == second
    assert widths(dense) == widths(module)


def test_moving_averages_are_cut_alike() -> None:
    averaging = EMAWeightAveraging(decay=0.5)
    _, module = run(pruning(shrink="during_fit"), averaging)
    assert sum(widths(module)) == 11
    average = averaging._average_model
    assert average is None or widths(average.module) == widths(module)


def test_a_fit_that_ends_before_its_ramp_does_not_shrink() -> None:
    with pytest.warns(UserWarning, match="before the pruning ramp did"):
        _, module = run(pruning(end_epoch=50.0), max_epochs=2)
    assert widths(module) == (6, 16)


def test_limits_on_the_width() -> None:
    _, module = run(pruning(0.8, min_channels=3, round_to=4, scope="layer"))
    assert widths(module) == (4, 4)


def test_gradient_accumulation_and_clipping_go_on() -> None:
    _, module = run(pruning(shrink="during_fit"), accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert sum(widths(module)) == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": "later"}, "shrink must be one of never, on_fit_end, during_fit; got 'later'"),
        ({"shrink": "during_fit", "granularity": "weight"}, "needs granularity='neuron'"),
        ({"shrink": "during_fit", "regrow": True}, "wants them back"),
        ({"shrink": "during_fit", "criterion": "si"}, "use shrink='on_fit_end'"),
        ({"cost": "energy"}, "cost must be one of parameters, macs, latency; got 'energy'"),
        ({"min_channels": 0}, "min_channels must be a whole number, 1 or more; got 0"),
        ({"round_to": 2.5}, "round_to must be a whole number, 1 or more; got 2.5"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(**options)


def test_strategies_that_bring_weights_back_are_refused() -> None:
    trainer = quiet_trainer(callbacks=[pruning()], strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match="changes the network's shapes, which strategy='ddp_fork'"):
        trainer.fit(SmallModule(), shuffled(), plain())


class InBits(torch.optim.SGD):
    """Keeps a map of 16 levels for each parameter, as optimizers in 8 bits do: 16 is the width of a layer, too."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["qmap1"] = torch.linspace(-1, 1, 16)
        return loss


class InBitsModule(SmallModule):
    def configure_optimizers(self) -> Any:
        return InBits(self.parameters(), lr=0.05, momentum=0.9)


def test_state_that_cannot_be_cut_is_refused_before_the_first_step() -> None:
    seed_everything(1, verbose=False)
    module = InBitsModule()
    before = copy.deepcopy(module.state_dict())
    trainer = quiet_trainer(callbacks=[pruning(shrink="during_fit")], num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"InBits keeps 'qmap1' of shape \(16,\).*at the fit's end"):
        trainer.fit(module, shuffled(), plain())
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not trainer.optimizers[0].state


def test_state_that_cannot_be_cut_is_forgotten_at_the_fits_end() -> None:
    with pytest.warns(UserWarning, match="InBits keeps 'qmap1'.*The fit is over, so this state is discarded"):
        trainer, module = run(pruning(), make=InBitsModule)
    assert sum(widths(module)) == 11
    assert all("qmap1" not in trainer.optimizers[0].state[one] for one in module.parameters())


@pytest.mark.parametrize("cost", ["macs", "latency"])
def test_costs_weigh_groups(cost: str) -> None:
    callback = pruning(cost=cost)
    _, module = run(callback, max_epochs=3)
    assert sum(widths(module)) == 11


def test_a_residual_stream_goes_together() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Linear(12, 8), nn.Linear(8, 10)
            self.outer, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.relu(x + self.outer(F.relu(self.inner(x)))))

    class Module(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Residual()  # type: ignore[assignment]

    _, module = run(pruning(scope="layer"), make=Module)
    net = module.net
    assert (net.stem.out_features, net.outer.out_features, net.head.in_features, net.inner.in_features) == (4, 4, 4, 4)
    assert net.inner.out_features == net.outer.in_features == 5


def test_a_resumed_fit_compares_groups_by_the_dense_networks_costs(tmp_path: Path) -> None:
    callback = pruning(shrink="during_fit")
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
    _, whole = run(callback, checkpoint, enable_checkpointing=True)
    resumed, module = pruning(shrink="during_fit"), SmallModule()
    trainer = quiet_trainer(callbacks=[resumed])
    trainer.fit(module, shuffled(), plain(), ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    assert resumed._costs == callback._costs is not None
    assert widths(module) == widths(whole)


def test_a_checkpoint_of_averages_keeps_the_record(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
    run(pruning(shrink="during_fit"), EMAWeightAveraging(decay=0.5), checkpoint, enable_checkpointing=True)
    state = torch.load(tmp_path / "step=9.ckpt", weights_only=True)["state_dict"]
    assert "lightning_compress.structure" in state._metadata[""]
    module = SmallModule()
    trainer = quiet_trainer(callbacks=[EMAWeightAveraging(decay=0.5), pruning(shrink="during_fit")])
    trainer.fit(module, shuffled(), plain(), ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    assert sum(widths(module)) == 11


def test_a_checkpoint_of_another_network_is_refused_as_ever(tmp_path: Path) -> None:
    class Wider(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.net.hidden, self.net.head = nn.Linear(72, 20), nn.Linear(20, 3)

    trainer, _ = run(pruning(0.0, shrink="never"), make=Wider)
    trainer.save_checkpoint(tmp_path / "wider.ckpt")
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.hidden\.weight"):
        quiet_trainer(callbacks=[pruning()]).test(SmallModule(), plain(), ckpt_path=tmp_path / "wider.ckpt")


@pytest.mark.parametrize("shrink", ["during_fit", "on_fit_end"])
def test_a_resumed_process_takes_wider_checkpoints(shrink: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer, _ = run(pruning(shrink=shrink), checkpoint, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    expected = {}
    for path in sorted(tmp_path.glob("*.ckpt")):
        dense = SmallModule().eval()
        adopt_state(dense, torch.load(path, weights_only=True)["state_dict"])
        expected[path] = widths(dense), dense(X)
    assert len({reached for reached, _ in expected.values()}) == (4 if shrink == "during_fit" else 2)

    resumed = SmallModule()
    again = quiet_trainer(callbacks=[pruning(shrink=shrink)], max_epochs=5)
    start = "step=12.ckpt" if shrink == "during_fit" else "thin.ckpt"
    again.fit(resumed, shuffled(), plain(), ckpt_path=tmp_path / start, weights_only=True)
    assert sum(widths(resumed)) == 11
    for path, (reached, output) in expected.items():
        again.test(resumed, plain(), ckpt_path=path, verbose=False, weights_only=True)
        assert widths(resumed) == reached
        torch.testing.assert_close(resumed.eval()(X), output)


def test_a_thin_network_goes_back_to_a_thin_one() -> None:
    """What no tensor of it tells, here a buffer that is not saved, is in the snapshot's record."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 3)
            self.register_buffer("scale", torch.arange(1.0, 9.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.body(x)) * self.scale)

    class Module(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()  # type: ignore[assignment]

    seed_everything(1, verbose=False)
    module = Module()
    cut(module.net, X, keep={"body": [0, 3, 4, 6]}, owner=module)
    quiet_trainer().fit(module, shuffled())  # better than the constant answer of an empty network
    stopping = IterativePruningCallback(
        0.999, schedule="one_shot", start_epoch=1.0, stop={"monitor": "val_acc", "max_drop": 0.05}
    )
    quiet_trainer(callbacks=[stopping]).fit(module, shuffled(), plain())
    assert stopping.current_amount == 0.0
    assert module.net.scale.tolist() == [1, 4, 5, 7]
    assert module.net.body.weight.all()


def test_a_best_checkpoint_of_before_the_cut_is_said_to_be_wide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    with caplog.at_level("INFO"):
        trainer, module = run(pruning(), best, enable_checkpointing=True)
    assert (
        f"{best.best_model_path} is from before the cut and holds it with masked channels. After loading it"
        in caplog.text
    )
    thin = sum(parameter.numel() for parameter in module.parameters())
    recwarn.clear()
    trainer.test(module, plain(), verbose=False)
    assert not [one for one in recwarn if "was loaded" in str(one.message)]
    with pytest.warns(
        UserWarning, match=f"but {thin} after channels were cut out at the fit's end: a checkpoint from before"
    ):
        trainer.test(module, plain(), ckpt_path="best", verbose=False)
    shrink(module.net, X)
    assert sum(parameter.numel() for parameter in module.parameters()) == thin
