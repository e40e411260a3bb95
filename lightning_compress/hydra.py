"""From a composed config to objects, and to the folder a run writes into."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_compress.tasks.run import dense_files

T = TypeVar("T")

CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, inside the run's own
READING = ("inspect", "test", "compare")  # tasks that make no folder


def started() -> str:
    """Return when this command was started, the same in every process that it starts.

    Lightning starts the other ranks by running the command again, a second later: a folder named after their own time
    would be another one.
    """
    return os.environ.setdefault("LIGHTNING_COMPRESS_STARTED", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def run_folder(task: str, ckpt_path: str | None, weights: str | None, new: str) -> str:
    """Return the folder that a command writes into: that of the run it goes on with, or a new one, or none (".").

    Example:
        >>> run_folder("run", None, "dense.ckpt", "outputs/new")
        'outputs/new'
    """
    if task in READING:
        return "."
    source = {"run": ckpt_path, "export": ckpt_path or weights}.get(task)
    if source is None or not Path(source).is_file():  # the task says so; here it would make that folder
        return new
    return str(home(source))


def home(source: str | Path) -> Path:
    """Return the folder of the run that wrote a file.

    Example:
        >>> home("run/compressed.lcz") == home("run/checkpoints/last.ckpt") == Path("run")
        True
    """
    folder = Path(source).parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def hydra_folder(task: str) -> str | None:
    """Return the folder for what Hydra writes beside a task's own files; None for tasks that only read."""
    return None if task in READING else ".hydra"


def log_handlers(task: str) -> list[str]:
    """Return where a task's log goes; no file for tasks that only read."""
    return ["console"] if task in READING else ["console", "file"]


def register_resolvers() -> None:
    """Make `${lightning_compress.run_folder:...}` and the like known to OmegaConf."""
    for resolver in (run_folder, hydra_folder, log_handlers, started, dense_files):
        OmegaConf.register_new_resolver(f"lightning_compress.{resolver.__name__}", resolver, replace=True)


def build_module(cfg: DictConfig, key: str = "model") -> LightningModule:
    """Return the LightningModule that the config describes below `key`, "model" or "student".

    Raises:
        ValueError: Its `_target_` is, or makes, something else.
    """
    target, group = cfg[key]._target_, "model" if key == "model" else f"model@{key}"
    wrap_it = f"A plain network goes into a Classifier: {group}=classifier {key}.network._target_={target}"
    return _build_checked(cfg[key], LightningModule, key, wrap_it)


def build_datamodule(cfg: DictConfig) -> LightningDataModule:
    """Return the LightningDataModule that `cfg.data` describes.

    Raises:
        ValueError: Its `_target_` is, or makes, something else.
    """
    choices = "Put the data into one, or choose data=digits, mnist, fashion_mnist or cifar10"
    return _build_checked(cfg.data, LightningDataModule, "data", choices)


def build_named(nodes: DictConfig | None) -> dict[str, Any]:
    """Return the objects of a dict of `_target_`s by name, in its order; entries that are null are left out."""
    return {str(name): _build(node) for name, node in (nodes or {}).items() if node is not None}


def build_wrapped(nodes: DictConfig | None, module: LightningModule, *, training: bool = True) -> LightningModule:
    """Return the module inside its wrappers: each `_target_` gets what the one before made, the first the module.

    Args:
        nodes: The wrappers by name, the innermost first.
        module: What they wrap.
        training: Whether it is to be trained; else wrappers whose class says `only_trains = True` are left out.

    Raises:
        ValueError: A wrapper is, or makes, something else than a LightningModule.
    """
    advice = "What changes the weights is a callback: put it below callbacks"
    for name, node in (nodes or {}).items():
        if not training and getattr(get_object(node._target_), "only_trains", False):
            continue
        module = _build_checked(node, LightningModule, f"wrappers.{name!s}", advice, module)
    return module


def build_trainer_factory(cfg: DictConfig) -> Callable[..., Trainer]:
    """Return `cfg.trainer` as a function that takes further arguments."""
    factory: Callable[..., Trainer] = instantiate(cfg.trainer, _partial_=True, _convert_="all")
    return factory


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse a technique that is chosen twice, which Hydra would merge into one.

    Args:
        overrides: The command line, as Hydra keeps it.

    Raises:
        ValueError: `compress` lists a technique twice.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        chosen = override.value()
        if override.key_or_group == "compress" and isinstance(chosen, list) and len(set(chosen)) < len(chosen):
            raise ValueError(
                f"{override.input_line} chooses a technique twice, and there would be one of it: say it once."
            )


def _build(node: DictConfig, *args: Any) -> Any:
    return instantiate(node, *args, _convert_="all")  # plain containers, for checkpoints can't hold OmegaConf's


def _build_checked(node: DictConfig, kind: type[T], key: str, advice: str, *args: Any) -> T:
    target = get_object(node._target_)
    made = None if isinstance(target, type) and not issubclass(target, kind) else _build(node, *args)
    if not isinstance(made, kind):
        found = target if made is None else type(made)
        raise ValueError(
            f"{key}._target_={node._target_!r} is no {kind.__name__} of `lightning.pytorch`, but "
            f"{found.__module__}.{found.__qualname__}. {advice}."
        )
    return made
