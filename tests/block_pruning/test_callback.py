"""Blocks leave during a fit: when, which, and what the rest of the fit sees."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from support.compare import differences
from support.jobs import fit
from support.small import BATCH, FEATURES, SAMPLES, ManualModule, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import BlockPruningCallback, load_compressed, save_compressed
from lightning_compress.block_pruning.influence import Influence
from lightning_compress.block_pruning.stand_in import stand_ins
from lightning_compress.stages.blocks import find_blocks
from lightning_compress.trainer.compatibility import IncompatibleError

EPOCH = SAMPLES // BATCH


class Deep(LightningModule):
    """Four blocks, of which the second and the last do harm, and the third does almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 10)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(10, 3)
        self.counted = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counted += 1
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(callback: BlockPruningCallback, module: LightningModule, *others: Callback, **options: Any) -> Any:
    seed_everything(3, verbose=False)
    trainer = quiet_trainer(callbacks=[*others, callback], **options)
    trainer.fit(module, shuffled(), plain())
    return trainer


def loss_without(module: Deep, gone: set[int]) -> float:
    """The mean loss on the first two batches of a loader that shuffles as it would now."""
    state = torch.get_rng_state()
    batches = [batch for _, batch in zip(range(2), shuffled(), strict=False)]
    torch.set_rng_state(state)
    losses = []
    for x, y in batches:
        h = module.first(x)
        for i, layer in enumerate(module.layers):
            h = h if i in gone else h + layer(h)
        losses.append(float(F.cross_entropy(module.head(h), y)))
    return sum(losses) / 2


class Greedy(Callback):
    """The same choice by hand, right before the event."""

    def __init__(self, number: int) -> None:
        self.number, self.chosen = number, list[int]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for _ in range(self.number):
                rest = [i for i in range(4) if i not in self.chosen]
                self.chosen.append(min(rest, key=lambda i: loss_without(pl_module, {*self.chosen, i})))


def test_the_blocks_without_which_the_loss_rises_least_leave_one_by_one() -> None:
    module, oracle = Deep(), Greedy(2)
    callback = BlockPruningCallback(0.5, schedule="one_shot", n_batches=2)
    fitted(callback, module, oracle, max_epochs=1)
    assert list(callback.removed) == [
        f"layers.{i}.0" for i in sorted(oracle.chosen)
    ]  # named after the layer with the MACs
    assert module.counted == EPOCH  # the evaluations left the module's own counters alone


def test_the_blocks_that_change_least_in_training_leave() -> None:
    module = Deep()
    for layer, scale in zip(module.layers, (1.0, 0.01, 1.0, 0.001), strict=True):
        layer[0].weight.data.mul_(scale)
        layer[0].bias.data.mul_(scale)
        layer.requires_grad_(False)
    callback = BlockPruningCallback(0.5, criterion="influence", schedule="one_shot", start_epoch=1.0)
    fitted(callback, module, max_epochs=2)
    assert list(callback.removed) == ["layers.1.0", "layers.3.0"]
    assert sorted(stand_ins(module)) == ["layers.1", "layers.3"]


