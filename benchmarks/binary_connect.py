"""BinaryConnect on MNIST, and what followed it: one multilayer perceptron, one recipe, one run per row and seed.

The recipe is the paper's (Courbariaux et al. 2015, section 3.1): three hidden layers with batch norm, squared hinge
loss, Adam with a learning rate that decays exponentially, updates of binary layers divided by Glorot's coefficient, no
augmentation. Real weights begin uniform in -1 .. 1 in stochastic mode, as there, and as torch draws them in the others
(`--init` changes that). All 60,000 training images train; the error is that of the last epoch's network on the 10,000
test images, whose labels select nothing. "1-bit" is the network that a file of signs holds, "real" the real weights, in
stochastic mode those behind the signs: the paper's stochastic rows are of these, only its deterministic ones of 1 bit.
The file holds the 1-bit network, norms in float32.

    python benchmarks/binary_connect.py --root data/mnist --epochs 100 --seeds 0 1 2
    python benchmarks/binary_connect.py --root data/mnist --width 512 --epochs 20 --methods none xnor binarynet
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress import BinaryWeightsCallback, save_compressed
from lightning_compress.baselines import MNIST

PUBLISHED = {  # 3 x 1024, test error in %
    "none": "1.30 +- 0.04 (real)",
    "deterministic": "1.29 +- 0.08 (1-bit)",
    "stochastic": "1.18 +- 0.04 (real)",
    "dropout": "1.01 +- 0.04 (real)",
}
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "deterministic": {"mode": "deterministic", "lr_scale": "glorot"},
    "stochastic": {"mode": "stochastic", "lr_scale": "glorot"},
    "dropout": None,
    "unscaled": {"mode": "deterministic"},  # without Glorot's coefficient
    "ends-real": {"lr_scale": "glorot", "exclude": ["layers.0", "output"]},  # deterministic, but for first and last
    "binarynet": {"lr_scale": "glorot", "activations": True},
    "xnor": {"scaling": "mean", "activations": True, "exclude": ["layers.0", "output"]},
}


class Perceptron(LightningModule):
    def __init__(self, width: int, *, lr: float, lr_end: float, dropout: float, hardtanh: bool, wide: bool) -> None:
        super().__init__()
        sizes = [28 * 28, width, width, width]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, eps=1e-4) for _ in self.layers)
        self.output, self.output_norm = nn.Linear(width, 10, bias=False), nn.BatchNorm1d(10, eps=1e-4)
        for layer in (*self.layers, self.output) if wide else ():
            nn.init.uniform_(layer.weight, -1, 1)
        self.activation = nn.Hardtanh() if hardtanh else nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.lr, self.lr_end = lr, lr_end

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(self.activation(norm(layer(x))))
        return self.output_norm(self.output(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scores = self(batch[0])
        sides = 2.0 * F.one_hot(batch[1], 10) - 1.0
        return F.relu(1.0 - sides * scores).square().mean()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("error", 100 * (self(batch[0]).argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        factor = (self.lr_end / self.lr) ** (1 / int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def one(method: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    seed_everything(seed, verbose=False)
    settings = METHODS[method]
    module = Perceptron(
        options.width,
        lr=options.lr,
        lr_end=options.lr_end,
        dropout=0.5 if method == "dropout" else 0.0,
        hardtanh=bool(settings and settings.get("activations")),
        wide=options.init == "uniform" or (options.init == "by-mode" and method == "stochastic"),
    )
    data = MNIST(root=options.root, batch_size=100, val_size=0, seed=seed)
    binary = None if settings is None else BinaryWeightsCallback(**settings)
    trainer = Trainer(
        callbacks=[] if binary is None else [binary],
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    row = {"seconds": time.perf_counter() - start}

    with tempfile.TemporaryDirectory() as folder:
        row["bytes"] = save_compressed(module, Path(folder) / "network.lcz").bytes

    def error() -> float:
        return trainer.test(module, datamodule=data, verbose=False)[0]["error"]

    if binary is None:
        return row | {"real": error()}
    row["1-bit"] = error()
    if binary.mode == "deterministic":  # the batch norms are those of signs, which real weights are far from
        return row
    with binary.real_weights(module):
        return row | {"real": error()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-end", type=float, default=3e-6)
    parser.add_argument("--init", choices=["by-mode", "torch", "uniform"], default="by-mode")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--json", type=Path, help="write what was measured here as well")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    console = Console()
    measured: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    for seed in options.seeds:
        for method in options.methods:
            measured[method].append(one(method, seed, options))
            console.print(method, "seed", seed, measured[method][-1])
            if options.json is not None:
                options.json.write_text(json.dumps(measured, indent=1))
    title = f"MNIST, 3 x {options.width}, {options.epochs} epochs, median of seeds {options.seeds}"
    table = Table(
        "weights", "1-bit error %", "real error %", "bytes of the file", "s / epoch", "published, 3 x 1024", title=title
    )
    for method, rows in measured.items():
        median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        table.add_row(
            method,
            f"{median['1-bit']:.2f}" if "1-bit" in median else "",
            f"{median['real']:.2f}" if "real" in median else "",
            f"{median['bytes']:,.0f}",
            f"{median['seconds'] / options.epochs:.1f}",
            PUBLISHED.get(method, ""),
        )
    console.print(table)


if __name__ == "__main__":
    main()
