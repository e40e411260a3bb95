"""Every file of conf/ composes, says what the constructors say, and makes what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import get_object
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from support.small import SmallModule

import lightning_compress
from lightning_compress import IterativePruningCallback, save_compressed
from lightning_compress.hydra import (
    NEEDED,
    build_datamodule,
    build_each_wrapped,
    build_module,
    build_named,
    build_trainer_factory,
    build_wrapped,
    register_resolvers,
    replace_nulls,
    run_folder,
)
from lightning_compress.trainer.compatibility import check_together

CONF = next(path for place in lightning_compress.__path__ if (path := Path(place) / "conf").is_dir())
GROUPS = ["model", "data", "trainer", "logger", "compress", "experiment", "hydra"]
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
YOURS = {  # what these files leave to the user
    ("model", "module"): ["model._target_=support.small.SmallModule"],
    ("model", "classifier"): ["model.network._target_=torch.nn.Identity"],
    ("data", "datamodule"): ["data._target_=lightning_compress.baselines.Digits"],
    **{("model", name): ["data=ratings"] for name in ("nnmf", "dot_product", "rating_biases")},
}
DELIBERATE = {  # where a file has another value than the constructor's default, on purpose
    ("compress", "binary_weights"): {"lr_scale"},  # for the recipe's Adam
    ("compress", "channel_gates"): {"share", "network"},  # the share that a network without gates gets
    ("compress", "distillation"): {"teacher"},  # has no default
    ("compress", "early_exit"): {"num_classes", "network"},  # without a default; a Classifier has a network
    ("compress", "group_lasso"): {"strength", "granularity", "proximal", "shrink"},  # one compresses, with these
    ("compress", "iterative_pruning"): {"amount", "every_n_steps"},
    ("compress", "neuron_pruning"): {"granularity", "criterion"},
    ("compress", "nuclear_norm"): {"strength"},  # has no default
    ("compress", "scratch_b"): {"structure", "budget"},  # the first has no default
    ("compress", "scratch_e"): {"structure"},
    ("compress", "skippable_blocks"): {"network"},  # a Classifier has a network
    ("compress", "slimmable"): {"network"},
}


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    register_resolvers()
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    # outside a run there is no ${hydra:runtime.output_dir}
    return compose("config", overrides=["output_dir=somewhere", *overrides])


def targets(node: Any) -> Iterator[DictConfig]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for child in node.values():
            yield from targets(child)


def test_the_group_lasso_of_the_command_cuts_out_what_it_makes_zero() -> None:
    lasso = composed("compress=group_lasso").callbacks.group_lasso
    assert (lasso.granularity, lasso.proximal, lasso.shrink) == ("group", True, "on_fit_end")
    assert lasso.strength >= 1.0


def test_every_group_of_the_issue_has_files() -> None:
    assert {group for group, _ in FILES} == set(GROUPS)
    assert {name for group, name in FILES if group == "trainer"} == {"cpu", "gpu", "ddp", "ddp_cpu"}


@pytest.mark.parametrize(("group", "name"), FILES, ids=["/".join(file) for file in FILES])
def test_every_file_composes_and_names_only_arguments_that_exist(group: str, name: str) -> None:
    cfg = composed(f"{group}={name}", *YOURS.get((group, name), []))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for node in targets(cfg):
        accepted = inspect.signature(get_object(node._target_)).parameters
        unknown = {str(key) for key in node if not str(key).startswith("_")} - set(accepted)
        assert not unknown or any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values())


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "compress" and name != "none"])
def test_technique_files_say_what_the_constructor_says(name: str) -> None:
    cfg = composed(f"compress={name}")
    (node,) = [one for key, one in [*cfg.callbacks.items(), *cfg.wrappers.items()] if key != "checkpoint"]
    signature = inspect.signature(get_object(node._target_)).parameters
    written = {str(key): value for key, value in OmegaConf.to_container(node).items() if key != "_target_"}
    no_yaml = {"example_inputs", "student", "module"}
    assert signature.keys() - written.keys() == no_yaml & signature.keys()
    defaults = {key: parameter.default for key, parameter in signature.items() if key in written}
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    differ = {key for key, value in written.items() if value != lists[key]}
    assert differ == DELIBERATE.get(("compress", name), set())


def test_options_of_the_file_are_those_of_save_compressed() -> None:
    signature = inspect.signature(save_compressed).parameters.values()
    keywords = {option.name: option.default for option in signature if option.kind == option.KEYWORD_ONLY}
    assert composed().file == keywords


MODEL_INPUTS = {
    **dict.fromkeys(["digits_conv", "digits_conv_narrow", "msdnet_digits"], (1, 8, 8)),
    **dict.fromkeys(["lenet300", "lenet5", "msdnet_mnist"], (1, 28, 28)),
    **dict.fromkeys(["resnet20", "msdnet"], (3, 32, 32)),
    **dict.fromkeys(["mobilenet", "squeezenet", "shufflenet", "xception", "ghostnet"], (3, 32, 32)),
}


@pytest.mark.parametrize(("name", "shape"), MODEL_INPUTS.items())
def test_model_files_make_networks_that_fit_their_data(name: str, shape: tuple[int, ...]) -> None:
    assert build_module(composed(f"model={name}"))(torch.zeros(2, *shape)).shape == (2, 10)


def test_resnet20_has_width_and_channels() -> None:
    module = build_module(composed("model=resnet20", "model.network.width=4", "model.network.in_channels=1"))
    assert module.network.conv.weight.shape == (4, 1, 3, 3)


def test_a_student_is_any_model_and_the_dense_network_stays_what_it_is() -> None:
    assert composed().student is None
    cfg = composed("model@student=lenet300", "student.network.in_features=64", "model.network.width=8")
    assert build_module(cfg, "student").network.fc1.weight.shape == (300, 64)
    assert build_module(cfg).network.conv1.weight.shape[0] == 8


def test_teachers_are_the_dense_networks_of_the_run() -> None:
    cfg = composed("experiment=distill_ensemble", "teachers=2", "model.network.width=8")
    teacher = cfg.wrappers.distillation.teacher
    assert teacher.paths == ["somewhere/dense.ckpt", "somewhere/dense-1.ckpt"]
    assert teacher.module == cfg.model


def test_any_module_and_its_arguments() -> None:
    module = build_module(composed("model=module", "model._target_=support.small.SmallModule", "+model.optimizer=adam"))
    assert type(module).__name__ == "SmallModule"
    assert module.optimizer == "adam"


@pytest.mark.parametrize(
    ("target", "kind"), [("torch.nn.Linear", "Linear"), ("collections.OrderedDict", "OrderedDict")]
)
def test_a_target_that_is_no_module_is_quoted_with_what_to_write(target: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"model\._target_='{target}' is no LightningModule.*{kind}") as error:
        build_module(composed("model=module", f"model._target_={target}"))
    assert f"model=classifier model.network._target_={target}" in str(error.value)


def test_a_factory_function_is_judged_by_what_it_makes() -> None:
    assert isinstance(build_module(composed("model=module", "model._target_=support.pieces.make_module")), SmallModule)
    with pytest.raises(ValueError, match=r"data\._target_=.* is no LightningDataModule"):
        build_datamodule(composed("data=datamodule", "data._target_=support.pieces.make_module"))


def test_callbacks_are_a_dict_that_the_command_line_reaches() -> None:
    callbacks = build_named(
        composed("callbacks.iterative_pruning.amount=0.75", "callbacks.iterative_pruning.target=[fc*]").callbacks
    )
    assert list(callbacks) == ["checkpoint", "iterative_pruning"]
    assert callbacks["iterative_pruning"].amount == 0.75
    assert (
        type(callbacks["iterative_pruning"].target) is list
    )  # OmegaConf's own list could not be saved in a checkpoint


def test_clusters_by_pattern_are_written_as_a_dict() -> None:
    cfg = composed("compress=weight_clustering", "callbacks.weight_clustering.n_clusters={*conv*:256,*fc*:32}")
    assert build_named(cfg.callbacks)["weight_clustering"].n_clusters == {"*conv*": 256, "*fc*": 32}


def test_pruning_and_clustering_stand_side_by_side() -> None:
    callbacks = build_named(composed("compress=[iterative_pruning,weight_clustering]").callbacks)
    assert list(callbacks) == ["checkpoint", "iterative_pruning", "weight_clustering"]


def test_stop_is_written_as_a_dict() -> None:
    cfg = composed("callbacks.iterative_pruning.stop={monitor:val_acc,max_drop:0.01}")
    assert isinstance(build_named(cfg.callbacks)["iterative_pruning"], IterativePruningCallback)


@pytest.mark.parametrize("key", ["callbacks", "wrappers", "controls", "logger", "dense"])
def test_a_section_set_to_null_is_empty(key: str) -> None:
    cfg = composed(f"{key}=null" if key != "logger" else "logger=none")
    replace_nulls(cfg)
    assert cfg[key] == {}


def test_wrappers_and_controls_set_to_null_are_left_out() -> None:
    cfg = composed("compress=[channel_gates,distillation]", "wrappers.distillation=null", "+controls.narrow=null")
    replace_nulls(cfg)
    assert (list(cfg.wrappers), list(cfg.controls)) == (["channel_gates"], [])
    assert list(build_each_wrapped(cfg.wrappers, build_module(cfg))) == ["channel_gates"]


@pytest.mark.parametrize("key", NEEDED)
def test_null_for_what_a_command_needs_is_refused_by_the_name_of_the_key(key: str) -> None:
    cfg = composed(f"{key}=null")
    with pytest.raises(ValueError, match=f"{key}=null, but a command needs a value for {key}"):
        replace_nulls(cfg)


def test_a_callback_set_to_null_is_left_out() -> None:
    assert list(build_named(composed("callbacks.checkpoint=null").callbacks)) == ["iterative_pruning"]


def test_compress_takes_none_one_or_a_list() -> None:
    assert list(composed("compress=none").callbacks) == ["checkpoint"]
    assert list(composed("compress=[neuron_pruning,iterative_pruning]").callbacks) == [
        "checkpoint",
        "neuron_pruning",
        "iterative_pruning",
    ]


def test_pruning_the_same_weights_twice_is_refused_with_the_reason() -> None:
    cfg = composed("compress=[iterative_pruning,neuron_pruning]")
    with pytest.raises(ValueError, match=r"both prune network\.conv1\.weight"):
        check_together(build_module(cfg), list(build_named(cfg.callbacks).values()))


def test_pruning_twice_with_nothing_in_common_is_fine() -> None:
    cfg = composed(
        "compress=[iterative_pruning,neuron_pruning]",
        "callbacks.iterative_pruning.target=network.fc",
        "callbacks.neuron_pruning.target=network.conv*",
    )
    check_together(build_module(cfg), list(build_named(cfg.callbacks).values()))


def test_wrappers_nest_in_their_order_the_first_innermost() -> None:
    target = "_target_:support.pieces.Wrapper"
    cfg = composed(f"+wrappers.a={{{target},name:first}}", f"+wrappers.b={{{target},name:second}}")
    module = SmallModule()
    outer = build_wrapped(cfg.wrappers, module)
    assert (outer.name, outer.module.name, outer.module.module) == ("second", "first", module)


def test_to_read_a_network_no_wrapper_is_made_that_only_trains_it() -> None:
    cfg = composed("compress=distillation", "+wrappers.mine={_target_:support.pieces.Wrapper,name:mine}")
    module = SmallModule()
    assert build_wrapped(cfg.wrappers, module, training=False).module is module  # somewhere/dense.ckpt is not there
    with pytest.raises(InstantiationException, match=r"somewhere/dense\.ckpt"):
        build_wrapped(cfg.wrappers, module)


def test_a_callback_below_wrappers_is_refused() -> None:
    cfg = composed("+wrappers.pruning._target_=lightning_compress.IterativePruningCallback")
    with pytest.raises(ValueError, match=r"wrappers\.pruning\._target_=.* is no LightningModule.*below callbacks"):
        build_wrapped(cfg.wrappers, SmallModule())


def test_the_trainer_takes_further_arguments() -> None:
    trainer = build_trainer_factory(composed("trainer.max_epochs=7"))(logger=False, enable_checkpointing=False)
    assert isinstance(trainer, Trainer)
    assert trainer.max_epochs == 7


def test_an_experiment_is_defaults_plus_deltas_and_the_command_line_wins() -> None:
    cfg = composed("experiment=lenet300_12x", "trainer.max_epochs=3")
    assert cfg.model.network._target_.endswith("LeNet300")
    assert cfg.data._target_.endswith(".MNIST")
    assert cfg.trainer.max_epochs == 3
    assert cfg.callbacks.iterative_pruning.schedule == "cubic"  # untouched by the experiment


@pytest.mark.parametrize(("name", "left"), [("lenet300_12x", 22_183), ("lenet5_12x", 36_000)])
def test_experiments_leave_as_many_weights_as_the_paper(name: str, left: int) -> None:
    cfg = composed(f"experiment={name}")
    weights = sum(p.numel() for p in build_module(cfg).parameters() if p.dim() > 1)
    remaining = weights - round(cfg.callbacks.iterative_pruning.amount * weights)
    assert left - 100 < remaining <= left


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="amont"):
        composed("callbacks.iterative_pruning.amont=0.5")


def test_a_run_writes_into_the_folder_of_what_it_goes_on_with(tmp_path: Path) -> None:
    checkpoint, compressed = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / "compressed.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    compressed.touch()
    run = str(tmp_path / "run")
    assert run_folder("run", str(checkpoint), None, "new") == run
    assert run_folder("export", None, str(compressed), "new") == run
    assert run_folder("export", str(checkpoint), None, "new") == run
    assert run_folder("run", None, str(compressed), "new") == "new"
    assert run_folder("inspect", None, str(compressed), "new") == "."
    assert run_folder("run", str(tmp_path / "typo" / "last.ckpt"), None, "new") == "new"
