"""Early exits of a ResNet-20 by the clock: what they cost, what they save, and what a smaller network would give.

Three exits are placed by their share of the MACs. The network is trained alone, jointly with its exits, and frozen with
the same heads; thresholds are calibrated on validation images for an allowed drop and for budgets. Everything that is
reported is measured on test images that neither training nor calibration has seen. All passes are timed on one thread,
in turns with the eager full network: batch by batch, the median of a few rounds, summed over the batches.

The controls are each exit alone for all images, narrower ResNet-20s that are trained alone for as many epochs, images
that leave at random in the same shares, and the thresholds of MSDNet's sweep over q for the same mean cost.

    python benchmarks/early_exit.py --dataset mnist --data data/mnist --weights weights
    python benchmarks/early_exit.py --dataset cifar10 --data data/cifar10 --weights weights --only time
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from mnist_pruning import silence
from torch import nn

from lightning_compress import EarlyExitHeads
from lightning_compress.baselines import CIFAR10, MNIST, Classifier, ResNet20
from lightning_compress.baselines.datamodule import ImageData

WIDTH = 16
EPOCHS = {"mnist": 3, "cifar10": 12}
EXITS: dict[str, dict[str, Any]] = {  # how exits are trained, by the name of the row
    "joint": {},
    "frozen": {"train": "frozen"},
    "rising": {"weights": "rising"},
    "equilibrium": {"gradient": "equilibrium"},
    "distill": {"distill": 0.5},
}


@dataclass(frozen=True)
class Setting:
    """How every network is trained, and on what."""

    dataset: str
    epochs: int
    batch: int
    lr: float
    precision: Any
    seed: int
    weights: Path | None
    quick: bool


def data_of(setting: Setting, folder: str) -> ImageData:
    common: dict[str, Any] = {"batch_size": setting.batch, "seed": setting.seed}
    if setting.dataset == "mnist":
        return MNIST(folder, val_size=5000, **common)
    return CIFAR10(folder, val_size=4000, flip=True, shift=4, **common)


def trainer(setting: Setting, epochs: int, **options: Any) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    few: dict[str, Any] = {"limit_train_batches": 20} if setting.quick else {}
    given = silent | few | {"limit_val_batches": 0, "enable_model_summary": False} | options
    return Trainer(accelerator="cpu", max_epochs=epochs, **given)


def classifier(setting: Setting, shape: Sequence[int], width: int = WIDTH) -> Classifier:
    """A ResNet-20 from the seed's initial weights."""
    seed_everything(setting.seed, verbose=False)
    network = ResNet20(width=width, in_channels=shape[0])
    return Classifier(network, optimizer="sgd", lr=setting.lr, weight_decay=1e-4, warmup=0.1, input_shape=shape)


def trained(name: str, make: Callable[[], LightningModule], data: ImageData, setting: Setting) -> LightningModule:
    """Return a module with the weights of the folder, or train it and write them there."""
    module, path = make(), None
    if setting.weights is not None:
        path = setting.weights / f"{setting.dataset}-{setting.seed}-{setting.epochs}-{name}.pt"
        if path.exists():
            module.load_state_dict(torch.load(path))
            return module.eval()
    start = time.perf_counter()
    fitted = copy.deepcopy(module).to(memory_format=torch.channels_last)  # trains faster; keeps no other trace
    seed_everything(setting.seed, verbose=False)
    epochs = max(1, setting.epochs // 3) if name == "frozen" else setting.epochs
    trainer(setting, epochs, precision=setting.precision).fit(fitted, datamodule=data)
    print(f"{setting.dataset}, seed {setting.seed}: {name} trained in {time.perf_counter() - start:.0f} s", flush=True)
    module.load_state_dict(fitted.state_dict())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), path)
    return module.eval()


def with_exits(name: str, plain: nn.Module, shape: Sequence[int], setting: Setting) -> EarlyExitHeads:
    """A network with three exits: from the initial weights, or from those of the network trained alone."""
    module = classifier(setting, shape)
    if name == "frozen":
        module.load_state_dict(plain.state_dict())
    return EarlyExitHeads(module, 3, num_classes=10, network="network", **EXITS[name])


def networks(
    data: ImageData, setting: Setting, exits: Sequence[str], widths: Sequence[int]
) -> tuple[LightningModule, dict[str, EarlyExitHeads], dict[int, LightningModule]]:
    """The network trained alone, those with exits by how they were trained, and narrower ones by width."""
    shape = data.input_shape
    plain = trained("plain", lambda: classifier(setting, shape), data, setting)
    early: dict[str, Any] = {
        name: trained(name, lambda name=name: with_exits(name, plain, shape, setting), data, setting) for name in exits
    }
    narrow = {
        width: trained(f"width{width}", lambda width=width: classifier(setting, shape, width), data, setting)
        for width in widths
    }
    return plain, early, narrow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(EPOCHS), default="mnist")
    parser.add_argument("--data", help="the folder of its files; by default data/mnist or data/cifar10")
    parser.add_argument("--epochs", type=int, help="by default 3 on MNIST and 12 on CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    parser.add_argument("--exits", nargs="+", choices=list(EXITS), default=["joint", "frozen"], help="how they train")
    parser.add_argument("--widths", type=int, nargs="*", default=[4, 6, 8, 11], help="of the narrower networks")
    parser.add_argument("--weights", type=Path, help="a folder to which weights are written, or from which they come")
    parser.add_argument("--only", choices=["train", "accuracy", "time"])
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        setting = Setting(
            dataset=arguments.dataset,
            epochs=1 if arguments.quick else arguments.epochs or EPOCHS[arguments.dataset],
            batch=arguments.batch,
            lr=arguments.lr,
            precision=arguments.precision,
            seed=seed,
            weights=None if arguments.quick else arguments.weights,
            quick=arguments.quick,
        )
        data = data_of(setting, arguments.data or f"data/{setting.dataset}")
        data.setup()
        plain, early, narrow = networks(data, setting, arguments.exits, arguments.widths)


if __name__ == "__main__":
    main()
