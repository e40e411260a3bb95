"""Private fields of Lightning and torch that this package uses: where a version renames one, its name fails here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationStage
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import RestartStage
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from support.small import SmallModule, plain, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_compress
from lightning_compress.trainer.means import _ARGUMENTS

PACKAGE = Path(lightning_compress.__file__).parent


COUNTERS = {"ready", "started", "processed", "completed"}
DDP_FIELDS = ("_start_method", "_ddp_kwargs", "_ddp_comm_hook", "_ddp_comm_state", "_model_averaging_period")


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """The fields of Lightning in the middle of a fit."""
    found: dict[str, Any] = {}
    averaging = EMAWeightAveraging(decay=0.5)

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            loop = trainer.fit_loop.epoch_loop
            found.update(
                loops=trainer.fit_loop.state_dict(),
                restart_stages=(RestartStage.RESTARTED_ON_LAST, ValidationStage.RESTARTED_MID_EVALUATION),
                _combined_loader=vars(trainer.fit_loop)["_combined_loader"],
                _data_fetcher=vars(trainer.fit_loop)["_data_fetcher"],
                _data_source=vars(trainer.fit_loop)["_data_source"].dataloader(),
                _trainer=vars(pl_module)["_trainer"],
                _run_sanity_check=trainer._run_sanity_check,
                _restarting=vars(trainer.fit_loop)["_restarting"],
                _results=vars(loop)["_results"],
                _Metadata=vars(loop._results["training_step.train_loss"].meta),
                _logger_connector=vars(trainer)["_logger_connector"],
                _callback_metrics=dict(vars(trainer._logger_connector)["_callback_metrics"]),
                _first_loop_iter=vars(trainer._logger_connector)["_first_loop_iter"],
                _update_count=vars(loop._results["training_step.train_loss"])["_update_count"],
                _computed=vars(loop._results["training_step.train_loss"])["_computed"],
                _restart_stage=[vars(one)["_restart_stage"] for one in (loop, loop.val_loop)],
                _batches_that_stepped=vars(loop)["_batches_that_stepped"],
                _should_check_val_fx=loop._should_check_val_fx,
                _average_model=vars(averaging)["_average_model"],
                _checkpoint_connector=vars(trainer)["_checkpoint_connector"],
                _loaded_checkpoint=vars(trainer._checkpoint_connector)["_loaded_checkpoint"],
                _restore_modules_and_callbacks=trainer._checkpoint_connector._restore_modules_and_callbacks,
                _step_supports_amp_scaling=getattr(trainer.optimizers[0], "_step_supports_amp_scaling", None),
            )

    class Fused(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    quiet_trainer(callbacks=[averaging, Look()], max_steps=1).fit(Fused(), plain())
    return found | {
        **{name: vars(DDPStrategy(static_graph=True))[name] for name in DDP_FIELDS},
        "_compiler_ctx": vars(compiled())["_compiler_ctx"],
    }


def compiled() -> LightningModule:
    return from_compiled(torch.compile(SmallModule(), backend="eager"))


EXPECTED = {
    "loops": lambda value: (
        value.keys() >= {"state_dict", "epoch_loop.batch_progress", "epoch_progress"}
        and all(value["epoch_progress"][one].keys() == COUNTERS for one in ("total", "current"))
        and all(value["epoch_loop.batch_progress"][one].keys() == COUNTERS for one in ("total", "current"))
        and value["epoch_loop.batch_progress"]["is_last_batch"] is False
    ),
    "restart_stages": lambda value: len(value) == 2,
    "_Metadata": lambda value: value.keys() >= {"fx", "name", *_ARGUMENTS} and value["_sync"].group is None,
    "_combined_loader": lambda value: isinstance(value, CombinedLoader) and len(value.flattened) == 1,
    "_data_fetcher": lambda value: isinstance(value, _DataFetcher),
    "_data_source": lambda value: isinstance(value, DataLoader),
    "_trainer": lambda value: isinstance(value, Trainer),
    "_average_model": lambda value: isinstance(value.module, SmallModule),
    "_step_supports_amp_scaling": lambda value: value is True,
    "_run_sanity_check": lambda value: list(inspect.signature(value).parameters) == [],
    "_restart_stage": lambda value: value == ["none", "none"],
    "_restarting": lambda value: value is False,
    "_results": lambda value: value.keys() == {"training_step.train_loss"},
    "_logger_connector": lambda value: callable(value.should_reset_tensors),
    "_callback_metrics": lambda value: value == {},
    "_first_loop_iter": lambda value: value is True,
    "_update_count": lambda value: value == 1,
    "_computed": lambda value: value is None,
    "_batches_that_stepped": lambda value: value == 0,
    "_should_check_val_fx": lambda value: list(inspect.signature(value).parameters) == ["data_fetcher"],
    "_checkpoint_connector": lambda value: callable(value._restore_modules_and_callbacks),
    "_loaded_checkpoint": lambda value: value == {},
    "_restore_modules_and_callbacks": lambda value: (
        next(iter(inspect.signature(value).parameters)) == "checkpoint_path"
    ),
    "_start_method": lambda value: value == "popen",
    "_ddp_kwargs": lambda value: value == {"static_graph": True},
    "_ddp_comm_hook": lambda value: value is None,
    "_ddp_comm_state": lambda value: value is None,
    "_model_averaging_period": lambda value: value is None,
    "_compiler_ctx": lambda value: value is not None,
}


@pytest.mark.parametrize("field", list(EXPECTED))
def test_lightning_has_the_field(field: str, seen: dict[str, Any]) -> None:
    assert EXPECTED[field](seen[field]), f"Lightning {lightning.__version__} has {field} = {seen[field]!r}"


def test_torch_has_the_fields() -> None:
    module = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert vars(module).keys() >= {"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"}
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    assert torch.compile(module)._orig_mod is module
    assert module._apply(torch.Tensor.double).weight.dtype is torch.float64
    assert vars(module).keys() >= {"_state_dict_hooks", "_load_state_dict_pre_hooks"}
    assert "_optimizer_step_post_hooks" in vars(optimizer)
    assert "" in module.state_dict()._metadata
    assert torch._dynamo.eval_frame._stance.stance == "default"
    with torch.compiler.set_stance("force_eager"):
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"


def test_the_glue_uses_no_other_private_field_of_lightning() -> None:
    """A field that is used anew needs a line in EXPECTED."""
    glue = [path for path in PACKAGE.glob("*/*.py") if "lightning.pytorch" in path.read_text()]
    torchs = {"_dynamo", "_modules", "_parameters", "_buffers", "_foreach_mul_", "_stance", "_compiled_call_impl"}
    torchs |= {"_orig_mod", "_apply", "_version"}
    own = {"_lightning_compress"}
    for path in glue:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            owner = ast.unparse(node.value)
            if owner in ("self", "cls", "super()"):
                continue
            assert node.attr in EXPECTED.keys() | torchs | own, f"{path.name} uses {owner}.{node.attr}"