class LayerDrop(nn.Module):
    """Leaves out other layers in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)
        self.dropped: list[set[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropped.pop(0) if self.dropped else set()
        for i, layer in enumerate(self.layers):
            x = x if i in dropped else x + layer(x)
        return self.head(x)


def test_the_influence_of_blocks_is_of_one_pass_where_others_drop_them() -> None:
    torch.manual_seed(0)
    net, first, second = LayerDrop(), torch.randn(5, 4), torch.randn(5, 4)
    measured = Influence(net, first, find_blocks(net, first).blocks)
    measured.watch()
    net.dropped = [{1, 2}, {0}]
    net(first)  # reads for the first block, whose sum the second layer would get
    net(second)  # the second layer gets what no block has made
    found = list(measured.scores().values())
    measured.stop()
    after = second + net.layers[1](second)
    cosine = F.cosine_similarity(second, after, dim=1).mean()
    assert found[0] != found[0]  # nobody saw the first block's sum
    assert found[1] == pytest.approx(1.0 - float(cosine.detach()), rel=1e-5)


def test_blocks_leave_a_few_at_a_time_and_monitors_count_anew(tmp_path: Path) -> None:
    seen = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(
                (
                    round(callback.share, 2),
                    sum(p.numel() for g in trainer.optimizers[0].param_groups for p in g["params"]),
                )
            )

    callback = BlockPruningCallback(1.0, n_batches=1, end_epoch=3.0)
    best = ModelCheckpoint(tmp_path, monitor="train_loss", filename="{step}")
    trainer = fitted(callback, Deep(), Watch(), best, enable_checkpointing=True, max_epochs=4)
    assert [share for share, _ in seen] == [0.25, 0.5, 1.0, 1.0]
    assert [size for _, size in seen] == [163 + 110 * n for n in (3, 2, 0, 0)]
    assert float(trainer.callback_metrics["compress/blocks_removed"]) == 1.0
    assert best.best_model_path.endswith(f"step={4 * EPOCH}.ckpt")  # and none from before the last block left
    assert callback.finished


@pytest.mark.parametrize("resume", [EPOCH, 2 * EPOCH, 3 * EPOCH])
def test_averages_lose_the_blocks_and_a_resume_is_exact(resume: int, tmp_path: Path) -> None:
    """Before the last removal, at it and after it."""

    def run(resume: Path | None = None, folder: Path | None = None) -> dict[str, Any]:
        callback = BlockPruningCallback(1.0, n_batches=1, end_epoch=2.0)
        average = EMAWeightAveraging(decay=0.9)
        return fit(None, module=SmallModule(residual=True), callbacks=(average, callback), resume=resume, folder=folder)

    whole = run(folder=tmp_path)
    again = run(resume=tmp_path / f"step={resume}.ckpt")
    assert differences(whole, again) == []
    assert not any("block" in name for name in whole["weights"])


def test_a_checkpoint_from_before_brings_the_blocks_back(tmp_path: Path) -> None:
    seed_everything(3, verbose=False)
    module = SmallModule(residual=True)
    callback = BlockPruningCallback(1.0, schedule="one_shot", start_epoch=1.5)
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(callbacks=[callback, files], enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, shuffled(), plain())
    thin = copy.deepcopy(module.state_dict())
    for step, there in ((EPOCH, True), (2 * EPOCH, False)):
        file = tmp_path / f"step={step}.ckpt"
        trainer.test(module, plain(), ckpt_path=file, verbose=False, weights_only=True)
        assert ("net.block1.conv1.weight" in module.state_dict()) is there
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert differences(dict(module.state_dict()), dict(saved)) == []
        save_compressed(module, tmp_path / "file.lcz")
        loaded = load_compressed(tmp_path / "file.lcz", SmallModule(residual=True))
        assert differences(dict(module.state_dict()), dict(loaded.state_dict())) == []
    assert differences(dict(module.state_dict()), dict(thin)) == []


def test_stochastic_depth_leaves_blocks_out_for_samples_in_training_alone() -> None:
    seen: dict[str, list[Tensor]] = {"train": [], "eval": []}

    class Watched(Deep):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = x + (out := layer(x))
            if not torch.compiler.is_compiling():
                seen["train" if self.training else "eval"].append((out == 0).all(1))
            return self.head(x)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 0:  # the network has run to find its blocks
                seen["train"].clear()
                seen["eval"].clear()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module = Watched()
    callback = BlockPruningCallback(0.0, stochastic_depth=0.5)
    fitted(callback, module, max_epochs=3)  # until two thirds of the fit
    first, later = torch.cat(seen["train"][: 2 * EPOCH]), torch.cat(seen["train"][2 * EPOCH :])
    assert 0.4 < float(first.float().mean()) < 0.6  # the last of four blocks
    assert not later.any()
    assert not torch.cat(seen["eval"]).any()
    assert not module.layers[3][1]._forward_hooks


def test_the_mean_of_a_branch_stays_under_stochastic_depth() -> None:
    callback = BlockPruningCallback(0.0, stochastic_depth=0.5)
    from lightning_compress.stages.block import Block

    callback._all = tuple(Block(f"{i}", "identity", "", "", (), 1) for i in range(4))
    callback.generator.manual_seed(0)
    for i, keep in enumerate((0.875, 0.75, 0.625, 0.5)):
        drawn = callback._draw(callback._all[i], torch.zeros(20_000, 1))
        assert sorted(drawn.unique().tolist()) == pytest.approx([0.0, 1 / keep])
        assert float(drawn.mean()) == pytest.approx(1.0, abs=0.03)
        callback._draw(callback._all[i], torch.zeros(7, 1))  # another pass in this step
        assert torch.equal(callback._draw(callback._all[i], torch.zeros(20_000, 1)), drawn)  # as gradients run it again


def test_a_second_fit_goes_on_without_the_blocks() -> None:
    module, callback = Deep(), BlockPruningCallback(0.5, schedule="one_shot", n_batches=1)
    fitted(callback, module, max_epochs=1)
    left = list(callback.removed)
    fitted(callback, module, max_epochs=1)
    assert list(callback.removed) == left
    fitted(BlockPruningCallback(0.5, schedule="one_shot", n_batches=1), module, max_epochs=1)  # half of the other two
    assert len(stand_ins(module)) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"amount": 1.5}, "amount is the fraction"),
        ({"criterion": "l1"}, "criterion must be one of loss, influence; got 'l1'"),
        ({"start_epoch": -1.0}, "start_epoch must be 0 or later"),
        ({"start_epoch": 2.0, "end_epoch": 1.0}, "end_epoch=1.0 must be later"),
        ({"n_batches": 0}, "n_batches must be a whole number, 1 or more; got 0"),
        ({"stochastic_depth": 1.0}, "stochastic_depth must be a probability"),
        (
            {"criterion": "influence", "schedule": "one_shot"},
            "start_epoch=0 there are none",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BlockPruningCallback(**options)


def test_fits_that_cannot_work_are_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"manual optimization that step trains: use criterion='influence'"):
        fitted(BlockPruningCallback(0.5), ManualModule(residual=True))
    with pytest.raises(ValueError, match="reads batches of one training loader, and there are 2: use criterion='infl"):
        quiet_trainer(callbacks=[BlockPruningCallback(0.5)]).fit(Deep(), [shuffled(), shuffled()])
    stream = (batch for batch in shuffled())
    callback = BlockPruningCallback(0.5, every_n_steps=3, example_inputs=torch.zeros(2, FEATURES))
    with pytest.raises(ValueError, match=r"reads batches anew at each event: .* running generator"):
        quiet_trainer(callbacks=[callback], max_steps=9).fit(Deep(), stream)
    with pytest.raises(ValueError, match=r"has no residual block"):
        fitted(BlockPruningCallback(0.5), SmallModule())
    with pytest.raises(ValueError, match=r"amount=0\.2 is less than the smallest block has"):
        fitted(BlockPruningCallback(0.2), Deep())
    with pytest.raises(ValueError, match=r"There is no block 'layers\.7'"):
        fitted(BlockPruningCallback(0.5, blocks="layers.7"), Deep())


def test_a_fit_that_ends_too_early_says_so() -> None:
    with pytest.warns(UserWarning, match=r"before the last blocks were to leave at step 24: 0% .* not 50%"):
        fitted(BlockPruningCallback(0.5, schedule="one_shot", start_epoch=2.0), Deep(), max_epochs=1)


def test_masks_of_other_techniques_are_refused_by_name() -> None:
    from lightning_compress import IterativePruningCallback

    with pytest.raises(
        IncompatibleError, match=r"BlockPruningCallback takes blocks out .* use BlockPruningCallback in an earlier fit"
    ):
        fitted(BlockPruningCallback(0.5), SmallModule(residual=True), IterativePruningCallback(0.5))


def test_a_loss_that_is_nan_names_no_block() -> None:
    class Diverged(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(ValueError, match="The loss of the training_step is NaN with all blocks"):
        fitted(BlockPruningCallback(0.5, schedule="one_shot"), Diverged(), max_epochs=1)


def test_a_block_without_which_the_loss_is_nan_stays() -> None:
    class Fragile(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.first(batch[0])
            ran = (self.layers[0](h) != 0).any()
            return super().training_step(batch, batch_idx) * torch.where(ran, 1.0, float("nan"))

    callback = BlockPruningCallback(0.75, schedule="one_shot")
    fitted(callback, Fragile(), max_epochs=1)
    assert list(callback.removed) == ["layers.1.0", "layers.2.0", "layers.3.0"]
