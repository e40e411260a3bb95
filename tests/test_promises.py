"""What every technique promises, tested for every entry of the registry."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import jobs
from support.compare import differences
from support.ranks import TESTS
from support.registry import REGISTRY
from support.small import SAMPLES, ManualModule, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor

from lightning_compress.block_pruning.stand_in import stand_ins
from lightning_compress.channels.load import adopt_state
from lightning_compress.replacement.swap import replaced

ENTRIES = list(REGISTRY)
MASKING = [entry for entry in ENTRIES if entry.startswith("pruning")]  # the others promise no masks
ADDED = ("exit_heads.", "width_norms.", "channel_gates.", "skip_gates.")  # children that a plain class lacks
BATCH = 16  # samples
EPOCH = SAMPLES // BATCH  # optimizer steps
fit = partial(jobs.fit, batch=BATCH)
Whole = Callable[[str], tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A fit of an entry from its beginning to its end, and the folder with a checkpoint of each epoch."""

    @cache
    def fitted(entry: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("whole")
        return fit(entry, folder=folder), folder

    return fitted


@cache
def bare(like: str) -> dict[str, Any]:
    return fit(like, bare=True)


def assert_compressed(entry: str, state: dict[str, Tensor]) -> None:
    """The state dict of a fit's end is that of a technique that has reached its end."""
    weights = [one for name, one in state.items() if name.endswith("weight")]
    if "low-rank" in entry:
        assert state["net.hidden.first.weight"].shape[0] == state["net.hidden.second.weight"].shape[1] < 12
        if "pruning" in entry:
            assert (torch.cat([weight.flatten() for weight in weights]) == 0).float().mean() > 0.3
        if "clustering" in entry:
            assert max(len(one.unique()) for name, one in state.items() if "hidden" in name and one.dim() > 1) <= 6
        return
    if "conv-blocks" in entry:
        assert "net.block1.conv2.weight" not in state
        assert sum(name.startswith("net.block1.conv2.") for name in state) >= 3
    hidden = state["net.hidden.weight"]
    if "scratch-thin" in entry:
        assert hidden.shape[0] == state["net.head.weight"].shape[1] == 8
    elif "scratch" in entry:
        assert (hidden == 0).float().mean() > 0.59
    if "nuclear" in entry:
        values = torch.linalg.svdvals(hidden.float())
        assert values[-1] < values[0] / 6  # a third at first
    if "neurons" in entry and hidden.shape != SmallModule().net.hidden.weight.shape:
        assert hidden.shape[0] == state["net.head.weight"].shape[1]
    elif entry in MASKING:
        assert (torch.cat([weight.flatten() for weight in weights]) == 0).float().mean() > 0.3
    if "supermask" in entry:
        assert (hidden == 0).float().mean() > 0.3
    if "clustering" in entry and "binary" not in entry:
        assert max(len(state[f"net.{layer}.weight"].unique()) for layer in ("hidden", "head")) <= 6
    if "binary" in entry:
        for row in hidden.abs():
            assert len(row[row > 0].unique()) <= 1  # a filter may be pruned altogether
            assert "then" in entry or (row > 0).all()


@pytest.mark.parametrize("entry", ENTRIES)
def test_resume_at_an_epochs_end_is_exact(entry: str, whole: Whole) -> None:
    uninterrupted, folder = whole(entry)
    resumed = fit(entry, resume=folder / f"step={2 * EPOCH}.ckpt")
    assert differences(uninterrupted, resumed) == []


@pytest.mark.parametrize("entry", ENTRIES)
def test_resume_inside_an_epoch_is_exact(entry: str, tmp_path: Path) -> None:
    whole = fit(entry, folder=tmp_path, stateful=True, every_n_train_steps=5)
    resumed = fit(entry, stateful=True, resume=tmp_path / "step=10.ckpt")
    assert differences(whole, resumed) == []


@pytest.mark.parametrize("step", [EPOCH, 2 * EPOCH])
def test_resume_from_the_last_batch_of_an_epoch_is_exact(step: int, tmp_path: Path) -> None:
    whole = fit("pruning", folder=tmp_path, every_n_train_steps=EPOCH)
    resumed = fit("pruning", resume=tmp_path / f"step={step}.ckpt")
    assert differences(whole, resumed) == []


def test_resume_after_sigkill_is_exact(tmp_path: Path) -> None:
    whole = fit("pruning-regrow", folder=tmp_path / "whole", stateful=True, every_n_train_steps=5)
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from lightning.pytorch import Callback\n"
        "from support.jobs import fit\n"
        "class Kill(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        "        if trainer.global_step == 17: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"fit('pruning-regrow', folder=Path({str(tmp_path / 'killed')!r}), stateful=True, every_n_train_steps=5,"
        f" batch={BATCH}, callbacks=(Kill(),))\n"
    )
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    killed = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    resumed = fit("pruning-regrow", stateful=True, resume=tmp_path / "killed" / "step=15.ckpt")
    assert differences(whole, resumed) == []


def test_resume_inside_an_epoch_of_a_plain_loader_says_what_is_not_exact(tmp_path: Path) -> None:
    fit("pruning", folder=tmp_path, every_n_train_steps=5)
    with pytest.warns(UserWarning, match="the rest of this epoch has other batches"):
        fit("pruning", resume=tmp_path / "step=10.ckpt")


