"""The config in a run's folder: written when the run starts, and read to resume, test or export the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_compress.core.files import replacing
from lightning_compress.report.renamed import KEYS, translated
from lightning_compress.report.tables import flatten
from lightning_compress.tasks.run_folder import CONFIG, home
from lightning_compress.tasks.verify import escaped
from lightning_compress.trainer.callback import CompressionCallback

log = logging.getLogger(__name__)

# Sections that may change when a run is resumed: the compressed network does not depend on them.
CHANGEABLE = ("trainer", "logger", "measure", "file", "verify")
OF_THE_COMMAND = ("task", "ckpt_path", "output_dir", "json", "path", "hydra")  # keys that describe no run


@rank_zero_only
def record(cfg: DictConfig, command: str | None = None) -> None:
    """Write the resolved config into the run's folder, with the command line that repeats the run."""
    recorded = plain(cfg) | {"cwd": escaped(os.getcwd()), "ckpt_path": None}
    recorded |= {} if command is None else {"command": escaped(command)}
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # Hydra makes hydra.run.dir, and output_dir may differ
    with replacing(folder / CONFIG) as temporary:
        OmegaConf.save(OmegaConf.create(recorded), temporary)


def recorded_settings(folder: Path, *, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return the config in a run's folder under the current names; the dotted keys in `keep` are not renamed."""
    content = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=False)
    assert isinstance(content, dict)
    settings: dict[str, Any] = translated(content, keep=keep)
    return settings


def recorded_config(folder: Path) -> DictConfig | None:
    """Return the config in a run's folder, or None; a message says that such a config is code."""
    if not (folder / CONFIG).is_file():
        return None
    recorded = OmegaConf.create(recorded_settings(folder))
    log.info("A run folder is code: what %s names as _target_ is called, so it must come from you.", folder / CONFIG)
    return recorded


@contextmanager
def working_where(recorded: DictConfig) -> Iterator[None]:
    """Work temporarily in the folder in which a run worked, so that relative paths of its config are found."""
    before = Path.cwd()
    there = recorded.get("cwd", ".")  # earlier versions did not record the folder
    if Path(there).is_dir():
        os.chdir(there)
    else:
        log.warning("The run worked in %s, which is not there: its relative paths begin in %s.", there, before)
    try:
        yield
    finally:
        os.chdir(before)


def check_folder(cfg: DictConfig) -> None:
    """Refuse a checkpoint that does not exist, and one that is not in the folder that the command names."""
    if not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={cfg.ckpt_path!r} does not exist (looked for in {Path.cwd()}).")
    folder = home(cfg.ckpt_path)
    if folder.resolve() != Path(cfg.output_dir).resolve():
        raise ValueError(
            f"ckpt_path={cfg.ckpt_path!r} goes on in its own folder, {folder}, but this run was given "
            f"{cfg.output_dir}: leave out hydra.run.dir, output_dir and -m."
        )


def resumed_config(folder: Path, composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the config with which an interrupted run is resumed: its own, with the allowed changes.

    Args:
        folder: The run's folder, with its config.yaml.
        composed: The config that Hydra composed for this command.
        overrides: The command line, as Hydra stores it. It may set other values for the sections in `CHANGEABLE`.

    Raises:
        FileNotFoundError: The folder has no config.yaml.
        ValueError: The command line sets another value than the run has, for a key of another section.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"There is no {CONFIG} in {folder}, which would say what run to go on with.")
    # The recorded config is resolved, so a ${...} in it is text. The folder may have moved since it was written.
    own = [key for key in KEYS if OmegaConf.select(composed, key) is not None]
    content = recorded_settings(folder, keep=own)
    cwd = {"cwd": content.get("cwd", "."), "output_dir": "${hydra:runtime.output_dir}"}
    recorded: DictConfig = OmegaConf.create(_replanted(content, content["output_dir"]) | cwd)
    before, wanted = flatten(plain(recorded)), flatten(plain(composed))
    refused = _dropped(overrides, recorded, composed)
    changes: dict[str, str] = {}
    kept: set[str] = set()
    for section, single in _sections(overrides, composed).items():
        keys = [key for key in before.keys() | wanted.keys() if key == section or key.startswith(f"{section}.")]
        # An option of a group that leaves a key at null does not set it: the run may have a value of its own.
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
    for name in [str(key) for key in composed if key not in recorded]:  # the version that began the run lacked them
        OmegaConf.update(recorded, name, OmegaConf.select(composed, name), force_add=True)
    for line in changes.values():
        rank_zero_info(line)
    if kept:
        rank_zero_info(f"The run keeps {', '.join(sorted(kept))}, which the command line does not name.")
    return recorded


def _dropped(overrides: Sequence[str], recorded: DictConfig, composed: DictConfig) -> list[str]:
    """Return a line for the error where a command line chooses techniques, and the run has others as well."""
    others = [one for one in _techniques(recorded) if one not in _techniques(composed)]
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    lines = [str(one.input_line) for one in parsed if one.key_or_group in ("compress", "experiment")]
    return [f"  {' '.join(lines)}, where the run has {', '.join(others)}"] if lines and others else []


def _techniques(cfg: DictConfig) -> list[str]:
    """Return the dotted keys of the callbacks that are techniques, and of all wrappers."""
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
    """Replace the folder of a run in its settings by `${output_dir}`, and escape all other text."""
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
    """Return the dotted names of the sections and keys that a command line sets.

    The value is True where the command line sets the whole of it, and False where an option sets some of its keys.
    """
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
        single = single or name == "logger"  # chosen loggers replace those of the run
        sections |= {one: single for one in names if one.split(".")[0] not in OF_THE_COMMAND}
    return sections


def plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """Return a config as nested plain dicts and lists."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
