"""Criteria that compare with earlier weights, against loops over the entries and a search for the factor a."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback
from lightning_compress.pruning.criteria.choose import check_criterion
from lightning_compress.pruning.criteria.from_start import FROM_START, compared, scores_from_start
from lightning_compress.pruning.criterion_hooks import CriterionHooks
from lightning_compress.pruning.masks import prune_weights

ALONE = [name for name in FROM_START if not name.startswith(("large_init_", "small_init_"))]


def by_hand(criterion: str, before: float, now: float) -> float:
    sign = (now > 0) - (now < 0) == (before > 0) - (before < 0)
    increase = abs(now) - abs(before)
    return {
        "small_final": -abs(now),
        "large_init": abs(before),
        "small_init": -abs(before),
        "magnitude_increase": increase,
        "movement": abs(now - before),
        "magnitude_increase_same_sign": increase if sign else 0.0,
        "magnitude_increase_diff_sign": 0.0 if sign else increase,
        "large_final_same_sign": abs(now) if sign else 0.0,
        "large_final_diff_sign": 0.0 if sign else abs(now),
    }[criterion]


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "b": (3, 4, 2)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("criterion", ALONE)
def test_scores_are_the_formulas(criterion: str) -> None:
    start, now = weights(0), weights(1)
    start["a"][0, 0] = 0.0
    for name in start:
        expected = [
            by_hand(criterion, *pair)
            for pair in zip(start[name].flatten().tolist(), now[name].flatten().tolist(), strict=True)
        ]
        assert compared(criterion, start[name], now[name]).flatten().tolist() == expected


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", ALONE)
def test_the_order_is_that_of_the_scores_and_no_two_are_equal(criterion: str, scope: str) -> None:
    start, now = weights(0), weights(1)
    order = scores_from_start(criterion, now, start, generator=torch.Generator(), scope=scope)
    groups = [["a", "b"]] if scope == "global" else [["a"], ["b"]]
    for names in groups:
        places = torch.cat([order[name].flatten() for name in names])
        scores = torch.cat([compared(criterion, start[name], now[name]).flatten() for name in names])
        assert sorted(places.tolist()) == list(range(len(places)))
        assert (scores[places.argsort()].diff() >= 0).all()


def searched(small: bool, start: Tensor, now: Tensor, keep: int) -> set[int]:
    """Deepen both cuts by one entry at a time, until no more than `keep` entries are beyond both."""
    beyond: set[int] = set()
    for depth in range(len(now) + 1):
        sides = [torch.argsort(one.abs(), descending=not small)[:depth].tolist() for one in (start, now)]
        beyond = set(sides[0]) & set(sides[1])
        if len(beyond) == keep:
            return beyond
    raise AssertionError("two entries came at once: choose another seed")


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("criterion", ["large_init_large_final", "small_init_small_final"])
def test_both_cuts_are_equally_deep(criterion: str, dead: bool) -> None:
    start, now = weights(0), weights(1)
    living = {
        name: torch.rand(one.shape, generator=torch.Generator().manual_seed(5)) < 0.7 for name, one in now.items()
    }
    alive = living if dead else None
    flat = [torch.cat([one.flatten() for one in side.values()]) for side in (start, now)]
    places = torch.cat([one.flatten() for one in living.values()]).nonzero().flatten() if dead else torch.arange(59)
    total, keep = len(flat[0]), 12
    scores = scores_from_start(criterion, now, start, generator=torch.Generator(), alive=alive)
    masks = prune_weights(scores, 1 - keep / total, alive=alive)
    kept = torch.cat([mask.flatten() for mask in masks.values()]).nonzero().flatten().tolist()
    expected = searched(criterion.startswith("small"), flat[0][places], flat[1][places], keep)
    assert set(kept) == {int(places[index]) for index in expected}
    if not dead and criterion == "large_init_large_final":  # the same set by the paper's formula, with its factor a
        cuts = [min(one.abs()[index].item() for index in kept) for one in flat]
        assert all(min(cuts[0] / cuts[1] * abs(flat[1][i]), abs(flat[0][i])) >= cuts[0] - 1e-12 for i in kept)


def test_equal_scores_are_ordered_at_random_over_all_tensors() -> None:
    start = {name: torch.ones(1000) for name in ("a", "b")}
    now = {name: -torch.ones(1000) for name in ("a", "b")}  # every sign has changed
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    seen = []
    for _ in range(20):
        scores = scores_from_start("large_final_same_sign", now, start, generator=generator)
        masks = prune_weights(scores, 0.9)
        seen.append(torch.cat(list(masks.values())))
        counts += torch.stack([half.sum() for mask in masks.values() for half in mask.chunk(2)])
    assert not torch.equal(seen[0], seen[1])
    assert (counts / 20 - 50).abs().max() < 5  # 50 of 500 are expected; the deviation of a mean of 20 is 1.4
    again = scores_from_start("large_final_same_sign", now, start, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(list(prune_weights(again, 0.9).values())), seen[0])


def test_what_makes_no_sense_is_refused() -> None:
    start = weights(0)
    with pytest.raises(ValueError, match=r"'movement' compares weights .* none has changed since"):
        scores_from_start("movement", start, start, generator=torch.Generator())
    now = weights(1)
    now["b"][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="Scores are NaN: b"):
        scores_from_start("movement", now, start, generator=torch.Generator())
    with pytest.raises(ValueError, match="'large_init_large_final' compares ranks of single weights"):
        check_criterion("large_init_large_final", "neuron", "global", regrow=False)
    with pytest.raises(ValueError, match="'movement' looks at a weight's whole training"):
        IterativePruningCallback(criterion="movement", granularity="neuron", shrink="during_fit")
    callback = IterativePruningCallback(0.5, criterion="movement", schedule="one_shot")
    with pytest.raises(ValueError, match="training steps must come before the first pruning"):
        quiet_trainer(callbacks=[callback]).fit(SmallModule(), shuffled(), plain())


# ---------------------------------------------------------------------- in a fit


class Look(Callback):
    """Keeps the weights of the fit's start, and those right before the prune after step 24."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = {name: one.detach().clone() for name, one in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 24:
            self.before = {name: one.detach().clone() for name, one in pl_module.named_parameters()}


