"""What benchmarks share that train networks on images: data, a recipe, weights in a folder, clocks and tables."""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich import box
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor, nn

from lightning_compress.baselines import CIFAR10, MNIST, Classifier, TensorLoader
from lightning_compress.baselines.datamodule import ImageData, Samples, stratified_order
from lightning_compress.core.hooks import hooked

EPOCHS = {"mnist": 3, "cifar10": 12}
VALIDATION = {"mnist": 5000, "cifar10": 4000}
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """How every network of a benchmark is trained, and on what.

    Attributes:
        images: Training images; None: all but those for validation.
        weights: The folder to which weights are written, or from which they come.
        quick: A few batches of everything.
    """

    dataset: str
    folder: str
    epochs: int
    batch: int
    lr: float
    seed: int
    precision: Any = "32-true"
    images: int | None = None
    weights: Path | None = None
    quick: bool = False


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options of benchmarks that train for several seeds and keep the weights."""
    parser.add_argument("--dataset", choices=list(EPOCHS), default="mnist")
    parser.add_argument("--data", help="the folder of its files; by default data/mnist or data/cifar10")
    parser.add_argument("--epochs", type=int, help="by default 3 on MNIST and 12 on CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    parser.add_argument("--weights", type=Path, help="a folder to which weights are written, or from which they come")
    parser.add_argument("--only", choices=["train", "accuracy", "time"])
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that does other things"
    )
    parser.add_argument("--json", type=Path, help="write the numbers of all seeds here as well")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few batches of everything")


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Yield the setting of each seed."""
    for seed in arguments.seeds:
        yield Setting(
            dataset=arguments.dataset,
            folder=arguments.data or f"data/{arguments.dataset}",
            epochs=1 if arguments.quick else arguments.epochs or EPOCHS[arguments.dataset],
            batch=arguments.batch,
            lr=arguments.lr,
            seed=seed,
            precision=arguments.precision,
            weights=None if arguments.quick else arguments.weights,
            quick=arguments.quick,
        )


def add_part(parser: argparse.ArgumentParser, *, images: int, epochs: int) -> None:
    """Add the options of benchmarks that train for one seed on a part of CIFAR-10."""
    parser.add_argument("--images", type=int, default=images, help="training images")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", default="data/cifar10")


def part_of(arguments: argparse.Namespace) -> Setting:
    given = {name: getattr(arguments, name) for name in ("images", "epochs", "batch", "lr", "seed")}
    return Setting(dataset="cifar10", folder=arguments.root, **given)


class PartOfCIFAR10(CIFAR10):
    """A stratified part of CIFAR-10: so many images, those for validation included; None: all."""

    images: int | None = None

    def read(self) -> tuple[Samples, Samples]:
        (images, labels), test = super().read()
        if self.images is None:
            return (images, labels), test
        if self.images > len(labels):
            raise SystemExit(f"There are {len(labels):,} training images, and {self.images:,} were asked for.")
        part = stratified_order(labels, seed=0)[: self.images].sort().values
        return (images[part], labels[part]), test


def data_of(setting: Setting, *, val_size: int | None = None) -> ImageData:
    """The images of a setting; CIFAR-10 is shifted and mirrored."""
    held = VALIDATION[setting.dataset] if val_size is None else val_size
    common: dict[str, Any] = {"batch_size": setting.batch, "seed": setting.seed, "val_size": held}
    if setting.dataset == "mnist":
        return MNIST(setting.folder, **common)
    data = PartOfCIFAR10(setting.folder, flip=True, shift=4, **common)
    data.images = None if setting.images is None else setting.images + held
    return data


def parts(data: ImageData, setting: Setting) -> tuple[TensorLoader, TensorLoader]:
    """The validation and the test images; fewer of them in a quick run."""
    found = []
    for part in (data.val_dataloader(), data.test_dataloader()):
        assert isinstance(part, TensorLoader)
        most = 640 if setting.quick else None
        found.append(TensorLoader(part.inputs[:most], part.targets[:most], batch_size=500))
    return found[0], found[1]


def trainer(setting: Setting, epochs: int, **options: Any) -> Trainer:
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    few: dict[str, Any] = {"limit_train_batches": 20} if setting.quick else {}
    given = silent | few | {"limit_val_batches": 0, "enable_model_summary": False} | options
    return Trainer(accelerator="cpu", max_epochs=epochs, **given)


def initial(make: Callable[[], Network], setting: Setting) -> Network:
    """A network with the initial weights of the seed."""
    seed_everything(setting.seed, verbose=False)
    return make()


