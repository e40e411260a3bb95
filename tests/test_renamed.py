"""Names of earlier versions: refused on a command line, translated in what an earlier run has left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from support.small import SmallModule
from test_cli import SMALL, command, failure, files, found  # noqa: F401  # the fixture

from lightning_compress import DistillationModule, cli
from lightning_compress.report.renamed import KEYS, TARGETS, translated

CONF = Path(__file__).parents[1] / "conf"
GROUPS = [path for path in sorted((CONF / "compress").glob("*.yaml")) if path.stem != "none"]


@pytest.mark.parametrize("path", GROUPS, ids=[path.stem for path in GROUPS])
def test_the_key_of_a_technique_is_the_name_of_its_file(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert [*content.get("callbacks", ()), *content.get("wrappers", ())] == [path.stem]


@pytest.mark.parametrize("sweep", [[], ["-m"]])
@pytest.mark.parametrize("old", KEYS)
def test_an_earlier_key_is_refused_in_one_line_that_names_the_new_one(
    sweep: list[str],
    old: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for word in (f"{old}=null", f"~{old}", f"{old}.amount=0.5,0.8", f"+{old}.amount=0.5", f"++{old}.amount=0.5"):
        monkeypatch.setattr(sys, "argv", ["lightning-compress", *sweep, "compress=none", word])
        with pytest.raises(SystemExit) as refused:
            cli.main()
        assert refused.value.code == f"{old} is called {KEYS[old]} now: {word} is refused."


def test_a_callback_of_the_users_may_have_any_name(
    command: Callable[..., None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = "+callbacks.pruning={_target_:lightning_compress.IterativePruningCallback,amount:0.5}"
    command(*SMALL, "task=inspect", "compress=none", own)
    assert "conv2" in capsys.readouterr().out


def test_an_experiment_with_an_earlier_key_is_refused(
    command: Callable[..., None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    for content in ("{amount: 0.5}", "null"):
        text = f"# @package _global_\ncallbacks:\n  pruning: {content}\n"
        (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
        error = failure(command, capsys, "--config-dir=conf", "experiment=mine", *SMALL)
        assert "callbacks.pruning is called callbacks.iterative_pruning now." in error


def test_the_earlier_name_of_an_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="cache=-1 is called index= now"):
        DistillationModule(SmallModule(), SmallModule(), cache=-1)  # type: ignore[call-arg]


def test_checkpoints_know_the_argument_by_its_earlier_name() -> None:
    module = DistillationModule(SmallModule(), SmallModule(), index=-1)
    (level,) = module._lightning_compress.levels
    assert "'cache': -1" in level.callback.state_key


@pytest.mark.parametrize("target", TARGETS)
def test_a_function_that_was_moved_is_there(target: str) -> None:
    assert callable(get_object(TARGETS[target]))


def test_new_names_are_left_alone_and_the_order_stays() -> None:
    old = {"callbacks": {"checkpoint": 1, "pruning": {"amount": 0.5}, "clustering": {"a": [{"_target_": "b"}]}}}
    assert list(translated(old)["callbacks"]) == ["checkpoint", "iterative_pruning", "weight_clustering"]
    assert translated(translated(old)) == translated(old)
    assert translated(old, keep=["callbacks.pruning"])["callbacks"]["pruning"] == {"amount": 0.5}
    both = {"callbacks": {"pruning": 1, "iterative_pruning": 2}}
    assert translated(both) == both


@pytest.fixture
def of_yesterday(command: Callable[..., None]) -> Callable[..., None]:  # noqa: F811
    """An interrupted run, in the folder "run", whose config has the names of an earlier version."""
    settings = ["compress=[iterative_pruning,weight_clustering,distillation]", "hydra.run.dir=run"]
    cut = "+callbacks.cut={_target_:support.pieces.StopAtEpoch,epoch:2}"
    with pytest.raises(SystemExit):
        command(*SMALL, *settings, "callbacks.weight_clustering.start_epoch=2.5", cut)
    path = Path("run/config.yaml")
    path.write_text(yaml.safe_dump(_renamed_back(yaml.safe_load(path.read_text())), sort_keys=False))
    text = path.read_text()
    assert "finding.load_teachers" in text
    assert "  pruning:\n" in text
    return command


def _renamed_back(config: dict[str, Any]) -> dict[str, Any]:
    names = {new.split(".")[-1]: old.split(".")[-1] for old, new in KEYS.items()}
    for section in ("callbacks", "wrappers"):
        config[section] = {names.get(key, key): value for key, value in config[section].items()}
    del config["calibration"], config["controls"]  # keys that the earlier version did not have
    node = config["wrappers"]["distillation"]
    node["cache"] = node.pop("index")
    node["teacher"]["_target_"] = "lightning_compress.distillation.finding.load_teachers"
    return config


def test_a_run_of_an_earlier_version_is_tested_and_goes_on(of_yesterday: Callable[..., None]) -> None:
    assert found(of_yesterday, Path("run/checkpoints/last.ckpt")) > 0.1
    of_yesterday("ckpt_path=run/checkpoints/last.ckpt", "trainer.log_every_n_steps=7")
    assert {"compressed.lcz", "report.json"} <= files(Path("run"))
    recorded = yaml.safe_load(Path("run/config.yaml").read_text())
    assert list(recorded["callbacks"])[:3] == ["checkpoint", "iterative_pruning", "weight_clustering"]
    assert "index" in recorded["wrappers"]["distillation"]
    assert (recorded["calibration"], recorded["controls"]) == (None, {})
    assert found(of_yesterday, Path("run/compressed.lcz")) > 0.1
