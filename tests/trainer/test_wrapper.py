"""A wrapper that adds nothing: whatever the Trainer does with it, it does with the module alone."""

from __future__ import annotations

import copy
import inspect
import pickle
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loggers import CSVLogger
from support.compare import differences
from support.small import ManualModule, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import IterativePruningCallback
from lightning_compress.core.select import select_parameters
from lightning_compress.trainer.resume import ResumableCallback
from lightning_compress.trainer.unwrap import innermost
from lightning_compress.trainer.wrapper import CompressionModule, Objective


class Nothing(Objective):
    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


class Wrapper(CompressionModule):
    __slots__ = ()

    def __init__(self, module: LightningModule, tag: str = "", objective: Objective | None = None) -> None:
        super().__init__(module, objective or Nothing(tag=tag))


class Double(Objective):
    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return 2.0 * run(*args, **kwargs)


HOOKS = sorted(
    (
    {name for kind in (ModelHooks, CheckpointHooks) for name in vars(kind) if name.startswith(("on_", "configure"))}
    | {name for name in vars(DataHooks) if "batch" in name or name in ("prepare_data", "setup", "teardown")}
    | {"configure_optimizers", "configure_callbacks", "configure_gradient_clipping", "optimizer_step", "backward"}
    | {"optimizer_zero_grad", "lr_scheduler_step", "training_step", "validation_step", "test_step", "predict_step"}
    | {"forward", "state_dict", "load_state_dict"}
    ) - {"configure_sharded_model"}
)  # fmt: skip


class Recorded(SmallModule):
    """Has everything a LightningModule can have, and writes down what is called."""

    def __init__(self, width: int = 3, returns: str = "tensor") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.trace: list[str] = []
        self.seen = 0
        self.accuracy, self.epoch_accuracy = MulticlassAccuracy(width), MulticlassAccuracy(width)
        self.example_input_array = torch.zeros(1, 12)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"step": float(self.global_step), "epochs": float(self.current_epoch)})
        self.logger.log_metrics({"direct": 1.0}, step=self.global_step)
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.seen += 1
        if self.hparams["returns"] == "none" and batch_idx % 3 == 2:
            return None
        return {"loss": loss, "logits": logits} if self.hparams["returns"] == "dict" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.epoch_accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.epoch_accuracy, prog_bar=True)


def _recording(name: str) -> Callable[..., Any]:
    def hook(self: Recorded, *args: Any, **kwargs: Any) -> Any:
        self.trace.append(name)
        return getattr(super(kind, self), name)(*args, **kwargs)

    if name.endswith("_step"):
        hook.__signature__ = inspect.signature(getattr(Recorded, name))  # type: ignore[attr-defined]  # Lightning reads it
    return hook


kind = type("Recording", (Recorded,), {})
for _name in HOOKS:
    setattr(kind, _name, _recording(_name))


