"""What the distillation benchmarks share: one training, errors on the test images, options."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from mnist_pruning import silence
from rich.console import Console
from torch import Tensor, nn

from lightning_compress import DistillationModule
from lightning_compress.baselines import MNIST, Classifier


def train(
    network: nn.Module,
    data: MNIST,
    *,
    epochs: int,
    lr: float,
    precision: str,
    teacher: nn.Module | list[nn.Module] | None = None,
    temperature: float = 20.0,
    alpha: float = 1.0,
) -> nn.Module:
    """Return `network`, trained on its own or by a teacher."""
    module: LightningModule = Classifier(network, lr=lr, fused=True)
    if teacher is not None:
        module = DistillationModule(
            module, teacher, temperature=temperature, alpha=alpha, teacher_autocast=precision != "32-true"
        )
    trainer = Trainer(
        max_epochs=epochs,
        precision=precision,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return network.eval()


@torch.no_grad()
def scores(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part) for part in images.split(1000)])


def errors(scores_NC: Tensor, labels: Tensor) -> int:
    return int((scores_NC.argmax(1) != labels).sum())


def test_errors(network: nn.Module, data: MNIST) -> int:
    test_part = data.test_dataloader()
    return errors(scores(network, test_part.inputs), test_part.targets)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", default="bf16-mixed", help="of training; errors are counted in float32")
    parser.add_argument("--json", type=Path, help="write what was measured here as well")
    return parser


def measure(
    one_seed: Callable[[int, argparse.Namespace], dict[str, Any]], options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Return a row for each seed, told as it comes."""
    silence()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        start = time.perf_counter()
        rows.append(one_seed(seed, options))
        rows[-1]["seconds"] = round(time.perf_counter() - start)
        console.print("seed", seed, rows[-1])
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1))
    return rows
