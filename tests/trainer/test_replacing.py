"""Layers are replaced before the optimizers are made: what trains, what resumes, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from support.compare import differences
from support.forms import Replacing, recorded_forms
from support.jobs import fit
from support.ranks import RankPair
from support.small import BATCH, SAMPLES, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress import load_compressed, save_compressed
from lightning_compress.replacement.plan import carry_out
from lightning_compress.replacement.swap import replaced
from lightning_compress.trainer.compatibility import IncompatibleError

EPOCH = SAMPLES // BATCH
RANKS = {"net.conv": 2, "net.hidden": 4}


@pytest.fixture(autouse=True)
def forms() -> Iterator[None]:
    with recorded_forms():
        yield


def replacing(**options: Any) -> Replacing:
    return Replacing(RANKS, **options)


def small(seed: int = 0) -> SmallModule:
    torch.manual_seed(seed)
    return SmallModule()


class Trains(Callback):
    """Notes what the optimizers train when the fit begins."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        names = {id(one): name for name, one in pl_module.named_parameters()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.names = [names.get(id(one)) for group in groups for one in group["params"]]


def test_the_optimizer_trains_the_parts_and_the_fit_is_as_if_they_had_been_there() -> None:
    seen, module, callback = Trains(), small(), replacing()
    first = fit(None, module=module, callbacks=(callback, seen), max_epochs=1)
    assert callback.planned == 1
    assert None not in seen.names
    assert {"net.conv.first.weight", "net.hidden.second.bias"} <= set(seen.names)
    assert sorted(replaced(module)) == sorted(RANKS)

    other = small()
    before = copy.deepcopy(other)
    seed_everything(1, verbose=False)
    batches = [batch[0] for _, batch in zip(range(2), shuffled(), strict=False)]
    undo = carry_out(other, replacing().plan(other, batches[0], batches), "low_rank")
    second = fit(None, module=other, max_epochs=1)
    assert not differences(first["weights"], second["weights"])
    assert torch.equal(first["random"], second["random"])  # nothing has moved the generators
    undo()
    assert list(other.state_dict()) == list(before.state_dict())


@pytest.mark.parametrize("average_first", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_a_resume_in_the_middle_is_exact_with_averages(average_first: bool, inside: bool, tmp_path: Path) -> None:
    def run(resume: Path | None = None, folder: Path | None = None) -> dict[str, Any]:
        callback = replacing()
        average = EMAWeightAveraging(decay=0.9)
        found = fit(
            None,
            module=small(),
            callbacks=(average, callback) if average_first else (callback,),
            resume=resume,
            folder=folder,
            stateful=True,
            every_n_train_steps=5 if inside else None,
            max_epochs=2,
        )
        assert callback.planned == (resume is None)
        return found

    whole = run(folder=tmp_path)
    for step in (5, 15) if inside else (EPOCH,):
        resumed = run(resume=tmp_path / f"step={step}.ckpt")
        assert not differences(whole, resumed)


def test_an_average_that_stands_last_is_refused_and_the_module_is_as_it_was() -> None:
    module = SmallModule()
    weight, keys = module.net.hidden.weight, list(module.state_dict())
    trainer = quiet_trainer(callbacks=[replacing(), EMAWeightAveraging(decay=0.9)])
    with pytest.raises(IncompatibleError, match="put EMAWeightAveraging before Replacing"):
        trainer.fit(module, shuffled())
    assert not replaced(module)
    assert module.net.hidden.weight is weight
    assert list(module.state_dict()) == keys


class WithAverage(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net, avg_fn=lambda mean, new, n: 0.9 * mean + 0.1 * new)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.net)


def test_an_average_inside_the_module_follows(tmp_path: Path) -> None:
    module = WithAverage()
    fit(None, module=module, callbacks=(replacing(),), max_epochs=1)
    assert sorted(replaced(module.ema.module)) == ["conv", "hidden"]
    save_compressed(module, tmp_path / "module.lcz")
    loaded = load_compressed(tmp_path / "module.lcz", WithAverage()).eval()
    x = torch.randn(2, 12)
    assert torch.equal(loaded.ema(x), module.eval().ema(x))


def test_a_checkpoint_without_replaced_layers_is_refused(tmp_path: Path) -> None:
    fit(None, module=SmallModule(), folder=tmp_path, max_epochs=1)
    path = tmp_path / f"step={EPOCH}.ckpt"
    with pytest.raises(ValueError, match=r"step=12\.ckpt is of a fit without Replacing"):
        fit(None, module=SmallModule(), callbacks=(replacing(),), resume=path, max_epochs=2)


