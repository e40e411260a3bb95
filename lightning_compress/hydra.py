"""From a composed config to objects, and to the folder into which a run writes."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_compress.report.renamed import KEYS, TARGETS
from lightning_compress.report.tables import flatten
from lightning_compress.tasks.run_folder import dense_files, home

T = TypeVar("T")

MAY_BE_EMPTY = ("callbacks", "wrappers", "controls", "variants", "logger", "dense")  # sections of the config
GROUPS = ("model", "data", "trainer")
EMPTY_GROUPS = ("compress", "logger")  # with an option that is called none
NEEDED = ("val_metric", "measure", "file", "compare", "compare.root", "file.coder", "seed", "output_dir")
READING = ("inspect", "test", "compare")  # tasks that make no folder


def started() -> str:
    """Return the time at which this command was started, the same in all processes that it starts.

    Lightning starts the other ranks by running the command again, a second later. A folder that is named after the time
    of such a process would differ from the folder of rank 0.
    """
    return os.environ.setdefault("LIGHTNING_COMPRESS_STARTED", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def run_folder(task: str, ckpt_path: str | None, weights: str | None, new: str) -> str:
    """Return the folder into which a command writes: that of the run it resumes or exports, or a new one.

    Tasks that only read get ".".

    Example:
        >>> run_folder("run", None, "dense.ckpt", "outputs/new")
        'outputs/new'
    """
    if task in READING:
        return "."
    source = {"run": ckpt_path, "export": ckpt_path or weights}.get(task)
    if source is None or not Path(source).is_file():  # the task reports it; the home of such a file would be created
        return new
    return str(home(source))


def hydra_folder(task: str, ckpt_path: str | None = None, weights: str | None = None) -> str | None:
    """Return the folder for Hydra's own files; None for tasks that only read, and for a run that is resumed."""
    return None if task in READING or run_folder(task, ckpt_path, weights, "") else ".hydra"


def log_handlers(task: str) -> list[str]:
    """Return the names of a task's log handlers; tasks that only read write no log file."""
    return ["console"] if task in READING else ["console", "file"]


def log_file(task: str, *, _root_: DictConfig) -> str:
    """Return the path of a task's log file.

    Raises:
        ValueError: The folder's name looks like an interpolation to Hydra, which would use another folder or none.
    """
    runtime: Any = OmegaConf.to_container(_root_.hydra.runtime, resolve=False)
    folder = str(runtime["output_dir"])
    if "${" in folder and task not in READING:
        raise ValueError(
            f"The folder {folder} can't be written into: Hydra takes the ${{ in its name for an interpolation. Rename "
            f"it, or choose another one with hydra.run.dir=."
        )
    return str(Path(folder) / f"{_root_.hydra.job.name}.log")


def total(*numbers: float) -> float:
    """Return the sum of numbers, such as the epochs of two fits.

    Example:
        >>> total(8, 4)
        12
    """
    return sum(numbers)


def register_resolvers() -> None:
    """Register `${lightning_compress.run_folder:...}` and the other resolvers of the configs with OmegaConf."""
    for resolver in (run_folder, hydra_folder, log_handlers, log_file, started, dense_files, total):
        OmegaConf.register_new_resolver(f"lightning_compress.{resolver.__name__}", resolver, replace=True)


def build_module(cfg: DictConfig, key: str = "model") -> LightningModule:
    """Return the LightningModule that the config describes below `key`, such as "model" or "controls.narrow".

    Raises:
        ValueError: The `_target_` is, or returns, something else.
    """
    node: Any = OmegaConf.select(cfg, key)
    target, group = node._target_, "model" if key == "model" else f"model@{key}"
    wrap_it = f"A plain network goes into a Classifier: {group}=classifier {key}.network._target_={target}"
    return _build_checked(node, LightningModule, key, wrap_it)


def build_datamodule(cfg: DictConfig) -> LightningDataModule:
    """Return the LightningDataModule that `cfg.data` describes.

    Raises:
        ValueError: The `_target_` is, or returns, something else.
    """
    choices = "Put the data into one, or choose data=digits, mnist, fashion_mnist or cifar10"
    return _build_checked(cfg.data, LightningDataModule, "data", choices)


