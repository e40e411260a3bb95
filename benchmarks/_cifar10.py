"""What the benchmarks of early exits share: a part of CIFAR-10, a recipe, and networks that stop at a layer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_compress.baselines import CIFAR10, Classifier
from lightning_compress.baselines.datamodule import Samples, stratified_order

SHAPE = (3, 32, 32)
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """How every network of a benchmark is trained, and on what."""

    root: str
    images: int
    epochs: int
    batch: int
    lr: float
    seed: int

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser, *, images: int, epochs: int) -> None:
        parser.add_argument("--images", type=int, default=images, help="training images")
        parser.add_argument("--epochs", type=int, default=epochs)
        parser.add_argument("--batch", type=int, default=64)
        parser.add_argument("--lr", type=float, default=0.1)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--root", default="data/cifar10")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Setting:
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


class PartOfCIFAR10(CIFAR10):
    """A stratified part of CIFAR-10, shifted and mirrored: `setting.images`, and `val_size` more for validation."""

    def __init__(self, setting: Setting, *, val_size: int = 0) -> None:
        super().__init__(
            setting.root, batch_size=setting.batch, val_size=val_size, flip=True, shift=4, seed=setting.seed
        )
        self.images = setting.images + val_size

    def read(self) -> tuple[Samples, Samples]:
        (images, labels), test = super().read()
        if self.images > len(labels):
            raise SystemExit(f"There are {len(labels):,} training images, and {self.images:,} were asked for.")
        part = stratified_order(labels, seed=0)[: self.images].sort().values
        return (images[part], labels[part]), test


def trainer(epochs: int = 1) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"limit_val_batches": 0, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_epochs=epochs, **silent, **options)


def classifier(network: nn.Module, setting: Setting) -> Classifier:
    return Classifier(network, optimizer="sgd", lr=setting.lr, weight_decay=1e-4, warmup=0.1, input_shape=SHAPE)


def initial(make: Callable[[], Network], setting: Setting) -> Network:
    seed_everything(setting.seed, verbose=False)
    return make()


def fit(module: LightningModule, data: CIFAR10, setting: Setting) -> None:
    seed_everything(setting.seed, verbose=False)
    trainer(setting.epochs).fit(module, datamodule=data)


def accuracies(module: LightningModule, data: CIFAR10) -> dict[str, float]:
    return dict(trainer().test(module, datamodule=data, verbose=False)[0])


class UpTo(nn.Module):
    """What some layers of a network return, in the order in which they run; runs nothing after the last of them."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network, self.layers = network, layers

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []

        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            found.append(output)
            if len(found) == len(self.layers):
                raise StopIteration

        handles = [self.network.get_submodule(layer).register_forward_hook(hook) for layer in self.layers]
        try:
            self.network(x)
        except StopIteration:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found