@pytest.mark.parametrize("entry", ENTRIES)
def test_doing_nothing_is_nothing(entry: str) -> None:
    like = next(one for one in ENTRIES if REGISTRY[one].module == REGISTRY[entry].module)
    idle = fit(entry, nothing=True)
    for part in ("weights", "optimizers", "random"):
        assert differences(bare(like)[part], idle[part]) == []


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_technique_does_something(entry: str, whole: Whole) -> None:
    like = next(one for one in ENTRIES if REGISTRY[one].module == REGISTRY[entry].module)
    weights = whole(entry)[0]["weights"]
    assert differences(bare(like)["weights"], weights) != []


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_checkpoint_holds_what_was_validated_and_loads_into_the_plain_class(entry: str, whole: Whole) -> None:
    checkpoint = torch.load(whole(entry)[1] / f"step={4 * EPOCH}.ckpt", weights_only=True)
    assert_compressed(entry, checkpoint["state_dict"])
    module = SmallModule(**REGISTRY[entry].module)
    own = [name for name in checkpoint["state_dict"] if not name.startswith(ADDED)]
    if entry.startswith(("depth", "low-rank", "conv-blocks")):  # names are missing, or others
        adopt_state(module, checkpoint["state_dict"])
    assert own == list(module.state_dict())
    if entry.startswith("depth"):
        assert stand_ins(module)
    elif entry.startswith(("low-rank", "conv-blocks")):
        assert replaced(module)
    elif "during-fit" in entry or "thin" in entry:  # thinner than the plain class
        adopt_state(module, checkpoint["state_dict"])
        assert module.net.hidden.out_features == module.net.head.in_features < 16
    else:
        module.load_state_dict(checkpoint["state_dict"], strict=True)


@pytest.mark.parametrize(
    "entry",
    ["pruning-obd", "pruning-neurons-taylor", "clustering", "binary-xnor-activations", "qat", "pruning-clustering-qat"],
)
def test_every_technique_goes_with_a_teacher(entry: str) -> None:
    module = REGISTRY["distillation"].wrap(SmallModule(**REGISTRY[entry].module))
    assert_compressed(entry, fit(entry, module=module)["weights"])


@pytest.mark.parametrize("entry", ENTRIES)
def test_fast_dev_run(entry: str) -> None:
    assert fit(entry, fast_dev_run=True)["step"] == 1


@pytest.mark.parametrize("entry", ENTRIES)
def test_accumulation_validation_inside_epochs_clipping_and_bf16_together(entry: str) -> None:
    options = {"accumulate_grad_batches": 3, "val_check_interval": 4, "gradient_clip_val": 0.1, "batch": 8}
    assert_compressed(entry, fit(entry, **options, precision="bf16-mixed")["weights"])


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_weights_of_another_type_train_as_float32_ones_do(entry: str, precision: str) -> None:
    weights = fit(entry, precision=precision)["weights"]
    assert_compressed(entry, weights)
    floats = [weight for weight in weights.values() if weight.is_floating_point()]
    assert {weight.dtype for weight in floats} == {torch.bfloat16 if precision == "bf16-true" else torch.float64}
    assert all(bool(weight.isfinite().all()) for weight in floats)


@pytest.mark.parametrize("entry", ENTRIES)
def test_float16_weights_are_refused_before_the_first_step(entry: str) -> None:
    module = SmallModule(**REGISTRY[entry].module)
    before = {name: in_order(value.half()) for name, value in module.state_dict().items() if value.is_floating_point()}
    with pytest.raises(ValueError, match=r"does not train float16 weights, such as net\.conv\.weight.*'bf16-true'"):
        fit(entry, module=module, precision="16-true")
    after = {name: in_order(value) for name, value in module.state_dict().items() if name in before}
    assert differences(before, after) == []


def in_order(values: Tensor) -> Tensor:
    """The values of a tensor, wherever they are: a wrapper of widths sorts channels."""
    return values.flatten().sort().values


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not REGISTRY[entry].runs_steps])
def test_manual_optimization_with_two_optimizers(entry: str) -> None:
    assert_compressed(entry, fit(entry, module=ManualModule(**REGISTRY[entry].module))["weights"])


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_verb_after_a_fit_and_a_second_fit(entry: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    callbacks = REGISTRY[entry].callbacks()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = quiet_trainer(callbacks=[*callbacks, checkpoint], enable_checkpointing=True)
    module = REGISTRY[entry].wrap(SmallModule(**REGISTRY[entry].module))
    trainer.fit(module, shuffled(batch=BATCH), plain(batch=32))
    before = copy.deepcopy(module.state_dict())  # with its metadata, which alone explain the shapes of a cut network
    trainer.validate(module, plain(batch=32), verbose=False)
    trainer.predict(module, plain(batch=32))
    assert differences(before, dict(module.state_dict())) == []
    trainer.test(module, plain(batch=32), ckpt_path="best", verbose=False, weights_only=True)
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert differences(dict(module.state_dict()), dict(best)) == []
    masks = {name: mask.clone() for name, mask in callbacks[0].masks.items()} if entry in MASKING else {}

    module.load_state_dict(before)
    quiet_trainer(callbacks=callbacks, max_epochs=1).fit(module, shuffled(batch=BATCH), plain(batch=32))
    if entry not in MASKING:
        return
    assert callbacks[0].finished
    assert differences(masks, callbacks[0].masks) == []
    for name, mask in masks.items():
        assert not module.get_parameter(name)[~mask].any()