class MadeBefore(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.made


def test_an_optimizer_that_exists_is_refused_and_the_module_is_as_it_was() -> None:
    module = MadeBefore()
    with pytest.raises(ValueError, match=r"SGD was made before Replacing replaced 'net\.conv'"):
        fit(None, module=module, callbacks=(replacing(),))
    assert not replaced(module)
    fit(None, module=module, max_epochs=1)


@pytest.mark.parametrize("shared", [False, True])
def test_an_optimizer_of_a_weight_that_a_replaced_layer_has_no_more_is_refused(shared: bool) -> None:
    class ByName(SmallModule):
        def configure_optimizers(self) -> Any:
            rest = [one for one in self.parameters() if one.requires_grad] if shared else []
            return torch.optim.SGD([self.net.conv.weight, *rest], lr=0.1)

    module = ByName()
    weight = module.net.conv.weight
    with pytest.raises(
        ValueError, match=r"SGD was made for net\.conv\.weight, .* Let configure_optimizers take the pa"
    ):
        fit(None, module=module, callbacks=(replacing(),), max_epochs=1)
    assert module.net.conv.weight is weight


def test_two_callbacks_replace_their_own_layers_and_resume(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        callbacks = (Replacing({"net.conv": 2}), Replacing({"net.hidden": 3}))
        found = fit(None, module=small(), callbacks=callbacks, stateful=True, max_epochs=2, **options)
        assert [one.planned for one in callbacks] == [0 if "resume" in options else 1] * 2
        return found

    whole = run(folder=tmp_path)
    assert {"net.conv.first.weight", "net.hidden.first.weight"} <= set(whole["weights"])
    assert not differences(whole, run(resume=tmp_path / f"step={EPOCH}.ckpt"))


def test_a_lazy_network_is_refused_before_it_runs() -> None:
    module = SmallModule()
    module.net.hidden = nn.LazyLinear(8)
    with pytest.raises(ValueError, match=r"hidden\.weight is a lazy parameter without a shape: run one batch through"):
        fit(None, module=module, callbacks=(replacing(),), max_epochs=1)
    assert isinstance(module.net.hidden, nn.LazyLinear)


def test_what_can_not_be_replaced_is_refused_by_its_reason() -> None:
    module = SmallModule()
    module.net.hidden.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"hidden can't be replaced: it is frozen"):
        fit(None, module=module, callbacks=(replacing(),))
    assert not replaced(module)


def test_a_second_fit_says_that_the_layers_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    module, callback = SmallModule(), replacing()
    fit(None, module=module, callbacks=(callback,), max_epochs=1)
    layers = dict(replaced(module))
    with caplog.at_level("INFO"):
        fit(None, module=module, callbacks=(callback,), max_epochs=1)
    assert callback.planned == 1
    assert replaced(module) == layers
    assert "2 layers of SmallModule are replaced already" in caplog.text


class Late(SmallModule):
    """Makes its layers when the fit begins."""

    def __init__(self) -> None:
        super().__init__()
        self.late = None

    def configure_model(self) -> None:
        if self.late is None:
            self.late = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(super().forward(x))


def test_layers_of_configure_model_are_replaced_and_resumed(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        return fit(None, module=Late(), callbacks=(Replacing({"late": 2}),), stateful=True, max_epochs=2, **options)

    whole = run(folder=tmp_path)
    assert "late.first.weight" in whole["weights"]
    assert not differences(whole, run(resume=tmp_path / f"step={EPOCH}.ckpt"))


def test_test_and_predict_load_checkpoints_into_a_dense_module_and_dense_ones_back(tmp_path: Path) -> None:
    module = SmallModule()
    dense = ModelCheckpoint(tmp_path, filename="dense")
    quiet_trainer(callbacks=[dense], enable_checkpointing=True, max_epochs=1).fit(SmallModule(), shuffled(), plain())
    kept = ModelCheckpoint(tmp_path, filename="kept")
    trainer = quiet_trainer(callbacks=[replacing(), kept], enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, shuffled(), plain())
    expected = trainer.test(module, plain(), verbose=False)
    for one in (SmallModule(), module):
        other = quiet_trainer(callbacks=[replacing()])
        assert other.test(one, plain(), ckpt_path=tmp_path / "kept.ckpt", verbose=False) == expected
        assert sorted(replaced(one)) == sorted(RANKS)
        other.test(one, plain(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
        assert not replaced(one)
    with pytest.raises(RuntimeError, match="load_compressed replaces the same layers in a new SmallModule"):
        SmallModule.load_from_checkpoint(tmp_path / "kept.ckpt")
    loaded = load_compressed(tmp_path / "kept.ckpt", SmallModule())
    assert quiet_trainer().test(loaded, plain(), verbose=False) == expected


class Still(Callback):
    """Lets no optimizer change anything."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        for one in trainer.optimizers:
            one.param_groups[0]["lr"] = 0.0

    on_train_batch_start = lambda self, trainer, pl_module, *_: self.on_train_start(trainer, pl_module)  # noqa: E731


def fit_on_rank(*, still: bool = False, **options: Any) -> dict[str, Any]:
    """A job of the pair of ranks, of which each sees one of the two batches."""
    callbacks = (replacing(), *([Still()] if still else []))
    with recorded_forms():
        return fit(None, module=small(), callbacks=callbacks, strategy="ddp", devices=2, max_epochs=1, **options)


def test_two_ranks_agree_and_start_as_one_process_does(rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("trainer.test_replacing:fit_on_rank", tmp_path)
    assert not differences(first["weights"], second["weights"])
    first, second = rank_pair.run("trainer.test_replacing:fit_on_rank", tmp_path, still=True)
    assert not differences(first["weights"], second["weights"])
    alone = fit(None, module=small(), callbacks=(replacing(), Still()), max_epochs=1)
    assert "net.hidden.first.weight" in alone["weights"]
    for name, value in alone["weights"].items():
        if "norm.running" not in name and "num_batches" not in name:
            torch.testing.assert_close(first["weights"][name], value)


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}])
def test_a_fit_that_trains_nothing_replaces_nothing(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = SmallModule()
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[replacing()], **({"max_epochs": 1} | options)).fit(module, plain())
    assert not replaced(module)
    assert caplog.text.count(f"replaces nothing, because {next(iter(options))}=0: this fit trains nothing") == 1


def test_progress_is_the_share_of_the_parameters() -> None:
    module = SmallModule()
    dense = sum(one.numel() for one in module.parameters())
    callback = replacing()
    trainer = quiet_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(module, shuffled(), plain())
    share = sum(one.numel() for one in module.parameters()) / dense
    assert float(trainer.callback_metrics["compress/parameters_left"]) == pytest.approx(share)


def test_an_outline_has_a_row_for_each_layer() -> None:
    found = replacing().outline(SmallModule(), lambda: torch.zeros(2, 12))
    assert found is not None
    assert found.rows == [
        ["net.conv", "two_parts", "rank 2", "24", str(2 * 3 + 2 * 6 + 6)],
        ["net.hidden", "two_parts", "rank 4", "1,168", str(72 * 4 + 4 * 16 + 16)],
    ]


def test_the_loss_is_that_of_the_replaced_network() -> None:
    """The sanity check before the first step sees it already."""
    seen: list[float] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            x, y = plain().dataset.tensors
            seen.append(float(F.cross_entropy(pl_module(x), y)))
            assert sorted(replaced(pl_module)) == sorted(RANKS)

    fit(None, module=SmallModule(), callbacks=(replacing(), Watch()), max_epochs=1)
    assert len(seen) == 2


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision: Any) -> None:
    module = small()
    found = fit(None, module=module, callbacks=(replacing(),), max_epochs=1, precision=precision)
    dtype = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "64-true": torch.float64}[precision]
    assert found["weights"]["net.hidden.first.weight"].dtype == dtype


class Silent(SmallModule):
    """Logs nothing: torch.compile can't trace all of Lightning's `log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_module_that_is_compiled_as_a_whole_is_replaced_before_it_is_traced() -> None:
    module = Silent()
    trainer = quiet_trainer(callbacks=[replacing()], max_steps=2)
    trainer.fit(torch.compile(module, backend="eager"), shuffled())
    assert sorted(replaced(module)) == sorted(RANKS)


def test_a_fit_that_another_callback_refused_leaves_nothing_for_a_test() -> None:
    class Refuses(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":
                raise ValueError("refused")

    module = small()
    trainer = quiet_trainer(callbacks=[replacing(), Refuses()])
    with pytest.raises(ValueError, match="refused"):
        trainer.fit(module, shuffled())
    trainer.test(module, plain(), verbose=False)
    assert not replaced(module)


def test_data_that_would_be_lost_are_refused_by_name() -> None:
    module = small()
    module.example_input_array = torch.zeros(2, 12)
    with pytest.raises(ValueError, match=r"running generator.* Replacing reads 2 batches: let it read none"):
        quiet_trainer(callbacks=[replacing()]).fit(module, (batch for batch in shuffled()))