def build_named(nodes: DictConfig | None) -> dict[str, Any]:
    """Make an object for every entry of a dict of `_target_`s; entries that are null are left out."""
    return {str(name): _build(node) for name, node in (nodes or {}).items() if node is not None}


def build_wrapped(nodes: DictConfig | None, module: LightningModule, *, training: bool = True) -> LightningModule:
    """Put a module inside its wrappers.

    Args:
        nodes: The configs of the wrappers by name, the innermost first.
        module: The module for the innermost wrapper.
        training: Whether the module is going to be trained. If not, wrappers whose class has `only_trains = True` are
            left out.

    Raises:
        ValueError: A wrapper's `_target_` is, or returns, something else than a LightningModule.
    """
    advice = "What changes the weights is a callback: put it below callbacks"
    for name, node in (nodes or {}).items():
        if not training and getattr(get_object(node._target_), "only_trains", False):
            continue
        module = _build_checked(node, LightningModule, f"wrappers.{name!s}", advice, module)
    return module


def build_each_wrapped(nodes: DictConfig | None, module: LightningModule) -> dict[str, LightningModule]:
    """Put a copy of an untrained module inside each of the wrappers alone, by name.

    The copy stays as it is where the wrapper needs files that a training writes (`only_trains = True`).
    """
    found = {}
    for name, node in (nodes or {}).items():
        only = OmegaConf.create({name: node})
        only._set_parent(nodes)  # for interpolations
        found[str(name)] = build_wrapped(only, copy.deepcopy(module), training=False)
    return found


