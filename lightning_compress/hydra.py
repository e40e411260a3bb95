"""From a composed config to objects, and to the folder a run writes into."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf

T = TypeVar("T")

CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, inside the run's own


def started() -> str:
    """Return when this command was started, the same in every process that it starts.

    Lightning starts the other ranks by running the command again, a second later: a folder named after their own time
    would be another one.
    """
    return os.environ.setdefault("LIGHTNING_COMPRESS_STARTED", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def run_folder(task: str, ckpt_path: str | None, weights: str | None, compare_root: str) -> str:
    """Return the folder that a command writes into: a new one, or that of what it goes on with.

    Example:
        >>> run_folder("run", "outputs/a/checkpoints/last.ckpt", None, "multirun")
        'outputs/a'
        >>> run_folder("export", None, "outputs/a/compressed.ckpt", "multirun")
        'outputs/a'
        >>> run_folder("compare", None, None, "multirun")
        'multirun'
    """
    if task == "compare":
        return compare_root
    source = ckpt_path if task == "run" else ckpt_path or weights
    if source is None or task == "inspect":
        return f"outputs/{started()}"
    folder = Path(source).parent
    return str(folder.parent if folder.name == CHECKPOINTS else folder)


def register_resolvers() -> None:
    """Make `${lightning_compress.run_folder:...}` and `${lightning_compress.started:}` known to OmegaConf."""
    OmegaConf.register_new_resolver("lightning_compress.run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("lightning_compress.started", started, replace=True)
