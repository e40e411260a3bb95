"""The command `lightning-compress`: Hydra composes a config, and one of five tasks runs with it."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch import distributed

from lightning_compress.coding import load_compressed
from lightning_compress.coding.files import read_compressed
from lightning_compress.coding.weights import load_weights
from lightning_compress.deploy import capture, fold_quantized, save_onnx, save_program
from lightning_compress.hydra import (
    build_datamodule,
    build_each_wrapped,
    build_module,
    build_named,
    build_trainer_factory,
    build_wrapped,
    check_choices,
    check_names,
    refused_choices,
    register_resolvers,
    repeating_command,
    replace_nulls,
    suggestions,
    varied,
)
from lightning_compress.quantization.input_grids import input_grids
from lightning_compress.recorded import check_folder, plain, record, recorded_config, resumed_config, working_where
from lightning_compress.report import (
    comparison_table,
    gather,
    points_table,
    runs_table,
    variants_table,
    write_comparison,
)
from lightning_compress.report.figure import can_draw
from lightning_compress.report.page import can_write_page, write_comparison_page
from lightning_compress.report.renamed import refusal
from lightning_compress.report.write import write_text
from lightning_compress.tasks.dry_run import inspection_tables
from lightning_compress.tasks.inputs import example_inputs, samples
from lightning_compress.tasks.points import COMPRESSED as COMPRESSED_NAME
from lightning_compress.tasks.run import Run, Variant
from lightning_compress.tasks.run_folder import COMPRESSED, CONFIG, SMALL, dense_files, home
from lightning_compress.tasks.testing import accuracy, check_tested, finite
from lightning_compress.tasks.verify import escaped, verify
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.compatibility import check_together

log = logging.getLogger(__name__)

CALIBRATION = 256  # samples that set the ranges of those operations that the quantized network computes in float


def main() -> None:
    """Run the command."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as for `python -m`: model._target_=mine.Module is found in ./mine.py
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated")  # caused by Lightning, at every fit
    register_resolvers()
    own_configs = any(word.startswith(("--config", "-c")) for word in sys.argv[1:])  # with keys of any name
    if refused := refused_choices(sys.argv[1:]) or ("" if own_configs else refusal(sys.argv[1:])):
        raise SystemExit(refused)
    try:
        _main()
    except SystemExit as error:
        if error.code and (hint := refusal(sys.argv[1:]) or suggestions(sys.argv[1:])):
            sys.stderr.write(f"{hint}\n")
        raise
    except OmegaConfBaseException as error:  # Hydra does not handle all of them
        if hint := suggestions(sys.argv[1:]):
            raise SystemExit(hint) from error
        raise


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="config")
def _main(cfg: DictConfig) -> None:
    tasks = {"run": run, "inspect": inspect, "test": evaluate, "compare": compare, "export": export}
    if cfg.task not in tasks:
        raise ValueError(f"task={cfg.task!r} is unknown; expected {', '.join(tasks)}.")
    check_choices(HydraConfig.get().overrides.task)
    replace_nulls(cfg)
    check_names(cfg)
    tasks[cfg.task](cfg)


def run(cfg: DictConfig) -> None:
    """Train or load the dense network, compress it, measure both networks, and write the report."""
    resumed = cfg.ckpt_path is not None
    if resumed:
        check_folder(cfg)
        ckpt_path = str(Path(cfg.ckpt_path).absolute())
        cfg = resumed_config(home(ckpt_path), cfg, HydraConfig.get().overrides.task)
        cfg.ckpt_path = escaped(ckpt_path)
    with working_where(cfg) if resumed else nullcontext():
        _run(cfg, resumed=resumed)


