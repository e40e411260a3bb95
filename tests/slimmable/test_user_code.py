"""Widths beside what users' networks and Trainers have: checkpointed layers, averages of weights, cumulative norms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from support import jobs
from support.compare import differences
from support.ranks import RankPair
from support.small import CLASSES, FEATURES, SmallModule, plain, quiet_trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.channels.find import channel_groups
from lightning_compress.core.hooks import hooked
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.slimmable.norms import norms_of
from lightning_compress.slimmable.switch import thin_of

X = torch.zeros(2, FEATURES)


class Branches(nn.Module):
    """Concatenates two branches, so that a width's slice of what follows is no view."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)
        self.middle, self.norm, self.head = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)
        self.reentrant = reentrant

    def both(self, x: Tensor) -> Tensor:
        return F.relu(self.middle(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            found = self.both(x)
        else:
            found = checkpoint(self.both, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        logits: Tensor = self.head(self.norm(found))
        return logits


class Branched(SmallModule):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.net = Branches(reentrant)  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fitted(module: SmallModule, steps: int = 6, **options: Any) -> SlimmableWidth:
    seed_everything(1)
    wrapped = SlimmableWidth(module, (0.25, 0.5), network="net", example_inputs=X)
    quiet_trainer(max_steps=steps, **options).fit(wrapped, plain(0), plain())
    return wrapped


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_twice_train_as_others_do(reentrant: bool) -> None:
    found = []
    for way in (None, reentrant):
        seed_everything(0)
        found.append(fitted(Branched(way)).state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, msg=name)


def on_rank(reentrant: bool | None, averages: bool) -> dict[str, Tensor]:
    seed_everything(0)
    callbacks = [WeightAveraging()] if averages else []
    seen = fitted(Branched(reentrant), strategy="ddp", devices=2, callbacks=callbacks).state_dict()
    return {name: one for name, one in seen.items() if "running" not in name}


@pytest.mark.parametrize("averages", [False, True])
def test_checkpointed_layers_and_averages_on_two_ranks(averages: bool, rank_pair: RankPair, tmp_path: Path) -> None:
    found = [
        rank_pair.run("slimmable.test_user_code:on_rank", tmp_path, reentrant=way, averages=averages)
        for way in (None, False)
    ]
    for first, second in found:
        for name, tensor in first.items():
            assert torch.equal(second[name], tensor), name
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, msg=name)


def test_thin_networks_follow_averages_of_weights() -> None:
    """Lightning writes averages through `.data`, which no version counter sees."""
    module = fitted(Branched(), callbacks=[WeightAveraging()], steps=24, max_epochs=2).eval()
    x = torch.randn(5, FEATURES)
    for width in (0.25, 0.5):
        module.set_width(width)
        with torch.no_grad():
            now = module(x)
            again = module.extract(width, example_inputs=X).eval()(x)
        torch.testing.assert_close(now, again)


def test_a_resume_with_averages_inside_an_epoch_is_exact(tmp_path: Path) -> None:
    options: dict[str, Any] = {"stateful": True, "every_n_train_steps": 14, "max_epochs": 2}
    whole = jobs.fit("widths", folder=tmp_path / "whole", callbacks=(WeightAveraging(),), **options)
    resume = tmp_path / "whole" / "step=14.ckpt"
    again = jobs.fit("widths", folder=tmp_path / "again", callbacks=(WeightAveraging(),), resume=resume, **options)
    assert differences(whole, again) == []


def test_kept_copies_are_those_of_the_average_without_a_new_call_of_set_width() -> None:
    module = fitted(Branched(), callbacks=[WeightAveraging()], steps=24, max_epochs=2)
    network: Any = module.net
    x = torch.randn(5, FEATURES)
    thin = thin_of(network, 0.5)
    assert thin.gathered() > 0
    module.eval()
    thin.refresh(gradients=False)
    with torch.no_grad():
        torch.testing.assert_close(thin.module(x), module.extract(0.5, example_inputs=X).eval()(x))


def test_norms_with_cumulative_means_have_them_for_each_width() -> None:
    seed_everything(0)
    module = SmallModule()
    module.net.norm.momentum = None
    wrapped = SlimmableWidth(module, (0.5,), example_inputs=X)
    assert module.net.norm.momentum is None
    seen: dict[int, list[Tensor]] = {}
    with hooked(
        module.net.norm.register_forward_pre_hook(
            lambda layer, args: (
                seen.setdefault(args[0].shape[1], []).append(args[0].detach().mean((0, 2))) if layer.training else None
            )
        )
    ):
        quiet_trainer(max_steps=5).fit(wrapped, plain(0))
    held = norms_of(wrapped)
    assert held is not None
    (narrow,) = held.of(0.5).values()
    for channels, norm in ((6, module.net.norm), (3, narrow)):
        assert len(seen[channels]) == 5
        assert int(norm.num_batches_tracked) == 5
        torch.testing.assert_close(norm.running_mean, torch.stack(seen[channels]).mean(0))
    thin = wrapped.extract(0.5)
    assert thin.net.norm.momentum is None  # type: ignore[union-attr]


def test_modules_in_a_plain_list_are_named() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(3, 4), nn.Linear(4, 2)]
            self.last = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            found: Tensor = self.last(x)
            return found

    network = Hidden()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"modules in a plain list, 'layers', which .* make it an nn.ModuleL"):
        channel_groups(network, torch.zeros(2, 3))
    assert network.state_dict().keys() == before.keys()


def test_private_norms_that_no_optimizer_trains_may_be_frozen() -> None:
    class Alone(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    wrapped = SlimmableWidth(Alone(), (0.5,), example_inputs=X)
    with pytest.raises(ValueError, match=r"no optimizer trains: width_norms.* or freeze them with requires"):
        quiet_trainer(max_steps=1).fit(wrapped, plain(0))
    held = norms_of(wrapped)
    assert held is not None
    held.requires_grad_(False)
    before = copy.deepcopy(held.state_dict())
    quiet_trainer(max_steps=2).fit(wrapped, plain(0))
    name = next(name for name in before if name.endswith("norm.weight"))
    assert torch.equal(held.state_dict()[name], before[name])