def classifier(network: nn.Module, setting: Setting, shape: Sequence[int], **recipe: Any) -> Classifier:
    """A module in training mode: in a fit Lightning leaves every layer in the mode that it has."""
    given: dict[str, Any] = {"optimizer": "sgd", "lr": setting.lr, "weight_decay": 1e-4, "warmup": 0.1} | recipe
    return Classifier(network, input_shape=shape, **given).train()


def fit(
    module: LightningModule,
    data: ImageData,
    setting: Setting,
    *,
    epochs: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    seed_everything(setting.seed, verbose=False)
    options: dict[str, Any] = {"precision": setting.precision, "callbacks": list(callbacks)}
    trainer(setting, epochs or setting.epochs, **options).fit(module, datamodule=data)


def trained(
    name: str,
    make: Callable[[], LightningModule],
    data: ImageData,
    setting: Setting,
    *,
    epochs: int | None = None,
) -> LightningModule:
    """Return a module with the weights of the folder, or train it and write them there."""
    module, path = make(), None
    if setting.weights is not None:
        path = setting.weights / f"{setting.dataset}-{setting.seed}-{setting.epochs}-{name}.pt"
        if path.exists():
            module.load_state_dict(torch.load(path))
            return module.eval()
    start = time.perf_counter()
    fitted = copy.deepcopy(module).to(memory_format=torch.channels_last)  # trains faster; keeps no other trace
    fit(fitted, data, setting, epochs=epochs)
    print(f"{setting.dataset}, seed {setting.seed}: {name} trained in {time.perf_counter() - start:.0f} s", flush=True)
    module.load_state_dict(fitted.state_dict())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), path)
    return module.eval()


def accuracies(module: LightningModule, data: ImageData, setting: Setting) -> dict[str, float]:
    """What the module's test logs."""
    return dict(trainer(setting, 1).test(module, datamodule=data, verbose=False)[0])


def right(logits: Tensor, targets: Tensor) -> float:
    """Accuracy in per cent."""
    return 100 * float((logits.argmax(1) == targets).float().mean())


def answers(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a network answers for images, 500 at a time."""
    with torch.no_grad():
        return torch.cat([network(some) for some in images.split(500)])


def clock_of(arguments: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if arguments.clock == "cpu" else time.perf_counter


def times(
    ways: Mapping[str, Callable[[Tensor], Any]],
    batches: Sequence[Tensor],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of every batch: in turns, the median of the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    with torch.no_grad():
        for way in ways.values():
            for batch in batches[:3]:
                way(batch)
        for batch in batches:
            of_batch: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name in order.sample(list(ways), len(ways)):
                    start = clock()
                    ways[name](batch)
                    of_batch[name].append(clock() - start)
            for name, rounds_of_it in of_batch.items():
                seconds[name].append(statistics.median(rounds_of_it))
    return seconds


class Stopwatch(Callback):
    """Notes the seconds of every training step: forward, backward and optimizer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds.append(-self.clock())

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds[-1] += self.clock()


def step_seconds(
    makers: Mapping[str, Callable[[], LightningModule]],
    data: ImageData,
    setting: Setting,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Seconds of a training step of each module: the median over short fits in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(1 if setting.quick else 4):
        for name, make in makers.items():
            watch = Stopwatch(clock)
            trainer(setting, 1, limit_train_batches=9, callbacks=[watch]).fit(make(), datamodule=data)
            seconds[name] += watch.seconds[2:]
    return {name: statistics.median(of_steps) for name, of_steps in seconds.items()}


class Found:
    """Numbers by table, row and column, one for each seed; accuracies and shares of samples in per cent."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, list[float]]]] = {}

    def add(self, table: str, row: str, **columns: float) -> None:
        for column, value in columns.items():
            rows = self.tables.setdefault(table, {})
            rows.setdefault(row, {}).setdefault(column.replace("_", " "), []).append(value)

    def show(self, console: Console, json_file: Path | None = None, *, digits: int = 2) -> None:
        """Print the medians over the seeds, counts and large ones whole, and write all numbers into a file."""

        def said(value: float) -> str:
            whole = value >= 1000 or (value > 100 and value == int(value))
            return f"{value:,.0f}" if whole else f"{value:.{digits}f}"

        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            table = Printed("", box=box.MARKDOWN, title=title, title_justify="left")
            for column in columns:
                table.add_column(column, justify="right")
            for name, row in rows.items():
                medians = {column: statistics.median(values) for column, values in row.items()}
                table.add_row(name, *(said(medians[column]) if column in medians else "" for column in columns))
            console.print(table)
        if json_file is not None:
            json_file.write_text(json.dumps(self.tables, indent=1))


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
        with hooked(*handles), suppress(StopIteration):
            self.network(x)
        return found