def _run(cfg: DictConfig, *, resumed: bool) -> None:
    if not isinstance(cfg.teachers, int) or cfg.teachers < 1:
        raise ValueError(f"teachers={cfg.teachers!r} is the number of dense networks to train, 1 or more.")
    modules = [_seeded(cfg, "model", cfg.seed + number) for number in range(cfg.teachers)]
    student = None if cfg.student is None else _seeded(cfg, "student", cfg.seed)
    callbacks = build_named(cfg.callbacks)
    command = cfg.get("command") if resumed else repeating_command(HydraConfig.get())
    check_together(modules[0] if student is None else student, list(callbacks.values()))
    job = Run(
        datamodule=build_datamodule(cfg),
        make_trainer=build_trainer_factory(cfg),
        folder=Path(cfg.output_dir),
        seed=cfg.seed,
        metric=cfg.metric,
        val_metric=cfg.val_metric,
        metric_mode=cfg.metric_mode,
        called=cfg.get("called") or COMPRESSED_NAME,
        epochs=cfg.trainer.get("max_epochs") if cfg.trainer.get("enable_progress_bar", True) else None,
        settings=_for_json(plain(cfg, resolve=False)),  # not resolved: a folder's name would differ in every run
        command=command,
        search=plain(cfg.search) if cfg.search else None,
        calibration=plain(cfg.calibration) if cfg.calibration else None,
        **cfg.measure,
        **cfg.file,
    )
    if resumed:
        # The config is written when training starts, so that a run that can't be resumed leaves its folder unchanged.
        callbacks["record"] = LambdaCallback(on_train_start=lambda trainer, module: record(cfg, command))
    else:
        record(cfg, command)
    report = job.run(
        modules,
        student=student,
        callbacks=list(callbacks.values()),
        loggers=list(build_named(cfg.logger).values()),
        wrap=partial(build_wrapped, cfg.wrappers),
        dense=plain(cfg.dense),
        weights=_listed(cfg.weights),
        controls={str(name): _seeded(cfg, f"controls.{name}", cfg.seed) for name in cfg.controls},
        variants={name: _variant(cfg, own) for name, own in varied(cfg).items()},
        ckpt_path=cfg.ckpt_path,
    )
    if report is not None:
        console = Console()
        console.print(comparison_table(report))
        for table in (variants_table(report), points_table(report)):
            if table.row_count:
                console.print(table)
        console.print(f"Written to {cfg.output_dir}", soft_wrap=True)
        if cfg.verify:
            alone = cfg.trainer.get("accelerator") == "cpu" and not distributed.is_initialized()
            found = report.compressed.test_metric
            verified = verify(job.folder / SMALL, metric=cfg.metric, expected=found, exact=alone)
            console.print(verified, soft_wrap=True, highlight=False)


def _variant(cfg: DictConfig, own: DictConfig) -> Variant:
    trainer = plain(own.trainer)
    return Variant(
        callbacks=list(build_named(own.callbacks).values()),
        wrap=partial(build_wrapped, own.wrappers),
        student=None if cfg.student is None else _seeded(cfg, "student", cfg.seed),
        trainer={key: value for key, value in trainer.items() if value != plain(cfg.trainer).get(key)},
    )


def inspect(cfg: DictConfig) -> None:
    """Show the content of the compressed file at `path`, or the parameters that the techniques would change."""
    if cfg.path is not None:
        Console().print(read_compressed(cfg.path).size)
        return
    module, callbacks = _seeded(cfg, _compressed(cfg), cfg.seed), build_named(cfg.callbacks)
    check_together(module, list(callbacks.values()))
    if cfg.weights is not None and cfg.student is None:  # they are the dense network's; a student starts untrained
        load_weights(module, _listed(cfg.weights)[0])
    console = Console()
    wrappers = build_each_wrapped(cfg.wrappers, module)
    for table in inspection_tables(callbacks, module, build_datamodule(cfg), wrappers):
        console.print(table)


def evaluate(cfg: DictConfig) -> None:
    """Test the network in a compressed file or checkpoint at `path` as its run did, on one device.

    Where the command line names a network or data, all settings come from the command line, and no config in the file's
    folder is read: a file from someone else is data, but a config is code.
    """
    if cfg.path is None:
        raise ValueError(f"task=test wants path=<run folder>/{SMALL}.")
    path = Path(cfg.path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"path={cfg.path!r} does not exist (looked for in {Path.cwd()}).")
    if _names_network(HydraConfig.get().overrides.task):
        log.info("The network and its data are those of the command line; no config of %s is read.", home(path))
        found = _tested(cfg, path)
    else:
        recorded = recorded_config(home(path))
        if recorded is None:
            raise FileNotFoundError(
                f"There is no {CONFIG} in {home(path)}, which would say what network {path.name} holds, and what it is "
                f"tested with: task=test wants a file in the folder of a run, or model=... and data=... beside path=."
            )
        with working_where(recorded):
            found = _tested(recorded, path)
    result = ", ".join(f"{name} {value:.4f}" for name, value in found.items()) or "loaded; with metric=null not tested"
    Console().print(f"{cfg.path}: {result}", soft_wrap=True, highlight=False)
    if cfg.json is not None:
        answer = Path(cfg.json)
        answer.parent.mkdir(parents=True, exist_ok=True)
        numbers = {name: finite(name, value, otherwise=f"{answer} has null") for name, value in found.items()}
        write_text(answer, json.dumps(numbers, allow_nan=False))


