"""Training of supermasks beside loops by hand, and what the callback refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small import SmallModule, dataset, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import BinaryWeightsCallback, IterativePruningCallback, SupermaskCallback
from lightning_compress.supermask import SupermaskWeights

HIDDEN, HEAD = 72 * 16, 16 * 3


def fitted(module: Any = None, *others: Any, **options: Any) -> tuple[SmallModule, SupermaskCallback]:
    torch.manual_seed(0)
    module = SmallModule() if module is None else module
    callback = SupermaskCallback(**options)
    quiet_trainer(callbacks=[callback, *others], max_epochs=2).fit(module, shuffled(), plain())
    return module, callback


def by_hand(scores: Tensor, kept: int, *, signs: bool) -> Tensor:
    mask = torch.zeros_like(scores).flatten()
    for place in sorted(range(scores.numel()), key=lambda one: -abs(float(scores.flatten()[one])))[:kept]:
        mask[place] = 1.0 if not signs or scores.flatten()[place] > 0 else -1.0
    return mask.view_as(scores)


@pytest.mark.parametrize("signs", [False, True])
def test_training_equals_a_loop_by_hand_over_scores(signs: bool) -> None:
    torch.manual_seed(1)
    net = nn.Linear(7, 5, bias=False)
    weights = net.weight.detach().clone()
    supermask = SupermaskWeights(net, {"weight": 0.6}, method="signed" if signs else "edge_popup")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    scores = nn.Parameter(supermask.latent["weight"].clone())
    expected = torch.optim.SGD([scores], lr=0.3, momentum=0.9, weight_decay=0.01)
    x, y = torch.randn(20, 7), torch.randint(5, (20,))
    changed = 0
    for _ in range(12):
        mask = by_hand(scores.detach(), 14, signs=signs)
        assert torch.equal(net.weight.detach(), weights * mask + 0.0)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        supermask.open()
        optimizer.step()
        supermask.close()
        soft = scores if signs else scores.abs()  # autograd goes through the absolute value as well
        through = weights * (mask + soft - soft.detach())
        expected.zero_grad()
        F.cross_entropy(x @ through.t(), y).backward()
        expected.step()
        torch.testing.assert_close(supermask.latent["weight"], scores.detach())
        changed += int((by_hand(scores.detach(), 14, signs=signs) != mask).sum())
    assert changed > 0


def test_only_the_mask_is_learned_and_other_parameters_stay() -> None:
    torch.manual_seed(0)
    start = SmallModule()
    before = {name: one.detach().clone() for name, one in start.named_parameters()}
    module, callback = fitted(start, amount=0.75)
    for name, parameter in module.named_parameters():
        if name in callback.masks:
            assert torch.equal(parameter.detach(), before[name] * callback.masks[name] + 0.0)
            assert int(parameter.count_nonzero()) == round(0.25 * parameter.numel())
        else:
            assert torch.equal(parameter.detach(), before[name])
    with callback.real_weights(module):
        assert torch.equal(module.net.hidden.weight.detach(), before["net.hidden.weight"])
    assert int(module.net.hidden.weight.count_nonzero()) == round(0.25 * HIDDEN)


def test_others_may_train_and_what_is_excluded_trains_as_usual() -> None:
    torch.manual_seed(0)
    start = SmallModule()
    before = {name: one.detach().clone() for name, one in start.named_parameters()}
    trained, _ = fitted(start, amount=0.75, others="trained")
    assert not torch.equal(trained.net.norm.weight.detach(), before["net.norm.weight"])
    torch.manual_seed(0)
    module, callback = fitted(SmallModule(), amount=0.75, exclude="net.head")
    assert "net.head.weight" not in callback.masks
    assert int(module.net.head.weight.count_nonzero()) == HEAD
    assert not torch.equal(module.net.head.bias.detach(), before["net.head.bias"])
    assert torch.equal(module.net.hidden.bias.detach(), before["net.hidden.bias"])


def test_new_weights_follow_from_the_seed_alone() -> None:
    start = [fitted(init="signed_constant", seed=5)[1]._weights.initial["net.hidden.weight"] for _ in range(2)]
    assert torch.equal(*start)
    assert start[0].abs().unique().tolist() == pytest.approx([(2 / 72) ** 0.5])
    other = fitted(init="signed_constant", seed=6)[1]._weights.initial["net.hidden.weight"]
    assert not torch.equal(other, start[0])


def test_a_sample_of_bernoulli_changes_at_every_step_and_the_kept_one_only_with_the_scores() -> None:
    torch.manual_seed(0)
    net = nn.Linear(40, 40)
    supermask = SupermaskWeights(net, {"weight": 0.5}, method="bernoulli", generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([net.weight], lr=0.0)
    held, kept = [], []
    for _ in range(3):
        net.weight.grad = torch.ones_like(net.weight)
        supermask.open()
        optimizer.step()
        supermask.close()
        held.append(net.weight.detach().clone())
        supermask.show()
        kept.append(net.weight.detach().clone())
        supermask.project()
    assert not torch.equal(held[0], held[1])
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert 0.4 < float((kept[0] != 0).float().mean()) < 0.6


class Grouped(SmallModule):
    """Biases and norms have a group of their own, with weight decay."""

    def configure_optimizers(self) -> Any:
        weights = [one for one in self.parameters() if one.dim() > 1]
        others = [one for one in self.parameters() if one.dim() < 2]
        return torch.optim.SGD([{"params": weights}, {"params": others, "weight_decay": 0.1}], lr=0.05)


@pytest.mark.parametrize(
    ("others", "options", "message"),
    [
        ((), {"target": "net.norm"}, r"net\.norm\.weight has the shape \(6,\): a supermask is for the weights"),
        ((BinaryWeightsCallback(),), {}, "keeps the weights of net.conv.weight.* fixed and trains scores instead"),
        ((IterativePruningCallback(0.5, end_epoch=1),), {}, "fixed and trains scores instead"),
    ],
)
def test_one_clear_error(others: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(None, *others, **options)


def test_weight_decay_that_moves_nothing() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 of group 1 of SGD moves nothing"):
        fitted(Grouped())
    fitted(Grouped(), others="trained")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, "amount is the fraction to remove, from 0 to below 1"),
        ({"amount": {}}, r"amount=\{\} names no layer"),
        ({"method": "popup"}, "method='popup' is unknown; expected one of 'edge_popup', 'bernoulli', 'signed'"),
        ({"init": "normal"}, "init='normal' is unknown"),
        ({"rescale": "all"}, "rescale='all' is unknown"),
        ({"others": "free"}, "others='free' is unknown; expected 'frozen' or 'trained'"),
        ({"seed": 3}, "seed=3 is for new weights, and init='as_is' keeps those of the network"),
        ({"seed": -1, "init": "uniform"}, "seed is a whole number from 0 to"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupermaskCallback(**options)


def test_scores_of_zero_weights_never_remain() -> None:
    torch.manual_seed(0)
    module = SmallModule()
    gone = torch.rand(module.net.hidden.weight.shape) < 0.7
    module.net.hidden.weight.data[gone] = 0.0
    module, callback = fitted(module, amount=0.5)
    assert not bool(callback.masks["net.hidden.weight"][gone].any())
    assert int(module.net.hidden.weight.count_nonzero()) == int((~gone).sum())  # fewer than half were there


def test_data_are_what_masks_learn_from() -> None:
    x, y = dataset().tensors
    before = F.cross_entropy(SmallModule().eval()(x), y)
    torch.manual_seed(0)
    module = SmallModule("adam")
    callback = SupermaskCallback(0.5, method="signed", init="signed_constant", rescale="fan", seed=0)
    quiet_trainer(callbacks=[callback], max_epochs=20).fit(module, shuffled(), plain())
    assert float(F.cross_entropy(module.eval()(x), y)) < 0.8 * float(before)


@pytest.mark.parametrize("per_kept", [False, True])
def test_an_average_of_samples_has_the_share_of_the_time_that_each_weight_remained(per_kept: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(40, 20, bias=False)
    weights = net.weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    held = SupermaskWeights(net, {"weight": 0.5}, method="bernoulli", per_kept=per_kept, generator=generator)
    samples = torch.rand(200, *weights.shape, generator=generator) < 0.5
    factors = samples[0].numel() / samples.flatten(1).sum(1) if per_kept else torch.ones(len(samples))
    average = (samples * weights * factors[:, None, None]).mean(0)
    found = torch.sigmoid(30 * held._scores_of("weight", average))
    torch.testing.assert_close(found, samples.float().mean(0), atol=0.05, rtol=0)