@pytest.mark.parametrize("criterion", ["movement", "large_init_large_final", "magnitude_increase_diff_sign"])
def test_a_fit_compares_with_the_weights_of_its_start(criterion: str) -> None:
    torch.manual_seed(0)
    look, module = Look(), SmallModule()
    pruning = IterativePruningCallback(0.6, criterion=criterion, schedule="one_shot", start_epoch=2.0, scope="layer")  # type: ignore[arg-type]
    quiet_trainer(callbacks=[look, pruning], max_epochs=3).fit(module, shuffled(), plain())
    for name, mask in pruning.masks.items():
        order = scores_from_start(
            criterion, {name: look.before[name]}, {name: look.start[name]}, generator=torch.Generator()
        )[name]
        score = order if criterion.endswith("final") else compared(criterion, look.start[name], look.before[name])
        tie = 1 if criterion.endswith("final") else 0  # the smaller ranks of two entries may be equal
        assert score[mask].min() >= score[~mask].max() - tie
        assert int((~mask).sum()) == round(0.6 * mask.numel())
    assert pruning._criterion.start == {}  # nothing more is compared, so that no checkpoint carries it


def test_channels_have_the_sums_over_their_weights() -> None:
    torch.manual_seed(0)
    look, module = Look(), SmallModule()
    pruning = IterativePruningCallback(
        0.5,
        criterion="movement",
        granularity="neuron",
        schedule="one_shot",
        start_epoch=2.0,
        target=["net.hidden", "net.conv"],
        scope="layer",
        shrink="never",
    )
    quiet_trainer(callbacks=[look, pruning], max_epochs=3).fit(module, shuffled(), plain())
    for name in ("net.hidden.weight", "net.conv.weight"):
        moved = (look.before[name] - look.start[name]).abs().flatten(1).sum(1)
        kept = pruning.masks[name].flatten(1).any(1)
        assert int(kept.sum()) == len(kept) // 2
        assert moved[kept].min() >= moved[~kept].max()


def test_a_resume_compares_with_the_first_start(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> IterativePruningCallback:
        torch.manual_seed(0)
        pruning = IterativePruningCallback(0.6, criterion="movement", start_epoch=1.0, end_epoch=3.0)
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer(callbacks=[pruning, saved], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(SmallModule(), plain(0), plain(), **options)
        return pruning

    whole = fit(4)
    state = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["callbacks"]
    assert "start" not in str(next(iter(state.values())).get("statistic"))
    resumed = fit(4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in resumed.masks.items())


def test_a_second_fit_goes_on_comparing_with_the_start_of_the_first() -> None:
    torch.manual_seed(0)
    look, module = Look(), SmallModule()
    pruning = IterativePruningCallback(0.6, criterion="large_init", start_epoch=5.0, end_epoch=6.0)
    with pytest.warns(UserWarning, match="before the pruning ramp did"):
        quiet_trainer(callbacks=[look, pruning], max_epochs=2).fit(module, shuffled(), plain())
    quiet_trainer(callbacks=[pruning], max_epochs=8).fit(module, shuffled(), plain())
    assert pruning.finished
    kept = torch.cat([look.start[name][mask].abs() for name, mask in pruning.masks.items()])
    gone = torch.cat([look.start[name][~mask].abs() for name, mask in pruning.masks.items()])
    assert kept.min() >= gone.max()


def test_earlier_weights_are_sliced_with_a_cut() -> None:
    hooks, thin = CriterionHooks("large_init", "weight"), nn.Linear(2, 2)
    hooks.compare_from({"weight": torch.arange(6.0).view(2, 3)})
    state = hooks.state_dict()
    assert state is not None
    hooks.follow(state, {"weight": {1: torch.tensor([0, 2])}})
    order = hooks.score({"weight": thin.weight}, None, torch.Generator())[0]["weight"]
    assert order.tolist() == [[0.0, 1.0], [2.0, 3.0]]