class Outputs(Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(outputs)


def life(wrap: Callable[[LightningModule], LightningModule], returns: str, folder: Path) -> dict[str, Any]:
    """Fit, validate, test, predict and resume; return all that can be seen of it."""
    seed_everything(3, verbose=False)
    own = kind(returns=returns)
    module, outputs = wrap(own), Outputs()
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val_accuracy", mode="max", filename="best")
    trainer = quiet_trainer(
        logger=CSVLogger(folder, "logs", version=0),
        enable_checkpointing=True,
        callbacks=[outputs, checkpoint],
        max_epochs=2,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        val_check_interval=6,
        log_every_n_steps=1,
    )
    trainer.fit(module, shuffled(), plain())
    validated = trainer.validate(module, plain(), verbose=False)
    tested = trainer.test(module, plain(), ckpt_path="best", verbose=False, weights_only=True)
    predicted = trainer.predict(module, plain())
    trace = list(own.trace)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    return {
        "trace": trace,
        "logged": dict(trainer.logged_metrics),
        "progress": dict(trainer.progress_bar_metrics),
        "callback": dict(trainer.callback_metrics),
        "file": (folder / "logs" / "version_0" / "metrics.csv").read_text(),
        "hparams": (folder / "logs" / "version_0" / "hparams.yaml").read_text(),
        "outputs": outputs.found,
        "results": [validated, tested, predicted],
        "weights": dict(module.state_dict()),
        "seen": own.seen,
        "checkpoint": {
            key: saved[key] for key in ("state_dict", "hyper_parameters", "optimizer_states", "lr_schedulers")
        },
        "random": torch.rand(2),
    }


@pytest.mark.parametrize("returns", ["tensor", "dict", "none"])
def test_every_hook_every_log_and_every_number_is_as_without_it(returns: str, tmp_path: Path) -> None:
    alone = life(lambda module: module, returns, tmp_path / "alone")
    wrapped = life(Wrapper, returns, tmp_path / "wrapped")
    twice = life(lambda module: Wrapper(Wrapper(module, "inner"), "outer"), returns, tmp_path / "twice")
    alone_trace = {name: alone["trace"].count(name) for name in HOOKS}
    assert sum(count > 0 for count in alone_trace.values()) > 45  # the trace really sees them
    assert differences(alone, wrapped) == []
    assert differences(alone, twice) == []


def test_it_is_what_is_inside() -> None:
    own = Recorded(width=3)
    module = Wrapper(Wrapper(own, "inner"), "outer")
    assert isinstance(module, Recorded)
    assert isinstance(module, Wrapper)
    assert type(own) is Recorded
    assert innermost(module) is own
    assert module.hparams == own.hparams
    assert list(module.state_dict()) == list(own.state_dict())
    assert dict(module.named_parameters()).keys() == dict(own.named_parameters()).keys()
    assert select_parameters(module).keys() == select_parameters(own).keys()
    module.note = 5
    module.other = nn.Linear(1, 1)
    assert own.note == 5
    assert "other.weight" in own.state_dict()
    assert torch.equal(module.example_input_array, own.example_input_array)
    module.to(torch.float64)
    assert own.dtype is torch.float64
    module.freeze()
    assert not own.net.head.weight.requires_grad


def test_steps_nest_and_the_module_keeps_its_own() -> None:
    own = SmallModule()
    module = Wrapper(Wrapper(own, objective=Double()), objective=Double())
    batch = next(iter(plain()))
    module.eval()
    assert torch.equal(module.training_step(batch, 0), 4.0 * own.training_step(batch, 0))


def test_checkpoints_are_the_modules_own(tmp_path: Path) -> None:
    module = Wrapper(Recorded(returns="tensor"))
    trainer = quiet_trainer(max_epochs=1, logger=CSVLogger(tmp_path))
    trainer.fit(module, shuffled(), plain())
    trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    for kind in (Recorded, type(module)):
        loaded = kind.load_from_checkpoint(tmp_path / "it.ckpt", strict=True)
        assert type(loaded) is Recorded
        assert differences(dict(loaded.state_dict()), dict(module.state_dict())) == []
    with pytest.raises(TypeError, match="call load_from_checkpoint of that module's class"):
        Wrapper.load_from_checkpoint(tmp_path / "it.ckpt")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_whole_and_its_own(copied: Callable[[LightningModule], LightningModule]) -> None:
    module = Wrapper(Wrapper(SmallModule(), "inner"), objective=Double())
    other = copied(module)
    assert type(other) is type(module)
    assert vars(other) is vars(innermost(other))
    assert vars(other) is not vars(module)
    other.net.head.weight.data.zero_()
    assert module.net.head.weight.any()
    quiet_trainer(max_epochs=1).fit(other, shuffled(), plain())


def test_averages_of_it(tmp_path: Path) -> None:
    def averaged(wrap: Callable[[LightningModule], LightningModule]) -> dict[str, Any]:
        seed_everything(5, verbose=False)
        module = wrap(SmallModule())
        quiet_trainer(callbacks=[WeightAveraging()], max_epochs=2).fit(module, shuffled(), plain())
        return dict(module.state_dict())

    assert differences(averaged(lambda module: module), averaged(Wrapper)) == []


def test_a_callback_goes_on_when_its_module_is_wrapped_for_the_second_fit() -> None:
    own, pruning = SmallModule(), IterativePruningCallback(0.5, end_epoch=1.0)
    quiet_trainer(callbacks=[pruning], max_epochs=2).fit(own, shuffled(), plain())
    quiet_trainer(callbacks=[pruning], max_epochs=1).fit(Wrapper(own), shuffled(), plain())
    assert pruning.sparsity == pytest.approx(0.5, abs=0.01)


class Abstract(SmallModule, ABC):
    pass


class Attentive(SmallModule):
    """Makes its layers late, and answers for names that it has not."""

    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3)

    def __getattr__(self, name: str) -> Any:
        return 7 if name == "seven" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.net(x)) * self.seven


