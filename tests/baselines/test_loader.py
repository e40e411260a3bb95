from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from support.small import quiet_trainer
from torch import Tensor, nn

from lightning_compress.baselines import RandomShift, TensorLoader, loader


def make(n: int = 23, **kwargs: Any) -> TensorLoader:
    inputs = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).repeat(1, 1, 4, 4)
    return TensorLoader(inputs, torch.arange(n), **{"batch_size": 5, "shuffle": True, **kwargs})


def epoch_of(data: TensorLoader, epoch: int) -> list[list[int]]:
    data.sampler.set_epoch(epoch)
    return [targets.tolist() for _, targets in data]


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(loader, "rank", lambda: rank)
    monkeypatch.setattr(loader, "world_size", lambda: world_size)


def test_an_epoch_is_a_permutation_that_follows_from_seed_and_epoch_alone() -> None:
    data = make()
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(23))
    assert first != second
    torch.manual_seed(99)
    assert epoch_of(make(), 1) == second
    assert epoch_of(make(seed=1), 0) != first
    assert epoch_of(make(seed=1), 0) != second, "seed 1 must not be seed 0 one epoch later"


def test_inputs_stay_with_their_targets() -> None:
    for inputs, targets in make():
        assert torch.equal(inputs[:, 0, 0, 0], targets.float())


def test_drop_last_leaves_out_the_batch_that_is_not_full() -> None:
    assert [len(b) for b in epoch_of(make(), 0)] == [5, 5, 5, 5, 3]
    assert len(make()) == 5
    assert [len(b) for b in epoch_of(make(drop_last=True), 0)] == [5, 5, 5, 5]
    assert len(make(drop_last=True)) == 4


def test_an_iterator_made_before_set_epoch_uses_the_epoch_set_after() -> None:
    data = make()
    iterator = iter(data)
    data.sampler.set_epoch(7)
    assert [targets.tolist() for _, targets in iterator] == epoch_of(make(), 7)


@pytest.mark.parametrize("consumed", [0, 1, 4, 5])
def test_a_state_goes_on_with_the_next_batch(consumed: int) -> None:
    expected = epoch_of(make(), 3)
    data = make()
    data.sampler.set_epoch(3)
    iterator = iter(data)
    for _ in range(consumed):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(data.state_dict()))
    if consumed:
        assert resumed.state_dict() == data.state_dict(), "a save right after the load loses nothing"
    assert epoch_of(resumed, 3) == expected[consumed:]
    assert epoch_of(resumed, 3) == expected, "only the first iterator goes on"


def test_a_state_of_another_epoch_is_not_continued() -> None:
    data = make()
    epoch_of(data, 3)
    resumed = make()
    resumed.load_state_dict(data.state_dict())
    assert epoch_of(resumed, 4) == epoch_of(make(), 4)


def test_a_peeked_batch_can_be_put_back_in_the_middle_of_an_epoch() -> None:
    data = make()
    expected = epoch_of(data, 0)
    iterator = iter(data)
    seen = [next(iterator)[1].tolist()]
    state = data.state_dict()
    next(iter(data))
    data.load_state_dict(state)
    assert data.state_dict() == state
    seen += [targets.tolist() for _, targets in iterator]
    assert seen == expected
    assert epoch_of(data, 0) == expected


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 1}, {"n": 24}])
def test_a_state_from_other_settings_is_refused_with_both(change: dict[str, int]) -> None:
    data = make()
    next(iter(data))
    other = make(**change)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match=r"middle of epoch 0 by a TensorLoader with .*'batch_size': 5.*this one has"):
        next(iter(other))


