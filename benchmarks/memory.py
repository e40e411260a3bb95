"""What does a technique cost in memory? The peak of a fit above the interpreter's, compared with the bare fit's.

Every fit runs in a process of its own, after a fit of a small network with the same callbacks, which loads whatever
code is needed. The bare fit holds weights, gradients, the optimizer's state, and one batch's activations. The C library
gives freed memory back at once here (MALLOC_MMAP_THRESHOLD_), so that what is counted is in use. Signs without a scale
overflow in twenty layers: take --network wide for them.

    python benchmarks/memory.py
    python benchmarks/memory.py --network conv --optimizer sgd --only bare magnitude "magnitude, regrow"
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)
from lightning_compress.baselines import TensorLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.resident import forget_peak, peak, resident

BATCH = 8
STEPS = 4  # an epoch


def ours(**options: Any) -> Callable[[], Callback]:
    return lambda: IterativePruningCallback(0.6, start_epoch=1.0, end_epoch=3.0, every_n_steps=2, **options)


def neurons(**options: Any) -> Callable[[], Callback]:
    return ours(granularity="neuron", **options)


TECHNIQUES: dict[str, Callable[[], Callback] | None] = {
    "bare": None,
    "magnitude": ours(),
    "magnitude, regrow": ours(regrow=True),
    "l2": ours(criterion="l2"),
    "random": ours(criterion="random"),
    "taylor": ours(criterion="taylor"),
    "obd": ours(criterion="obd"),
    "fisher": ours(criterion="fisher"),
    "ewc": ours(criterion="ewc"),
    "mas": ours(criterion="mas"),
    "si": ours(criterion="si"),
    "neurons, shrink on_fit_end": neurons(),
    "neurons, shrink during_fit": neurons(shrink="during_fit"),
    "neurons, regrow": neurons(regrow=True),
    **{
        f"neurons, {criterion}": neurons(criterion=criterion)
        for criterion in ("l2", "random", "taylor", "obd", "fisher", "ewc", "mas", "si", "apoz", "mean_activation")
    },
    "group lasso": lambda: GroupLassoCallback(1e-3),
    "group lasso, proximal": lambda: GroupLassoCallback(1e-3, proximal=True),
    "group lasso, cut": lambda: GroupLassoCallback(0.5, granularity="group", proximal=True, shrink="on_fit_end"),
    "clustering": lambda: WeightClusteringCallback(16),
    "quantization, 8 bits": lambda: QuantizationAwareTrainingCallback(8),
    "binary": lambda: BinaryWeightsCallback(),
    "binary, stochastic": lambda: BinaryWeightsCallback(mode="stochastic"),
    "binary, xnor": lambda: BinaryWeightsCallback(scaling="mean"),
}


def linear(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return uneven(nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), *layers, nn.Linear(width, 10)))


def conv(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    first = nn.Conv2d(1, width, 3, padding=1)
    return uneven(nn.Sequential(first, nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)))


@torch.no_grad()
def uneven(net: nn.Sequential) -> nn.Module:
    """Make every other hidden channel so small that a group lasso of a few steps takes it to zero."""
    for parameter in net[:-1].parameters():
        parameter[::2] *= 1e-3
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "linear": (lambda: linear(1024, 19), lambda: linear(8, 19)),
    "wide": (lambda: linear(4472, 1), lambda: linear(8, 1)),
    "conv": (lambda: conv(384, 15), lambda: conv(8, 15)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-4),
}


class Module(LightningModule):
    def __init__(self, net: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def fit(net: nn.Module, technique: str, optimizer: str) -> None:
    make = TECHNIQUES[technique]
    x, y = torch.randn(BATCH * STEPS, 1, 8, 8), torch.randint(10, (BATCH * STEPS,))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[] if make is None else [make()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(net, optimizer), TensorLoader(x, y, batch_size=BATCH))


def measure(network: str, technique: str, optimizer: str) -> tuple[int, int]:
    """Return the peak above the interpreter, and how many parameters the network has."""
    torch.manual_seed(0)
    large, small = NETWORKS[network]
    fit(small(), technique, optimizer)
    before = resident()
    forget_peak()
    net = large()
    count = sum(parameter.numel() for parameter in net.parameters())
    fit(net, technique, optimizer)
    return peak() - before, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(TECHNIQUES))
    parser.add_argument("--network", choices=list(NETWORKS), default="linear")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="momentum")
    parser.add_argument("--one", choices=list(TECHNIQUES), help="measure this technique here, and print JSON")
    arguments = parser.parse_args()
    if arguments.one is not None:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(json.dumps(measure(arguments.network, arguments.one, arguments.optimizer)))
        return
    peaks: dict[str, int] = {}
    table = Table("technique", "peak MB", "bytes per weight", "ratio to bare")
    for technique in ["bare", *(one for one in arguments.only if one != "bare")]:
        command = [sys.executable, __file__, "--one", technique]
        command += ["--network", arguments.network, "--optimizer", arguments.optimizer]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
        answer = subprocess.run(command, capture_output=True, text=True, env=environment)
        if answer.returncode:
            table.add_row(technique, answer.stderr.strip().rpartition("\n")[2], "", "")
            continue
        peaks[technique], count = json.loads(answer.stdout.splitlines()[-1])
        mine = peaks[technique]
        table.add_row(technique, f"{mine / 1e6:.0f}", f"{mine / count:.1f}", f"{mine / peaks['bare']:.2f}")
        Console(stderr=True).print(technique, f"{mine / 1e6:.0f}", f"{mine / count:.1f}", f"{mine / peaks['bare']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