@pytest.mark.parametrize("kind", [Abstract, Attentive])
def test_classes_of_all_sorts(kind: type[SmallModule]) -> None:
    own = kind()
    quiet_trainer(max_epochs=1).fit(Wrapper(own), shuffled(), plain())
    quiet_trainer(max_epochs=1).test(own, plain(), verbose=False)


class Iterating(SmallModule):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return super().training_step(*next(dataloader_iter)[:2])


class Clashing(SmallModule):
    def set_width(self) -> None: ...


class Outlined(SmallModule):
    outline = "a name that every wrapper has"


class Widths(Wrapper):
    __slots__ = ()

    def set_width(self) -> None: ...


class Slotted(SmallModule):
    __slots__ = ("mine",)


def on_the_object() -> SmallModule:
    module = SmallModule()
    module.training_step = module.validation_step  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("make", "wrapper", "error", "message"),
    [
        (ManualModule, Wrapper, ValueError, "does not support the manual optimization of ManualModule"),
        (Iterating, Wrapper, ValueError, r"does not support the training_step\(dataloader_iter\) of Iterating"),
        (on_the_object, Wrapper, ValueError, "is set on the object: put it into the class"),
        (lambda: torch.compile(SmallModule()), Wrapper, ValueError, "compiled SmallModule: Compile the network inside"),
        (lambda: nn.Linear(1, 1), Wrapper, TypeError, "wraps a LightningModule of `lightning.pytorch`; got Linear"),
        (Slotted, Wrapper, ValueError, "can't wrap Slotted, whose class nothing derives from: multiple bases"),
        (Outlined, Wrapper, ValueError, "has 'outline' of its own, which would hide that of Outlined"),
        (Clashing, Widths, ValueError, "has 'set_width' of its own, which would hide that of Clashing"),
    ],
)
def test_what_it_can_not_wrap(make: Callable[[], Any], wrapper: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapper(make())


def test_manual_optimization_that_is_chosen_later_and_compilation_as_a_whole() -> None:
    module = Wrapper(SmallModule())
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="does not support the manual optimization of"):
        quiet_trainer().fit(module, shuffled(), plain())
    with pytest.raises(ValueError, match="does not support a SmallModule that is compiled as a whole"):
        quiet_trainer().fit(torch.compile(Wrapper(SmallModule())), shuffled(), plain())