def varied(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the config of every variant by name: the run's own, with what `cfg.variants` says differently.

    An interpolation in a variant's trainer stands for a value of the run's own.

    Raises:
        ValueError: A variant differs in something else than callbacks, wrappers and trainer, or names one of these that
            the run does not have.
    """
    found = {}
    for name, node in (cfg.get("variants") or {}).items():
        if node is None:
            continue
        if others := sorted({str(key) for key in node} - {"callbacks", "wrappers", "trainer"}):
            raise ValueError(
                f"variants.{name}.{others[0]}: a variant may differ in callbacks, wrappers and trainer alone, so that "
                f"it begins with the same network, data and seed."
            )
        own = copy.deepcopy(cfg)
        OmegaConf.set_struct(own, False)
        own.merge_with(node)
        if node.get("trainer"):
            own.merge_with({"trainer": OmegaConf.to_container(node.trainer, resolve=True)})
        for section in ("callbacks", "wrappers"):
            for key, one in (own.get(section) or {}).items():
                if one is not None and "_target_" not in one:
                    raise ValueError(
                        f"variants.{name}.{section}.{key}: the run has no {key} there whose settings could differ, but "
                        f"{', '.join(map(str, cfg.get(section) or ())) or 'none'}. Name one of them, or give {key} a "
                        f"_target_."
                    )
        replace_nulls(own)
        found[str(name)] = own
    return found


def build_trainer_factory(cfg: DictConfig) -> Callable[..., Trainer]:
    """Return a function that makes the Trainer of `cfg.trainer`; its keyword arguments replace configured ones."""
    factory: Callable[..., Trainer] = instantiate(cfg.trainer, _partial_=True, _convert_="all")
    return factory


def check_names(cfg: DictConfig) -> None:
    """Refuse earlier names of keys, and replace earlier names of functions by the current ones.

    Raises:
        ValueError: The config, such as a user's experiment, sets a technique under an earlier name of its key.
    """
    for old, new in KEYS.items():
        section, _, key = old.rpartition(".")
        nodes = OmegaConf.select(cfg, section)
        if nodes is not None and key in nodes and "_target_" not in (nodes[key] or ()):
            raise ValueError(f"{old} is called {new} now.")
    for key, value in flatten(OmegaConf.to_container(cfg, resolve=False)).items():  # type: ignore[arg-type]
        if key.endswith("_target_") and value in TARGETS:
            OmegaConf.update(cfg, key, TARGETS[value])


def replace_nulls(cfg: DictConfig) -> None:
    """Replace null by an empty section where a section may be empty, and leave out wrappers and controls that are null.

    Raises:
        ValueError: A key that every command needs is null.
    """
    for key in MAY_BE_EMPTY:
        if cfg.get(key) is None:
            OmegaConf.update(cfg, key, {}, force_add=True)
    for key in ("wrappers", "controls"):
        for name in [name for name, node in cfg.get(key, {}).items() if node is None]:
            with open_dict(cfg):
                del cfg[key][name]
    for key in NEEDED:
        section, _, name = key.rpartition(".")
        nodes = OmegaConf.select(cfg, section) if section else cfg
        if nodes is not None and name in nodes and nodes[name] is None:
            raise ValueError(f"{key}=null, but a command needs a value for {key}: leave this out for the default.")


def repeating_command(hydra: Any) -> str:
    """Return the command line that repeats a run, as a shell reads it, without the folder into which the run wrote.

    Args:
        hydra: Hydra's own config. In a sweep, its overrides are those of one job.
    """
    where = [one.path for one in hydra.runtime.config_sources if one.provider == "command-line"]
    words = [f"--config-dir={path}" for path in where]
    if hydra.job.config_name != "config":
        words.append(f"--config-name={hydra.job.config_name}")
    words += [one for one in hydra.overrides.hydra if one.startswith("hydra.searchpath")]
    words += [one for one in hydra.overrides.task if not one.startswith(("output_dir=", "ckpt_path="))]
    return shlex.join(["lightning-compress", *words])


def refused_choices(command_line: Sequence[str]) -> str:
    """Return a line for every option of a command line that is null, which Hydra refuses without its name.

    Example:
        >>> refused_choices(["logger=null", "search=null"])
        'logger=null chooses nothing: leave it out, or take logger=none.'
    """
    chosen = [key for key in (*GROUPS, *EMPTY_GROUPS, "experiment", "hydra") if f"{key}=null" in command_line]
    others = {key: f", or take {key}=none" for key in EMPTY_GROUPS}
    return "\n".join(f"{key}=null chooses nothing: leave it out{others.get(key, '')}." for key in chosen)


def suggestions(command_line: Sequence[str]) -> str:
    """Return hints about a command line that failed, or an empty string.

    The hints name misspelt keys, with the most similar known ones, and files in folders whose names look like
    interpolations.
    """
    words = [word for word in command_line if "=" in word and not word.startswith("-")]
    for word in words:
        key, _, path = word.partition("=")
        if "${" in path and Path(path.strip("'\"")).exists():
            return f"Hydra takes the ${{ in {key}={path} for an interpolation: rename the folder."
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return ""
    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        groups = GlobalHydra.instance().config_loader().get_group_options("", results_filter=ObjectType.GROUP)
        chosen = [word for word, override in zip(words, overrides, strict=True) if override.key_or_group in groups]
        try:
            known = {*groups, *_dotted(OmegaConf.to_container(compose("config", chosen), resolve=False))}
        except HydraException:
            return ""  # an option does not exist, and Hydra's own error lists the existing ones
    found = []
    for override in overrides:
        key = override.key_or_group
        if override.is_add() or override.package is not None or key.split(".")[0] == "hydra":
            continue
        if key not in known and (near := get_close_matches(key, known, n=1, cutoff=0.75)):
            found.append(f"{key} is no key. Did you mean {near[0]}?")
    return "\n".join(found)


def _dotted(value: Any, prefix: str = "") -> Iterator[str]:
    for key, one in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted(one, f"{prefix}{key}.")


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse a technique that is chosen twice, because Hydra would merge both choices into one technique.

    Args:
        overrides: The command line, as Hydra stores it.

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
    return instantiate(node, *args, _convert_="all")  # plain containers: checkpoints can't contain OmegaConf's


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
