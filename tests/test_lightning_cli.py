"""LightningCLI reads the same constructor: from the command line, from YAML, and with its types checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from support.small import SmallModule

from lightning_compress import (
    BinaryWeightsCallback,
    DistillationModule,
    IterativePruningCallback,
    WeightClusteringCallback,
)

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns of arguments beside args=


def parse(*arguments: str) -> IterativePruningCallback:
    cli = LightningCLI(SmallModule, run=False, save_config_callback=None, args=[*QUIET, *arguments])
    (found,) = [one for one in cli.trainer.callbacks if isinstance(one, IterativePruningCallback)]
    return found


def test_the_command_line_makes_the_callback() -> None:
    callback = parse(
        "--trainer.callbacks+=IterativePruningCallback",
        "--trainer.callbacks.amount=0.8",
        "--trainer.callbacks.criterion=taylor",
        "--trainer.callbacks.target=[net.conv, net.hidden]",
        '--trainer.callbacks.stop={"monitor": "val_acc", "max_drop": 0.01}',
    )
    expected = IterativePruningCallback(
        0.8, criterion="taylor", target=["net.conv", "net.hidden"], stop={"monitor": "val_acc", "max_drop": 0.01}
    )
    assert callback.state_key == expected.state_key  # all settings are in it


def test_yaml_makes_the_callback(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: lightning_compress.IterativePruningCallback\n"
        "      init_args: {amount: 0.6, granularity: neuron, end_epoch: 3.5, exclude: net.head}\n"
    )
    expected = IterativePruningCallback(0.6, granularity="neuron", end_epoch=3.5, exclude="net.head")
    assert parse(f"--config={config}").state_key == expected.state_key


def test_yaml_makes_a_wrapper(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model:\n  class_path: lightning_compress.DistillationModule\n"
        "  init_args:\n"
        "    student: {class_path: support.small.SmallModule, init_args: {optimizer: adam}}\n"
        "    teacher: {class_path: support.small.SmallModule}\n"
        "    temperature: {start: 4, end: 2}\n"
        "    hints: [{student: net.conv, teacher: net.conv}]\n"
    )
    cli = LightningCLI(
        LightningModule,
        subclass_mode_model=True,
        run=False,
        save_config_callback=None,
        args=[*QUIET, f"--config={config}"],
    )
    assert isinstance(cli.model, DistillationModule)
    assert isinstance(cli.model, SmallModule)
    assert cli.model.optimizer == "adam"


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [("criterion=size", "size"), ("granularity=layer", "layer"), ("amount=much", "much"), ("amont=0.5", "amont")],
)
def test_wrong_types_and_names_are_rejected(argument: str, quoted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--trainer.callbacks+=IterativePruningCallback", f"--trainer.callbacks.{argument}")
    assert quoted in capsys.readouterr().err


@pytest.mark.parametrize("n_clusters", ["8", '{"net.conv": 16, "*": 4}'])
def test_clusters_are_a_number_or_a_number_per_pattern(n_clusters: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: lightning_compress.WeightClusteringCallback\n"
        f"      init_args: {{n_clusters: {n_clusters}, start_epoch: 2}}\n"
    )
    arguments = [*QUIET, f"--config={config}"]
    cli = LightningCLI(SmallModule, run=False, save_config_callback=None, args=arguments)
    (found,) = [one for one in cli.trainer.callbacks if isinstance(one, WeightClusteringCallback)]
    assert found.state_key == WeightClusteringCallback(json.loads(n_clusters), start_epoch=2.0).state_key


@pytest.mark.parametrize("activations", ["true", "false", '["net.head"]', '"net.*"'])
def test_binary_inputs_are_a_switch_or_patterns(activations: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: lightning_compress.BinaryWeightsCallback\n"
        f"      init_args: {{scaling: mean, clip: null, activations: {activations}}}\n"
    )
    arguments = [*QUIET, f"--config={config}"]
    cli = LightningCLI(SmallModule, run=False, save_config_callback=None, args=arguments)
    (found,) = [one for one in cli.trainer.callbacks if isinstance(one, BinaryWeightsCallback)]
    expected = BinaryWeightsCallback(scaling="mean", clip=None, activations=json.loads(activations))
    assert found.state_key == expected.state_key
