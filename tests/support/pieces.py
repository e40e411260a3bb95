"""What configs of the tests name by `_target_`."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_compress.baselines import Digits
from support.small import SmallModule


class StopAtEpoch(Callback):
    """Ends the process in the middle of a fit, if that is not a resumed one."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch and trainer.ckpt_path is None:
            raise SystemExit("the lights went out")


class Untested(SmallModule):
    """A module without a test_step, which must not be trained before that is said."""

    test_step = LightningModule.test_step

    def training_step(self, batch: object, batch_idx: int) -> None:  # type: ignore[override]
        raise AssertionError("trained")


class Rooted(Digits):
    """Data that want a folder to be there, like those of files."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = Path(root)

    def prepare_data(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"no data in {self.root.absolute()}")


class Wrapper(LightningModule):
    """A wrapper that does nothing but remember what it wraps."""

    def __init__(self, module: LightningModule, *, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name


class Transparent(LightningModule):
    """A wrapper that is used like what it wraps, with the same keys under another prefix."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        module.log = self.log  # type: ignore[method-assign]
        for name in ("forward", "training_step", "validation_step", "test_step", "configure_optimizers"):
            setattr(self, name, getattr(module, name))


def make_module() -> LightningModule:
    """A factory, for a `_target_` that is no class."""
    return SmallModule()