class Looking(SmallModule):
    """Compares itself in its step with what its hooks saw, and asks its own step for a validation loss."""

    seen: Any = None

    def on_train_start(self) -> None:
        self.seen = [self, type(self).__name__]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.training:
            assert self.seen[0] is self is self.trainer.lightning_module
            assert self.seen[1] == type(self).__name__ == "Looking"
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_the_step_is_that_of_the_object_in_the_hooks_and_validation_takes_it_as_it_is() -> None:
    losses = []
    for wrap in (lambda module: module, lambda module: Wrapper(Wrapper(module), objective=Double())):
        torch.manual_seed(0)
        module = wrap(Looking())
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(module, shuffled(), plain())
        losses.append(trainer.validate(module, plain(), verbose=False))
        if not isinstance(module, Wrapper):
            continue
        torch.manual_seed(1)
        assert type(innermost(module)) is Looking
    assert losses[0][0]["val_loss"] != losses[1][0]["val_loss"]  # trained by twice the loss
    module.load_state_dict(Looking().state_dict())
    alone = Looking()
    alone.load_state_dict(module.state_dict())
    found = [quiet_trainer().validate(one, plain(), verbose=False)[0]["val_loss"] for one in (alone, module)]
    assert found[0] == found[1]


def test_a_step_that_is_exchanged_after_wrapping_is_told() -> None:
    own = SmallModule()
    module = Wrapper(own)
    own.training_step = own.validation_step  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="is set on the object"):
        quiet_trainer().fit(module, shuffled(), plain())


def test_wrappers_in_turn_in_one_trainer() -> None:
    own, trainer = SmallModule(), quiet_trainer(max_epochs=1)
    first = Wrapper(own, "first", objective=Beside())
    trainer.fit(first, shuffled())
    outer = Wrapper(first, "outer")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(outer, shuffled())
    keys = {one.state_key for one in trainer.callbacks if isinstance(one, ResumableCallback)}
    assert keys == {level.callback.state_key for level in outer._lightning_compress.levels}
    assert len(keys) == 2
    trainer.fit_loop.max_epochs = 3
    trainer.fit(SmallModule(), shuffled())
    assert not any(isinstance(one, ResumableCallback) for one in trainer.callbacks)


def test_two_that_are_the_same_are_two() -> None:
    module = Wrapper(Wrapper(SmallModule(), objective=Beside()), objective=Beside())
    trainer = quiet_trainer(max_epochs=1)
    names: list[str] = []

    class Names(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            names.extend(name for name, _ in pl_module.named_parameters())

    trainer.callbacks.append(Names())  # type: ignore[attr-defined]
    trainer.fit(module, shuffled())
    assert len(set(names)) == len(names) == 12


def test_what_trains_beside_the_network_would_be_lost_in_a_fork() -> None:
    module = Wrapper(SmallModule(), objective=Beside())
    trainer = quiet_trainer(strategy="ddp_fork", devices=2, max_epochs=1)
    with pytest.raises(Exception, match=r"trains parameters of its own.* can't bring back to the main process"):
        trainer.fit(module, shuffled())


def test_after_a_failure_its_parameters_are_the_modules() -> None:
    class Failing(SmallModule):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("the lights went out")

    module = Wrapper(Failing(), objective=Beside())
    with pytest.raises(RuntimeError, match="lights"):
        quiet_trainer().fit(module, shuffled())
    assert len(list(module.parameters())) == 8


class Beside(Nothing):
    def configure(self, module: LightningModule) -> None:
        if not self.auxiliary:
            self.auxiliary["layer"] = nn.Linear(2, 2)

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) + self.auxiliary["layer"](torch.ones(1, 2)).square().sum()


class Selective(SmallModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_parameters_beside_the_network_train_and_are_no_part_of_it() -> None:
    torch.manual_seed(0)
    objective = Beside()
    module = Wrapper(SmallModule(), objective=objective)
    trainer = quiet_trainer()
    trainer.fit(module, shuffled(), plain())
    (optimizer,) = trainer.optimizers
    assert len(optimizer.param_groups[0]["params"]) == 10
    assert objective.auxiliary["layer"](torch.ones(1, 2)).abs().max() < 0.3  # was trained to 0
    assert len(list(module.parameters())) == 8
    assert module.state_dict().keys() == SmallModule().state_dict().keys()
    with pytest.raises(ValueError, match=r"layer\.weight, layer\.bias\. .* let its configure_optimizers take these"):
        quiet_trainer().fit(Wrapper(Selective(), objective=Beside()), shuffled(), plain())