@pytest.mark.parametrize("n", [20, 21, 22])
def test_training_ranks_get_equally_many_and_together_everything(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    shares = []
    for r in range(3):
        as_rank(monkeypatch, r, 3)
        data = make(n)
        shares.append(epoch_of(data, 2))
        assert len(data) == len(shares[r])
    assert len({tuple(len(b) for b in share) for share in shares}) == 1
    together = flat([flat(share) for share in shares])
    assert set(together) == set(range(n))
    assert len(together) == -(-n // 3) * 3


def test_more_ranks_than_samples_still_give_every_training_rank_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for r in range(7):
        as_rank(monkeypatch, r, 7)
        assert [len(b) for b in epoch_of(make(3), 0)] == [1]


@pytest.mark.parametrize("n", [20, 21, 22])
def test_evaluation_ranks_see_each_sample_exactly_once(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    together: list[int] = []
    for r in range(3):
        as_rank(monkeypatch, r, 3)
        data = make(n, shuffle=False)
        batches = epoch_of(data, 0)
        assert len(data) == len(batches)
        together += flat(batches)
    assert sorted(together) == list(range(n))


def test_augmentation_follows_from_seed_epoch_batch_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(x.shape, generator=generator)

    def draws(data: TensorLoader, epoch: int) -> list[Tensor]:
        data.sampler.set_epoch(epoch)
        return [inputs for inputs, _ in data]

    data = make(augment=noise, n=20)
    epoch0 = draws(data, 0)
    assert all(torch.equal(a, b) for a, b in zip(epoch0, draws(make(augment=noise, n=20), 0), strict=True))
    others = [*epoch0, *draws(data, 1)]
    as_rank(monkeypatch, 1, 2)
    others += draws(make(augment=noise, n=40), 0)
    assert len({float(x[0, 0, 0, 0]) for x in others}) == len(others)


def test_random_shift_equals_padding_and_slicing_sample_by_sample() -> None:
    x = torch.randn(50, 2, 5, 7)
    moved = RandomShift(2, flip=True)(x, torch.Generator().manual_seed(1))
    seen = set()
    for before, after in zip(x.numpy(), moved.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (2, 2), (2, 2)), mode="edge")
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (1, -1)
            if np.array_equal(padded[:, dy : dy + 5, dx : dx + 7][:, :, ::flip], after)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {1, -1}


def test_no_shift_is_the_image_itself() -> None:
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(RandomShift(0)(x, torch.Generator()), x)


def test_bad_arguments_are_quoted() -> None:
    with pytest.raises(ValueError, match="2 inputs and 3 targets"):
        TensorLoader(torch.zeros(2), torch.zeros(3), batch_size=1)
    with pytest.raises(ValueError, match="0 inputs"):
        TensorLoader(torch.zeros(0), torch.zeros(0), batch_size=1)
    with pytest.raises(ValueError, match="batch_size of TensorLoader must be at least 1; got 0"):
        TensorLoader(torch.zeros(2), torch.zeros(2), batch_size=0)
    with pytest.raises(ValueError, match="got -1"):
        RandomShift(-1)


class Recorder(L.LightningModule):
    """Remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.seen.append((self.current_epoch, inputs, targets))
        loss: Tensor = self.layer(inputs.flatten(1)).square().mean()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0].flatten(1)).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(
    folder: Path, ckpt_path: Path | None = None, *, checkpoint: dict[str, Any] | None = None, **kwargs: Any
) -> Recorder:
    module = Recorder()
    callbacks = (
        [L.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **checkpoint)] if checkpoint else []
    )
    trainer = quiet_trainer(callbacks=callbacks, enable_checkpointing=bool(callbacks), **kwargs)
    trainer.fit(module, make(augment=RandomShift(1)), make(shuffle=False), ckpt_path=ckpt_path)
    return module


# 5 batches an epoch: checkpoints in the middle, at the last batch, and after the validation of an epoch
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 15}])
@pytest.mark.parametrize("checkpoint", [{"every_n_train_steps": 1}, {"monitor": "val_loss"}])
def test_a_resumed_fit_sees_the_batches_of_the_uninterrupted_one(
    tmp_path: Path, limit: dict[str, int], checkpoint: dict[str, Any]
) -> None:
    L.seed_everything(0)
    full = fit(tmp_path, checkpoint=checkpoint, **limit).seen
    assert len(full) == 15
    files = {int(path.stem.split("=")[1]): path for path in tmp_path.glob("*.ckpt")}
    assert set(files) == (set(range(1, 16)) if "every_n_train_steps" in checkpoint else {5, 10, 15})
    for step in set(files) & {1, 5, 8, 10, 12, 15}:
        assert_same_batches(fit(tmp_path, files[step], **limit).seen, full[step:])


def test_a_fit_in_steps_resumed_twice_sees_the_batches_of_the_uninterrupted_one(tmp_path: Path) -> None:
    # each resume at an epoch's end makes the trainer count one epoch too many
    full = fit(tmp_path, max_epochs=-1, max_steps=22).seen
    ends, steps = {"monitor": "val_loss"}, {"every_n_train_steps": 1}
    fit(tmp_path / "1", checkpoint=ends, max_epochs=-1, max_steps=10)
    second = fit(tmp_path / "2", tmp_path / "1/step=5.ckpt", checkpoint=ends, max_epochs=-1, max_steps=15)
    third = fit(tmp_path / "3", tmp_path / "2/step=10.ckpt", checkpoint=steps, max_epochs=-1, max_steps=18)
    fourth = fit(tmp_path / "4", tmp_path / "3/step=13.ckpt", max_epochs=-1, max_steps=22)
    assert_same_batches(second.seen[:5] + third.seen[:3] + fourth.seen, full[5:])


def assert_same_batches(seen: list[tuple[int, Tensor, Tensor]], expected: list[tuple[int, Tensor, Tensor]]) -> None:
    assert len(seen) == len(expected)
    for (epoch, inputs, targets), (want_epoch, want_inputs, want_targets) in zip(seen, expected, strict=True):
        assert epoch == want_epoch
        assert torch.equal(targets, want_targets)
        assert torch.equal(inputs, want_inputs)


def test_a_second_fit_with_the_same_loader_starts_at_the_first_batch() -> None:
    data = make()
    seen = []
    for max_steps in (3, 5):  # the first one stops in the middle of the epoch
        module = Recorder()
        quiet_trainer(max_steps=max_steps).fit(module, data)
        seen.append([targets.tolist() for _, _, targets in module.seen])
    assert seen[0] == seen[1][:3]
    assert seen[1] == epoch_of(make(), 0)
