"""From a composed config to objects, and to the folder a run writes into."""

from __future__ import annotations

import os
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
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from lightning_compress.report.renamed import KEYS, TARGETS, translated
from lightning_compress.report.tables import flatten
from lightning_compress.tasks.run import dense_files
from lightning_compress.tasks.verify import escaped
from lightning_compress.trainer.callback import CompressionCallback

T = TypeVar("T")

CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints, inside the run's own
CONFIG = "config.yaml"  # in a run's folder: what was composed, resolved
READING = ("inspect", "test", "compare")  # tasks that make no folder
CHANGEABLE = ("trainer", "logger", "measure", "file", "verify")  # on the way of a run: not what network comes of it
OF_THE_COMMAND = ("task", "ckpt_path", "output_dir", "json", "path", "hydra")


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


def hydra_folder(task: str, ckpt_path: str | None = None, weights: str | None = None) -> str | None:
    """Return the folder for what Hydra writes beside a task's own files; None where a run is read, or goes on."""
    return None if task in READING or run_folder(task, ckpt_path, weights, "") else ".hydra"


def log_handlers(task: str) -> list[str]:
    """Return where a task's log goes; no file for tasks that only read."""
    return ["console"] if task in READING else ["console", "file"]


def log_file(task: str, *, _root_: DictConfig) -> str:
    """Return where the log of a task goes that writes into a folder.

    Raises:
        ValueError: Hydra would take the folder's name for an interpolation, and write into another folder or none.
    """
    runtime: Any = OmegaConf.to_container(_root_.hydra.runtime, resolve=False)
    folder = str(runtime["output_dir"])
    if "${" in folder and task not in READING:
        raise ValueError(
            f"The folder {folder} can't be written into: Hydra takes the ${{ in its name for an interpolation. Rename "
            f"it, or choose another one with hydra.run.dir=."
        )
    return str(Path(folder) / f"{_root_.hydra.job.name}.log")


def register_resolvers() -> None:
    """Make `${lightning_compress.run_folder:...}` and the like known to OmegaConf."""
    for resolver in (run_folder, hydra_folder, log_handlers, log_file, started, dense_files):
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


def resumed_config(folder: Path, composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config with which an interrupted run goes on: its own, and what may be changed on the way.

    Args:
        folder: The run's folder; its config is in config.yaml.
        composed: What Hydra composed for this command.
        overrides: The command line, as Hydra keeps it. What it says of the keys in `CHANGEABLE` holds from now on.

    Raises:
        FileNotFoundError: There is no config.yaml.
        ValueError: The command line wants another value of any other key than the run has.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"There is no {CONFIG} in {folder}, which would say what run to go on with.")
    # Everything is resolved there, so that a ${...} is text; the folder may have moved since.
    own = [key for key in KEYS if OmegaConf.select(composed, key) is not None]
    content = recorded_settings(folder, keep=own)
    cwd = {"cwd": content.get("cwd", "."), "output_dir": "${hydra:runtime.output_dir}"}
    recorded: DictConfig = OmegaConf.create(_replanted(content, content["output_dir"]) | cwd)
    before, wanted = _flat(recorded), _flat(composed)
    refused = _dropped(overrides, recorded, composed)
    changes: dict[str, str] = {}
    kept: set[str] = set()
    for section, single in _sections(overrides, composed).items():
        keys = [key for key in before.keys() | wanted.keys() if key == section or key.startswith(f"{section}.")]
        # An option says nothing of what it leaves open, where the run may have a setting of its own.
        said = [key for key in keys if single or wanted.get(key) is not None]
        changed = sorted(key for key in said if before.get(key) != wanted.get(key))
        kept |= {".".join(key.split(".")[:2]) for key in keys if key not in said and before.get(key) is not None}
        if section.split(".")[0] in CHANGEABLE:
            changes |= {key: f"{key} is {wanted.get(key)} from now on; it was {before.get(key)}." for key in changed}
            for key in [section] * bool(changed) if single else changed:
                OmegaConf.update(recorded, key, OmegaConf.select(composed, key), merge=False, force_add=True)
        else:
            refused += [f"  {key}={wanted.get(key)}, where the run has {before.get(key)}" for key in changed]
    if refused:
        raise ValueError(
            f"The run in {folder} goes on with its own config. The command line says otherwise:\n"
            + "\n".join(refused)
            + f"\nLeave that out, or start a new run. What may change are {', '.join(CHANGEABLE)}."
        )
    for line in changes.values():
        rank_zero_info(line)
    if kept:
        rank_zero_info(f"The run keeps {', '.join(sorted(kept))}, which the command line does not name.")
    return recorded


