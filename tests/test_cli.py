"""The command from its first word to its files, in one process; ranks and sweeps in processes of their own."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lightning_compress import cli
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.coding import load_compressed
from lightning_compress.coding.files import read_compressed
from lightning_compress.report import Report
from lightning_compress.report.page import can_write_page
from lightning_compress.slimmable.network import SlimmableNetwork

TESTS = Path(__file__).parent
SMALL = ["model.network.width=8", "dense.max_epochs=2", "trainer.max_epochs=3", "trainer.enable_progress_bar=false"]
RUN_FILES = {
    "report.json",
    "report.md",
    "report.png",
    "compressed.ckpt",
    "compressed.lcz",
    "config.yaml",
    "dense.ckpt",
    *(["report.html"] if can_write_page() else []),
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs `lightning-compress` in an empty folder, and puts back what it sets for the whole process."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lightning-compress", *overrides])
        cli.main()

    yield run
    root.handlers[:], root.level = handlers, level
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shown = process("hydra.run.dir=" + str(folder), *SMALL, "verify=true", cwd=folder.parent)
    (folder.parent / "shown.txt").write_text(shown)
    return folder


def process(*overrides: str, cwd: Path, module: str = "lightning_compress.cli") -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", module, *overrides]
    done = subprocess.run(command, env=environment, cwd=cwd, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def found(run: Callable[..., None], path: Path) -> float:
    run("task=test", f"path={path}", "json=found/number.json")
    number: float = json.loads(Path("found/number.json").read_text())["test_acc"]
    return number


def failure(run: Callable[..., None], capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*overrides)
    assert exit_.value.code == 1
    return capsys.readouterr().err


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".log"}


# ---------------------------------------------------------------------------------------------------- task=run


def test_a_run_writes_its_files_and_nothing_half_done(finished: Path) -> None:
    assert files(finished) == RUN_FILES
    assert files(finished / "checkpoints") == {"last.ckpt"}


def test_a_folder_for_the_output_is_made(command: Callable[..., None]) -> None:
    short = [one for one in SMALL if "max_epochs" not in one]
    command("output_dir=new/folder", "dense.max_epochs=1", "trainer.max_epochs=1", *short)
    assert {"config.yaml", "report.json", "compressed.lcz"} <= files(Path("new/folder"))


def test_the_report_tells_of_both_networks(finished: Path) -> None:
    content = json.loads((finished / "report.json").read_text())
    for network in ("dense", "compressed"):
        assert {
            "test_metric",
            "parameters",
            "nonzero_parameters",
            "macs",
            "file_bytes",
            "latency_ms",
        } <= content[network].keys()
    dense, compressed = content["dense"], content["compressed"]
    assert dense["parameters"] == compressed["parameters"] == dense["nonzero_parameters"]
    assert compressed["file_bytes"] == (finished / "compressed.lcz").stat().st_size < dense["file_bytes"] / 4
    assert 0 < content["before_recovery"]["test_metric"] < 1
    assert [epoch["phase"] for epoch in content["history"]] == ["dense", "dense", "compression", "recovery", "recovery"]
    assert content["history"][-1]["numbers"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert content["settings"]["callbacks"]["iterative_pruning"]["amount"] == 0.9


def test_the_compressed_checkpoint_is_the_network_of_the_report(finished: Path) -> None:
    report = Report.load(finished / "report.json")
    network = DigitsConvNet(width=8)
    module = Classifier.load_from_checkpoint(finished / "compressed.ckpt", network=network)
    nonzero = sum(int(parameter.count_nonzero()) for parameter in module.parameters())
    assert nonzero == report.compressed.nonzero_parameters
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.9 * total)
    loaded = load_compressed(finished / "compressed.lcz")
    assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items())


def test_a_run_ends_by_testing_its_file_in_a_new_process(finished: Path) -> None:
    report, size = Report.load(finished / "report.json"), (finished / "compressed.lcz").stat().st_size
    *_, last = (finished.parent / "shown.txt").read_text().splitlines()
    accuracy = f"test_acc {report.compressed.test_metric:.4f}, the same"
    assert last == f"compressed.lcz, {size:,} bytes, loaded in a new process: {accuracy}"


def test_the_composed_config_is_resolved(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["callbacks"]["checkpoint"]["dirpath"] == str(finished / "checkpoints")
    assert config["model"]["network"]["width"] == 8


def test_the_same_seed_gives_the_same_run_and_weights_stand_for_the_dense_training(
    finished: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(*SMALL, f"weights={finished / 'dense.ckpt'}", "hydra.run.dir=again")
    assert Path("again/compressed.lcz").read_bytes() == (finished / "compressed.lcz").read_bytes()
    first, again = Report.load(finished / "report.json"), Report.load("again/report.json")
    assert again.dense.test_metric == first.dense.test_metric
    assert again.before_recovery == first.before_recovery
    assert {epoch.phase for epoch in again.history} == {"compression", "recovery"}
    assert "test_acc" in capsys.readouterr().out


def test_without_a_technique_the_run_is_the_control(finished: Path, command: Callable[..., None]) -> None:
    command(*SMALL, "compress=none", f"weights={finished / 'dense.ckpt'}", "hydra.run.dir=control", "logger=none")
    report = Report.load("control/report.json")
    assert report.before_recovery is None
    assert report.compressed.nonzero_parameters == report.dense.parameters
    assert not Path("control/csv").exists()


def test_a_resumed_run_ends_in_its_own_folder_like_the_uninterrupted_one(
    finished: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(*SMALL, "hydra.run.dir=cut", "+callbacks.cut={_target_:support.pieces.StopAtEpoch,epoch:2}")
    assert files(Path("cut")) == {"dense.ckpt", "config.yaml"}
    command(*SMALL, "ckpt_path=cut/checkpoints/last.ckpt")
    assert files(Path("cut")) == RUN_FILES
    assert Path("cut/compressed.lcz").read_bytes() == (finished / "compressed.lcz").read_bytes()
    whole, resumed = Report.load(finished / "report.json"), Report.load("cut/report.json")
    assert resumed.history == whole.history
    cut = "+callbacks.cut={_target_:support.pieces.StopAtEpoch,epoch:2}"
    assert resumed.command == shlex.join(["lightning-compress", *SMALL, cut])  # of the run that was resumed
    assert resumed.before_recovery == whole.before_recovery
    assert resumed.dense.test_metric == whole.dense.test_metric
    assert not Path("outputs").exists()


def test_a_run_goes_on_with_its_own_config_and_refuses_another(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["compress=weight_clustering", "callbacks.weight_clustering.start_epoch=1", "file.half=true"]
    cut = "+callbacks.cut={_target_:support.pieces.StopAtEpoch,epoch:2}"
    with pytest.raises(SystemExit):
        command(*SMALL, *settings, "hydra.run.dir=run", cut)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    checkpoint = "ckpt_path=run/checkpoints/last.ckpt"
    error = failure(command, capsys, checkpoint, "compress=iterative_pruning", "seed=3")
    assert "callbacks.iterative_pruning.amount=0.9, where the run has None" in error
    assert "compress=iterative_pruning, where the run has callbacks.weight_clustering" in error
    assert "callbacks.weight_clustering." not in error
    assert "seed=3, where the run has 0" in error
    error = failure(command, capsys, checkpoint, "compress=none")
    assert "compress=none, where the run has callbacks.weight_clustering" in error
    assert "callbacks.checkpoint" not in error
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert after == before, "what is refused leaves the folder as it was"

    Path("run").rename("moved")
    command("ckpt_path=moved/checkpoints/last.ckpt", "trainer.max_epochs=4", "trainer.log_every_n_steps=7")
    recorded = yaml.safe_load(Path("moved/config.yaml").read_text())
    assert "weight_clustering" in recorded["callbacks"]
    assert "iterative_pruning" not in recorded["callbacks"]
    assert (recorded["trainer"]["max_epochs"], recorded["trainer"]["log_every_n_steps"]) == (4, 7)
    assert recorded["file"]["half"] is True
    assert recorded["callbacks"]["checkpoint"]["dirpath"].endswith("moved/checkpoints")
    assert [epoch.epoch for epoch in Report.load("moved/report.json").history] == [0, 1, 0, 1, 2, 3]
    assert not Path("run").exists()


def test_a_resume_changes_what_it_names_and_keeps_the_rest(command: Callable[..., None]) -> None:
    started = [*SMALL, "logger=csv", "+trainer.limit_train_batches=2", "hydra.run.dir=run"]
    with pytest.raises(SystemExit):
        command(*started, "+callbacks.cut={_target_:support.pieces.StopAtEpoch,epoch:2}")
    command("ckpt_path=run/checkpoints/last.ckpt", "trainer=cpu", *SMALL[2:], "logger=none")
    said = Path("run/lightning-compress.log").read_text()
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recorded["trainer"]["limit_train_batches"] == 2
    assert "The run keeps trainer.limit_train_batches, which the command line does not name." in said
    assert recorded["logger"] == {}
    assert "logger.csv.name is None from now on; it was csv." in said


def test_a_misspelt_key_is_answered_with_the_nearest(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure(command, capsys, "callbacks.iterative_pruning.amont=0.4", "trainer.max_epoch=3")
    assert "callbacks.iterative_pruning.amont is no key. Did you mean callbacks.iterative_pruning.amount?" in error
    assert "trainer.max_epoch is no key. Did you mean trainer.max_epochs?" in error
    error = failure(command, capsys, "compress=none", "seed=x")
    assert "Did you mean" not in error


def test_a_module_in_the_current_folder_is_found_and_a_loss_is_no_accuracy(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch, lightning as L\n"
        "class M(L.LightningModule):\n"
        "    def __init__(self): super().__init__(); self.net = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x): return self.net(x.flatten(1))\n"
        "    def loss(self, b): return torch.nn.functional.cross_entropy(self(b[0]), b[1])\n"
        "    def training_step(self, b, i): return self.loss(b)\n"
        "    def validation_step(self, b, i): self.log('val_loss', self.loss(b))\n"
        "    def test_step(self, b, i): self.log('test_loss', self.loss(b))\n"
        "    def configure_optimizers(self): return torch.optim.Adam(self.parameters())\n"
    )
    own = ["model=module", "model._target_=mine.M", "metric=test_loss", "val_metric=val_loss", "hydra.run.dir=run"]
    shown = process(*own, *SMALL[1:], "logger=none", cwd=tmp_path, module="lightning_compress")
    assert "test_loss" in shown
    assert "test_acc" not in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["metric"], report["val_metric"], report["dense"]["test_metric"] > 1) == (
        "test_loss",
        "val_loss",
        True,
    )
    assert "%" not in (tmp_path / "run" / "report.md").read_text().split("| parameters |")[0]


def test_the_demo_prunes_so_little_at_a_time_that_accuracy_never_collapses(command: Callable[..., None]) -> None:
    """With its own settings; a test of every epoch of the 18, whose validation part has 180 digits."""
    command("trainer.enable_progress_bar=false", "logger=none", "measure.repeats=1", "hydra.run.dir=run")
    report = Report.load("run/report.json")
    pruning = [epoch.val_metric for epoch in report.history if epoch.phase != "dense" and epoch.val_metric is not None]
    assert len(pruning) == 18
    assert min(pruning) >= 0.9


def test_the_help_names_the_tasks(tmp_path: Path) -> None:
    shown = process("--help", cwd=tmp_path)
    assert all(f"task={task}" in shown for task in ("run", "inspect", "test", "compare", "export"))


def test_neuron_pruning_runs(finished: Path, command: Callable[..., None]) -> None:
    weights = f"weights={finished / 'dense.ckpt'}"
    command(*SMALL, "compress=neuron_pruning", weights, "hydra.run.dir=neurons")
    layers = {layer.name: layer for layer in Report.load("neurons/report.json").layers}
    assert layers["network.fc"].nonzero_compressed > 0
    convolutions = [layer for name, layer in layers.items() if "conv" in name]
    assert any(layer.nonzero_compressed < layer.parameters for layer in convolutions)
    thin = Path("neurons/compressed.lcz")
    assert found(command, thin) == Report.load("neurons/report.json").compressed.test_metric


@pytest.mark.parametrize(("recipe", "real"), [("binary_connect", set()), ("xnor", {"network.conv1", "network.fc"})])
def test_binary_recipes_end_with_binary_layers_that_are_tested_alike_elsewhere(
    recipe: str, real: set[str], command: Callable[..., None]
) -> None:
    short = [f"experiment={recipe}", "verify=false", "measure.repeats=1", "hydra.run.dir=binary"]
    command(*SMALL, *short)
    weights = {name: one for name, one in load_compressed("binary/compressed.lcz").items() if one.dim() > 1}
    for name, weight in weights.items():
        magnitudes = [len(filter_.abs().unique()) for filter_ in weight]
        assert (max(magnitudes) > 1) == (name.removesuffix(".weight") in real)
    accuracy = Report.load("binary/report.json").compressed.test_metric
    assert found(command, Path("binary/compressed.lcz")) == accuracy
    if recipe == "xnor":  # the file says itself that inputs are signs: no callback needs to be there
        config = yaml.safe_load(Path("binary/config.yaml").read_text()) | {"callbacks": {}}
        Path("binary/config.yaml").write_text(yaml.safe_dump(config))
        assert found(command, Path("binary/compressed.lcz")) == accuracy


def test_with_half_the_compressed_network_is_the_rounded_one(finished: Path, command: Callable[..., None]) -> None:
    wrapper = "+wrappers.mine._target_=support.pieces.Transparent"
    file = ["file.half=true", "file.coder=huffman", wrapper, "hydra.run.dir=half"]
    command(*SMALL, f"weights={finished / 'dense.ckpt'}", *file)
    read = read_compressed("half/compressed.lcz")
    saved = torch.load("half/compressed.ckpt")["state_dict"]
    assert all(torch.equal(read.state[name], value) for name, value in saved.items())
    assert all(torch.equal(value, value.half().float()) for value in saved.values() if value.dtype == torch.float32)
    report = Report.load("half/report.json")
    assert read.size.coder == "huffman"
    assert report.compressed.file_bytes == read.size.bytes < (finished / "compressed.lcz").stat().st_size
    assert found(command, Path("half/compressed.lcz")) == report.compressed.test_metric


def test_a_new_process_finds_modules_of_the_users_own(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "own.py").write_text(
        "from torch import nn\n"
        "from lightning_compress.baselines import Classifier, DigitsConvNet\n"
        "class Own(Classifier):\n"
        "    def __init__(self):\n"
        "        super().__init__(DigitsConvNet(width=4))\n"
        "    def configure_model(self):\n"
        "        self.late = nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    command(*SMALL[1:], "model=module", "model._target_=own.Own", "metric=null", "verify=true")
    assert capsys.readouterr().out.splitlines()[-1].endswith("with metric=null there is nothing to compare")


def test_until_the_metric_drops_there_is_no_network_right_after_pruning_that_was_kept(
    finished: Path, command: Callable[..., None]
) -> None:
    weights = f"weights={finished / 'dense.ckpt'}"
    pruning = ["amount=0.999", "start_epoch=1.0", "stop={monitor:val_acc,max_drop:0.0}"]
    settings = [f"callbacks.iterative_pruning.{setting}" for setting in pruning]
    command(*SMALL, "trainer.max_epochs=5", *settings, weights, "hydra.run.dir=stop")
    assert Report.load("stop/report.json").before_recovery is None


# ---------------------------------------------------------------------------------------------------- distillation


def test_a_student_learns_from_the_dense_networks_of_its_run_and_needs_none_of_them_later(
    command: Callable[..., None], tmp_path: Path
) -> None:
    settings = [*SMALL, "experiment=distill_ensemble", "teachers=2", "verify=false", "measure.repeats=1"]
    command(*settings, "hydra.run.dir=run")
    assert files(Path("run")) == RUN_FILES | {"dense-1.ckpt"}
    report = Report.load("run/report.json")
    assert (report.dense.parameters, report.compressed.parameters) == (4850, 1422)
    assert [epoch.phase for epoch in report.history] == ["dense"] * 2 + ["student"] * 3

    weights = "weights=[run/dense.ckpt,run/dense-1.ckpt]"
    command(*settings, weights, "hydra.run.dir=loaded")
    command(*settings, weights, "hydra.run.dir=alone", "wrappers.distillation.alpha=0.0")
    cut = "+callbacks.cut={_target_:support.pieces.StopAtEpoch,epoch:2}"
    with pytest.raises(SystemExit):
        command(*settings, weights, "hydra.run.dir=cut", cut)
    command(*settings, "ckpt_path=cut/checkpoints/last.ckpt")
    runs = [Path(name, "compressed.lcz").read_bytes() for name in ("run", "loaded", "cut", "alone")]
    assert runs[0] == runs[1] == runs[2] != runs[3]

    assert found(command, Path("run/dense.ckpt")) == report.dense.test_metric
    first, second = (torch.load(f"run/{name}.ckpt")["state_dict"] for name in ("dense", "dense-1"))
    assert not torch.equal(first["network.conv1.weight"], second["network.conv1.weight"])
    for name in ("dense", "dense-1"):
        Path("run", f"{name}.ckpt").unlink()
    for name in ("compressed.lcz", "compressed.ckpt", "checkpoints/last.ckpt"):
        assert found(command, Path("run", name)) == report.compressed.test_metric
    command("task=export", "weights=run/compressed.ckpt")
    assert Path("run/model.onnx").is_file()


def test_a_student_of_another_kind_has_layers_of_its_own(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    student = ["model@student=lenet300", "student.network.in_features=64"]
    command(*SMALL, *student, "callbacks.iterative_pruning.amount=0.5", "measure.repeats=1", "hydra.run.dir=run")
    report = Report.load("run/report.json")
    assert report.layers == ()
    assert "layers of its own" in Path("run/report.md").read_text()
    assert report.history[-1].numbers["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report.compressed.parameters == 64 * 300 + 300 * 100 + 100 * 10 + 410
    assert found(command, Path("run/compressed.lcz")) == report.compressed.test_metric
    capsys.readouterr()
    command("task=inspect", *student, "weights=run/dense.ckpt")
    assert "300 x 64" in capsys.readouterr().out


def test_a_pruned_network_learns_from_what_it_was(finished: Path, command: Callable[..., None]) -> None:
    recipe = ["experiment=prune_then_distill", "measure.repeats=1", "verify=false"]
    for folder, alpha in (("run", 0.9), ("alone", 0.0)):
        weights = [f"weights={finished / 'dense.ckpt'}", f"wrappers.distillation.alpha={alpha}"]
        command(*SMALL, *recipe, *weights, f"hydra.run.dir={folder}")
    report = Report.load("run/report.json")
    assert [epoch.phase for epoch in report.history] == ["compression", "recovery", "recovery"]
    assert report.before_recovery is not None
    assert found(command, Path("run/compressed.lcz")) == report.compressed.test_metric
    taught, alone = (load_compressed(f"{folder}/compressed.lcz") for folder in ("run", "alone"))
    zeros = [float((state["network.conv3.weight"] == 0).float().mean()) for state in (taught, alone)]
    assert min(zeros) > 0.5
    assert not torch.equal(taught["network.conv3.weight"], alone["network.conv3.weight"])


def test_the_recipe_of_ratings_compares_a_perceptron_with_biases_and_products(
    command: Callable[..., None], tmp_path: Path
) -> None:
    rows = [(u, v, (u * v + u) % 9 / 2 + 0.5) for u in range(12) for v in range(0 if u % 2 else 1, 10, 2 - u % 2)]
    (tmp_path / "u.data").write_text("".join(f"{u}\t{v}\t{rating}\t0\n" for u, v, rating in rows))
    sizes = ["data.users=12", "data.items=10", "model.network.hidden=[6]", "model.network.products=4"]
    few = ["dense.max_epochs=6", "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2", "measure.repeats=1"]
    command(
        "experiment=matrix_factorization",
        f"data.path={tmp_path}/u.data",
        *sizes,
        *few,
        "verify=false",
        "hydra.run.dir=run",
    )
    report = Report.load("run/report.json")
    assert (report.metric, report.tested.mode) == ("test_rmse", "min")
    points = {one.name: one for one in report.points}
    assert [*points] == ["dense", "compressed", "mean", "biases", "linear", "dot_product"]
    assert points["mean"].file_bytes < points["biases"].file_bytes  # type: ignore[operator]  # both are measured
    tables = load_compressed("run/compressed.lcz")
    for name in ("user", "user_products", "item", "item_products", "mlp.fc1"):
        assert len(tables[f"network.{name}.weight"].unique()) <= 16


# ------------------------------------------------------------------------------------------------------------ widths


def test_the_slimmable_recipe_compares_its_widths_with_networks_of_these_widths(command: Callable[..., None]) -> None:
    widths = [f"controls.{name}.network.width={n}" for name, n in (("quarter", 2), ("half", 4), ("three_quarters", 6))]
    few = "wrappers.slimmable.weights=equal"  # for so few steps
    recipe = ["experiment=slimmable", "controls.whole.network.width=8", *widths, "measure.repeats=1", few]
    command(*SMALL, *recipe, "hydra.run.dir=run", "verify=true")
    report = Report.load("run/report.json")
    points = {(one.kind, one.name): one for one in report.points}
    alone = {name: points["control", name] for name in ("quarter", "half", "three_quarters", "whole")}
    ways = [points["point", name] for name in ("width 0.25", "width 0.5", "width 0.75", "compressed")]
    assert [one.macs for one in ways] == [one.macs for one in alone.values()]
    assert min(one.test_metric or 0.0 for one in ways) > 0.5
    files = sum(one.file_bytes or 0.0 for one in alone.values())
    assert report.compressed.file_bytes < 0.65 * files
    assert f"{files:,.0f} bytes" in Path("run/report.md").read_text()
    module = load_compressed("run/compressed.lcz", Classifier(DigitsConvNet(width=8)))
    data = Digits()
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    thin = SlimmableNetwork(module.network, images[:2])  # type: ignore[arg-type]
    for width, way in zip((0.25, 0.5), ways, strict=False):
        assert float((thin(images, width=width).argmax(1) == labels).float().mean()) == pytest.approx(way.test_metric)


def test_autoslim_ends_with_a_plain_network_within_its_budget(command: Callable[..., None]) -> None:
    recipe = ["experiment=autoslim", "controls.uniform.network.width=6", "search.epochs=1", "measure.repeats=1"]
    command(*SMALL, *recipe, "hydra.run.dir=run")
    report = Report.load("run/report.json")
    assert report.compressed.macs <= 0.5 * report.dense.macs
    assert [one.phase for one in report.history] == ["dense"] * 5 + ["tuning"]
    assert [(one.kind, one.name) for one in report.points][1:] == [("point", "compressed"), ("control", "uniform")]
    assert json.loads(Path("run/search.json").read_text())["decisions"][-1]["cost"] <= 0.5
    assert found(command, Path("run/compressed.lcz")) == report.compressed.test_metric
    plain = load_compressed("run/compressed.lcz", Classifier(DigitsConvNet(width=8)))
    convolutions = [one for one in plain.modules() if isinstance(one, torch.nn.Conv2d)]
    assert sum(one.out_channels for one in convolutions) < 8 + 8 + 16 + 16
    before = Path("run/tuning.ckpt").stat()
    command("ckpt_path=run/checkpoints/last.ckpt")  # nothing is left to train, but the controls
    again = Report.load("run/report.json")
    assert Path("run/tuning.ckpt").stat().st_mtime_ns == before.st_mtime_ns
    assert again.compressed.test_metric == report.compressed.test_metric
    assert [one.phase for one in again.history] == [one.phase for one in report.history]


# ---------------------------------------------------------------------------------------------------- other tasks


def test_inspect_says_what_would_happen_and_trains_nothing(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command("task=inspect", "callbacks.iterative_pruning.exclude=network.fc")
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert "24 x 1 x 3 x 3" in rows["network.conv1.weight"]
    assert "216" in rows["network.conv1.weight"]
    assert "pruned" in rows["network.conv1.weight"]
    assert "skipped: excluded by" in rows["network.fc.weight"]
    assert "skipped: not targeted" in rows["network.bn1.bias"]
    assert "32,854 of 36,504" in shown
    assert not list(Path().iterdir())


def test_inspect_knows_neurons(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command("task=inspect", "compress=neuron_pruning", "callbacks.neuron_pruning.amount=0.25")
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert "frozen" in rows["network.fc.weight"]
    assert "follows" in rows["network.bn1.weight"]
    assert "36 of 144 channels" in shown  # 24 + 24 + 48 + 48


def test_inspect_lists_the_blocks_that_may_leave(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["model=resnet20", "model.network.width=2", "model.network.in_channels=1"]
    command("task=inspect", "compress=block_pruning", *small)
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert [name for name in rows if name.endswith((".0", ".1", ".2")) and "stays" not in rows[name]] == [
        f"network.stages.{i}" for i in ("0.0", "0.1", "0.2", "1.1", "1.2", "2.1", "2.2")
    ]
    assert "stays" in rows["network.stages.1.0"]


@pytest.mark.parametrize(
    ("compress", "done", "option"),
    [
        ("weight_clustering", "clustered", "n_clusters={*conv*:8,*fc*:0}"),
        ("quantization_aware_training", "quantized, and the layer's inputs", "exclude=network.fc"),
        ("binary_weights", "binarized", "exclude=network.fc"),
        ("group_lasso", "pulled to zero in groups", "exclude=network.fc"),
        ("nuclear_norm", "pulled to low rank", "exclude=network.fc"),
    ],
)
def test_inspect_knows_every_technique(
    compress: str, done: str, option: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    conf = yaml.safe_load((TESTS.parent / "conf" / "compress" / f"{compress}.yaml").read_text())
    key = next(iter(conf["callbacks"]))
    command("task=inspect", f"compress={compress}", f"callbacks.{key}.{option}")
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert done in rows["network.conv1.weight"]
    assert "skipped" in rows["network.fc.weight"]
    assert not any("bn1" in name for name in rows)
    assert not list(Path().iterdir())


def test_inspect_shows_the_exits_of_a_wrapper_and_says_what_it_can_not_show(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command("task=inspect", "compress=[iterative_pruning,distillation,early_exit]", "wrappers.early_exit.exits=[pool1]")
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if line.startswith("│")]
    network = DigitsConvNet()
    convolutions = 24 * 9 * (1 + 24) * 64  # two of 24 channels, 8 x 8 pixels, before the first pooling
    full = convolutions + 48 * 9 * (24 + 48) * 16 + network.fc.weight.numel()
    head = 24 * 16 * 10
    assert ["", "1", "pool1", f"{convolutions / full:.1%}", f"{head / full:.2%}", f"{head + 10 + 1:,}", ""] in rows
    assert f"the full network's {full:,} MACs" in shown
    assert "distillation: this wrapper changes the training objective, and is not inspected" in shown
    assert "pruned" in shown
    assert not list(Path().iterdir())


def test_inspect_says_what_is_in_a_compressed_file(
    finished: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "compressed.lcz"
    command("task=inspect", f"path={path}")
    shown = capsys.readouterr().out
    assert "network.conv2.weight" in shown
    assert f"{path.stat().st_size:,} bytes" in shown
    shown = str(read_compressed(path).size)
    assert any("network.conv2.weight" in line and "zero map" in line for line in shown.splitlines())


def test_a_file_of_a_run_is_tested_as_the_run_did_and_nothing_is_written(
    finished: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report.load(finished / "report.json")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert report.dense.test_metric != report.compressed.test_metric
    assert found(command, finished / "dense.ckpt") == report.dense.test_metric
    for name in ("compressed.lcz", "compressed.ckpt", "checkpoints/last.ckpt"):
        assert found(command, finished / name) == report.compressed.test_metric
    assert f"last.ckpt: test_acc {report.compressed.test_metric:.4f}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert [path.name for path in Path().rglob("*")] == ["found", "number.json"]


def test_what_is_no_number_is_null_in_json_and_said(finished: Path, command: Callable[..., None]) -> None:
    state = torch.load(finished / "dense.ckpt", weights_only=True)["state_dict"]
    state["network.conv1.weight"].fill_(torch.nan)
    torch.save({"state_dict": state}, "broken.ckpt")
    with pytest.warns(UserWarning, match=r"test_loss is nan, which is no number: number\.json has null"):
        command("task=test", "path=broken.ckpt", "json=number.json", "metric=test_loss", "data=digits", *SMALL)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(Path("number.json").read_text(), parse_constant=refuse) == {"test_loss": None}
    settings = {"stop": [float("inf"), 1.5, None], "one": {"two": float("nan"), "three": "x"}}
    expected = '{"stop": ["inf", 1.5, null], "one": {"two": "nan", "three": "x"}}'
    assert json.dumps(cli._for_json(settings), allow_nan=False) == expected


def test_a_file_is_tested_and_exported_from_anywhere(
    command: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in ${x}" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in ${x}")  # no interpolation
    data = ["data=datamodule", "data._target_=support.pieces.Rooted", "+data.root=images"]
    command(*SMALL, *data, "compress=none", "measure.repeats=1", f"hydra.run.dir={tmp_path}/run", "verify=true")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = Report.load("../run/report.json").compressed.test_metric
    assert found(command, Path("../run/compressed.lcz")) == expected
    command("task=export", "weights=../run/compressed.ckpt")
    assert (tmp_path / "run" / "model.onnx").is_file()
    assert Path.cwd() == tmp_path / "elsewhere"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) | {"cwd": str(tmp_path / "gone")}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        command("task=test", "path=../run/compressed.lcz")
    shown = capsys.readouterr()
    assert f"The run worked in {tmp_path / 'gone'}, which is not there" in shown.out
    assert f"no data in {tmp_path / 'elsewhere' / 'images'}" in shown.err


def test_compare_gathers_reports(finished: Path, command: Callable[..., None]) -> None:
    root = Path("sweep")
    for run in ("0", "1"):
        (root / run).mkdir(parents=True)
        (root / run / "report.json").write_bytes((finished / "report.json").read_bytes())
    command("task=compare", "compare.root=sweep")
    assert files(root) == {"comparison.md", "comparison.csv", "comparison.png"} | (RUN_FILES & {"report.html"})


def test_exported_files_run_without_this_package(finished: Path, command: Callable[..., None], tmp_path: Path) -> None:
    command("task=export", f"weights={finished / 'compressed.ckpt'}")  # the network is told by the run's config.yaml
    images = torch.rand(7, 1, 8, 8)
    module = Classifier.load_from_checkpoint(finished / "compressed.ckpt", network=DigitsConvNet(width=8)).eval()
    torch.save(images, tmp_path / "images.pt")
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import sys, torch, onnxruntime\n"
        "sys.modules['lightning_compress'] = None\n"  # an import of it would fail
        "folder, images = sys.argv[1], torch.load('images.pt')\n"
        "program = torch.export.load(folder + '/model.pt2').module()\n"
        "session = onnxruntime.InferenceSession(folder + '/model.onnx', providers=['CPUExecutionProvider'])\n"
        "name = session.get_inputs()[0].name\n"
        "onnx = lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])\n"
        "torch.save([f(x) for f in (program, onnx) for x in (images, images[:1])], 'outputs.pt')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    isolated = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", str(script), str(finished)]
    subprocess.run(isolated, env=environment, cwd=tmp_path, check=True, timeout=120)
    whole, one = module(images).detach(), module(images[:1]).detach()
    for found, expected in zip(torch.load(tmp_path / "outputs.pt"), (whole, one, whole, one), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=fly"], "task='fly' is unknown; expected run, inspect, test, compare, export"),
        (["model._target_=torch.nn.ReLU"], "model._target_='torch.nn.ReLU' is no LightningModule"),
        (["weights=none.ckpt"], "There are no weights at none.ckpt"),
        (["weights=none.ckpt", "teachers=2"], "2 dense networks need as many files of weights, [a.ckpt, ...]; got 1"),
        (["teachers=0"], "teachers=0 is the number of dense networks"),
        (
            ["model@student=module", "student._target_=torch.nn.ReLU"],
            "goes into a Classifier: model@student=classifier",
        ),
        (["ckpt_path=none/checkpoints/last.ckpt"], "ckpt_path='none/checkpoints/last.ckpt' does not exist"),
        (["task=export"], "task=export wants weights=<run folder>/compressed.ckpt"),
        (["task=compare", "compare.root=nowhere"], "nowhere is no folder"),
        (["task=inspect", "compress=none"], "nothing to inspect"),
        (["task=inspect", "path=none.lcz"], "There is no file none.lcz"),
        (["task=test"], "task=test wants path=<run folder>/compressed.lcz"),
        (["task=test", "path=none.lcz"], "path='none.lcz' does not exist"),
        (["task=test", f"path='{__file__}'"], f"There is no config.yaml in {TESTS}"),
        (["file.coder=zip"], "coder='zip' is unknown"),
        (["data=mnist", "model=lenet300", "data.download=false"], "train-images-idx3-ubyte.gz"),
        (["metric=test_f1"], "metric='test_f1' is not logged by the test_step of Classifier"),
        (["callbacks.iterative_pruning.amount=1.5"], "got 1.5"),
        (["callbacks.iterative_pruning.criterion=size"], "got 'size'"),
        (["callbacks.iterative_pruning.target=conv9"], "target='conv9'"),
        (["compress=[iterative_pruning,iterative_pruning]"], "chooses a technique twice"),
        (["compress=[iterative_pruning,neuron_pruning]"], "both prune network.conv1.weight"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_error_and_no_network_is_written(
    overrides: list[str], message: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in failure(command, capsys, *overrides)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".ckpt", ".lcz", ".json", ".png", ".tmp"}]


def test_weights_of_another_network_are_refused(
    finished: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure(command, capsys, f"weights={finished / 'dense.ckpt'}", "model.network.width=4")
    assert "dense.ckpt does not fit Classifier: " in error
    assert "network.conv1.weight is (8, 1, 3, 3) in the file and (4, 1, 3, 3) in the module" in error


def test_a_checkpoint_goes_on_in_no_other_folder(
    finished: Path, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = finished / "checkpoints" / "last.ckpt"
    assert "goes on in its own folder" in failure(command, capsys, f"ckpt_path={checkpoint}", "hydra.run.dir=other")


@pytest.mark.parametrize("name", ["${x}", "${seed}"])
def test_a_folder_whose_name_is_an_interpolation_is_refused_in_one_line(
    name: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = tmp_path / name / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    expected = f"The folder {tmp_path / name} can't be written into: Hydra takes the ${{ in its name"
    assert expected in failure(command, capsys, f"ckpt_path='\\{name}/checkpoints/last.ckpt'")
    assert {path.name for path in tmp_path.iterdir()} == {name}
    with pytest.raises(SystemExit) as exit_:
        command(f"ckpt_path='{name}/checkpoints/last.ckpt'")
    assert f"Hydra takes the ${{ in ckpt_path='{name}" in f"{exit_.value}{capsys.readouterr().err}"


def test_a_module_that_tests_nothing_is_refused_before_any_training(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure(command, capsys, "model=module", "model._target_=support.pieces.Untested")
    assert "Untested has no test_step that logs 'test_acc'" in error


# ---------------------------------------------------------------------------------------------------- ranks


def test_a_sweep_of_recipes_on_two_ranks(finished: Path, tmp_path: Path) -> None:
    weights = f"weights={finished / 'dense.ckpt'}"
    sweep = ["trainer=ddp_cpu", "trainer.devices=2", "experiment=prune_then_distill,distill"]
    shown = process("-m", *SMALL, weights, *sweep, cwd=tmp_path)
    assert sum(line.startswith("compressed.lcz, ") and line.endswith("the same") for line in shown.splitlines()) == 2
    (folder,) = (tmp_path / "multirun").iterdir()  # one folder, not one per rank
    assert not (tmp_path / "outputs").exists()
    for job, sparsity in (("0", 0.95), ("1", None)):
        assert files(folder / job) == RUN_FILES
        report = Report.load(folder / job / "report.json")
        assert report.dense.test_metric == Report.load(finished / "report.json").dense.test_metric
        assert report.history[-1].numbers.get("sparsity") == pytest.approx(sparsity, abs=1e-3)
        assert files(folder / job / "checkpoints") == {"last.ckpt"}


def test_an_untrusted_file_is_tested_with_the_command_lines_network_and_nothing_of_its_folder(
    finished: Path, command: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "sent").mkdir()
    shutil.copy(finished / "compressed.lcz", tmp_path / "sent")
    network = [one for one in SMALL if one.partition("=")[0].partition(".")[0] in ("model", "data")]
    network += [] if any(one.startswith("data=") for one in network) else ["data=digits"]
    expected = Report.load(finished / "report.json").compressed.test_metric
    trap = {"model": {"_target_": "os.mkdir", "path": str(tmp_path / "trapped")}, "cwd": str(tmp_path), "seed": 0}
    for config in (None, yaml.safe_dump(trap), "{"):
        if config is not None:
            (tmp_path / "sent" / "config.yaml").write_text(config)
        command("task=test", f"path={tmp_path / 'sent' / 'compressed.lcz'}", "json=number.json", *network)
        assert json.loads(Path("number.json").read_text())["test_acc"] == expected
        Path("number.json").unlink()
    assert not (tmp_path / "trapped").exists()