def compare(cfg: DictConfig) -> None:
    """Write a table, a figure and a page of all reports below `compare.root` into that folder."""
    comparison = gather(cfg.compare.root)
    console = Console()
    console.print(runs_table(comparison, width=console.width))
    paths = write_comparison(comparison, cfg.compare.root, figure=can_draw())
    if can_write_page():
        paths.append(write_comparison_page(comparison, cfg.compare.root))
    console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)


def export(cfg: DictConfig) -> None:
    """Export the network of a checkpoint as model.pt2 and model.onnx, which run without this package.

    Where weights and inputs are quantized, batch norms are folded, and model.onnx computes with integers.
    """
    folder = Path(cfg.output_dir).absolute()
    source = Path(cfg.ckpt_path or cfg.weights or folder / COMPRESSED).absolute()
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: task=export wants weights=<run folder>/{COMPRESSED}.")
    recorded = recorded_config(folder)
    if recorded is not None:
        log.info("The network and its data are those of %s.", folder / CONFIG)
    with nullcontext() if recorded is None else working_where(recorded):
        module, datamodule = _built(cfg if recorded is None else recorded, source)
        datamodule.prepare_data()
        datamodule.setup("fit")
        inputs = example_inputs(module, datamodule, batch_size=2)
        calibration = samples(module, datamodule, batch_size=CALIBRATION) if input_grids(module) else None
    folder.mkdir(parents=True, exist_ok=True)
    fold_quantized(module, inputs)
    program = capture(module, inputs)
    grids = input_grids(module)
    save_program(program, folder / "model.pt2")
    save_onnx(program, folder / "model.onnx", grids=grids, calibration=calibration)
    Console().print(f"Written: {folder / 'model.pt2'}, {folder / 'model.onnx'}", soft_wrap=True)


def _names_network(overrides: Iterable[str]) -> bool:
    """Return whether the command line chooses the network, or the data, of a test."""
    keys = {one.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0] for one in overrides}
    return bool(keys & {"model", "student", "data", "experiment"})


def _tested(cfg: DictConfig, path: Path) -> dict[str, float]:
    """Test the network in a file with a config, and return the metric by its name; nothing with metric=null."""
    module, datamodule = _built(cfg, path)
    if cfg.metric is None:
        return {}
    check_tested(module, cfg.metric)
    seed_everything(cfg.seed, workers=True, verbose=False)
    devices = cfg.trainer.get("devices")
    found = accuracy(
        module,
        datamodule,
        build_trainer_factory(cfg),
        cfg.metric,
        callbacks=[one for one in build_named(cfg.callbacks).values() if isinstance(one, CompressionCallback)],
        devices=devices[:1] if isinstance(devices, ListConfig) else 1,  # one of the run's devices
        num_nodes=1,
        strategy="auto",
    )
    return {cfg.metric: found}


def _built(cfg: DictConfig, path: Path) -> tuple[LightningModule, LightningDataModule]:
    """Return the network of a file, dense or compressed, with its weights, and the data module."""
    if str(path) in dense_files(home(path), cfg.teachers):
        module = build_module(cfg)
    else:
        module = build_wrapped(cfg.wrappers, build_module(cfg, _compressed(cfg)), training=False)
    module.configure_model()  # it may create layers
    load_compressed(path, module)
    return module, build_datamodule(cfg)


def _compressed(cfg: DictConfig) -> str:
    """Return the key of the network to compress in the config."""
    return "model" if cfg.student is None else "student"


def _seeded(cfg: DictConfig, key: str, seed: int) -> LightningModule:
    seed_everything(seed, workers=True, verbose=False)
    return build_module(cfg, key)


def _listed(weights: str | ListConfig | None) -> list[str]:
    if weights is None:
        return []
    return [weights] if isinstance(weights, str) else list(weights)


def _for_json(value: Any) -> Any:
    """Return nested settings in which NaN and infinity, which JSON cannot express, are text."""
    if isinstance(value, dict):
        return {key: _for_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_for_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