def recorded_settings(folder: Path, *, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return the config that a run left in its folder, under the names of today, but for the keys to `keep`."""
    content = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=False)
    assert isinstance(content, dict)
    settings: dict[str, Any] = translated(content, keep=keep)
    return settings


def check_names(cfg: DictConfig) -> None:
    """Refuse keys that have another name now, and put the functions that were moved in the place of their old names.

    Raises:
        ValueError: A technique is set by an earlier name of its key, in an experiment of the user's, say.
    """
    for old, new in KEYS.items():
        section, _, key = old.rpartition(".")
        nodes = OmegaConf.select(cfg, section)
        if nodes is not None and key in nodes and "_target_" not in (nodes[key] or ()):
            raise ValueError(f"{old} is called {new} now.")
    for key, value in flatten(OmegaConf.to_container(cfg, resolve=False)).items():  # type: ignore[arg-type]
        if key.endswith("_target_") and value in TARGETS:
            OmegaConf.update(cfg, key, TARGETS[value])


def _dropped(overrides: Sequence[str], recorded: DictConfig, composed: DictConfig) -> list[str]:
    """Return a line where a command line chooses techniques, and the run has others besides."""
    others = [one for one in _techniques(recorded) if one not in _techniques(composed)]
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    lines = [str(one.input_line) for one in parsed if one.key_or_group in ("compress", "experiment")]
    return [f"  {' '.join(lines)}, where the run has {', '.join(others)}"] if lines and others else []


def _techniques(cfg: DictConfig) -> list[str]:
    """Return the keys of the callbacks that compress, and of all wrappers."""
    callbacks = {f"callbacks.{name}": node for name, node in (cfg.get("callbacks") or {}).items()}
    wrappers = {f"wrappers.{name}": node for name, node in (cfg.get("wrappers") or {}).items()}
    found = []
    for key, node in (callbacks | wrappers).items():
        target = None if node is None else get_object(node._target_)
        compresses = isinstance(target, type) and issubclass(target, CompressionCallback)
        if target is not None and (compresses or key in wrappers):
            found.append(key)
    return found


def _replanted(value: Any, folder: str) -> Any:
    """Return settings in which a run's folder is `${output_dir}` again, and other text is kept from interpolation."""
    if isinstance(value, dict):
        return {key: _replanted(one, folder) for key, one in value.items()}
    if isinstance(value, list):
        return [_replanted(one, folder) for one in value]
    if not isinstance(value, str):
        return value
    if value == folder or value.startswith(f"{folder}{os.sep}"):
        return "${output_dir}" + escaped(value[len(folder) :])
    return escaped(value)


def _sections(overrides: Sequence[str], composed: DictConfig) -> dict[str, bool]:
    """Return the dotted names of what a command line sets; False for what an option brings along."""
    sections: dict[str, bool] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        if name == "experiment":
            names = [str(key) for key in composed]
        elif name == "compress":
            names = ["callbacks", "wrappers"]
        else:
            names = [override.package or name]
        single = not isinstance(OmegaConf.select(composed, name), DictConfig) and name not in ("experiment", "compress")
        single = single or name == "logger"  # loggers that are chosen take the place of those that the run had
        sections |= {one: single for one in names if one.split(".")[0] not in OF_THE_COMMAND}
    return sections


def _flat(cfg: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return flatten({str(key): value for key, value in container.items()})


def suggestions(command_line: Sequence[str]) -> str:
    """Return what may be wrong with a command line that failed, or nothing.

    These are keys that are misspelt, with the nearest ones, and files in folders whose names are interpolations.
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
            return ""  # an option does not exist, and Hydra has listed those that do
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
