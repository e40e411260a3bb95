from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import (
    DistillationModule,
    IterativePruningCallback,
    LotteryTicketCallback,
    QuantizationAwareTrainingCallback,
    SupermaskCallback,
    load_compressed,
    save_compressed,
)
from lightning_compress.trainer.compatibility import IncompatibleError

LAYERS = ("net.conv.weight", "net.hidden.weight", "net.head.weight")


def run(callback: Callback, *others: Callback, module: LightningModule | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = module or SmallModule()
    quiet_trainer(callbacks=[*others, callback], **options).fit(module, shuffled(), plain())
    return module


# ---------------------------------------------------------------------- training, written out by autograd


class TwoLayers(LightningModule):
    """A network whose supermask is written out by hand."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 3)
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.second(self.first(batch[0]).relu()), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Through(torch.autograd.Function):
    """The k largest, as hidden-networks writes it: the forward pass is a mask, the backward pass the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int) -> Tensor:
        out = torch.zeros_like(scores)
        out.view(-1)[scores.flatten().argsort(descending=True)[:kept]] = 1
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.02),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("method", ["edge_popup", "signed"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_against_training_scores_by_autograd(optimizer: str, method: Any, clip: float | None) -> None:
    torch.manual_seed(3)
    module = TwoLayers(OPTIMIZERS[optimizer]).double()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    callback = SupermaskCallback(0.7, method=method)
    first: dict[str, Tensor] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if not first:
                first.update({name: one.clone() for name, one in callback.latent.items()})

    options: dict[str, Any] = {"gradient_clip_val": clip, "precision": "64-true", "max_epochs": 2}
    quiet_trainer(callbacks=[callback, Look()], **options).fit(module, plain(0))

    scores = [nn.Parameter(first[f"{name}.weight"]) for name in ("first", "second")]
    by_hand = OPTIMIZERS[optimizer](scores)

    def masked(score: Tensor, name: str) -> Tensor:
        weight = before[f"{name}.weight"]
        kept = round(0.3 * weight.numel())
        mask = Through.apply(score.abs(), kept)
        if method == "signed":  # the sign times the mask of the magnitudes, straight through both
            mask = score + (mask * score.sign() - score).detach()
        return weight * mask

    for _ in range(2):
        for x, y in plain(0):
            hidden = F.linear(x.double(), masked(scores[0], "first"), before["first.bias"]).relu()
            by_hand.zero_grad()
            F.cross_entropy(F.linear(hidden, masked(scores[1], "second"), before["second.bias"]), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(scores, clip)  # the gradients of frozen biases do not count
            by_hand.step()
    for name, score in zip(("first", "second"), scores, strict=True):
        assert torch.allclose(callback.latent[f"{name}.weight"], score, rtol=0, atol=1e-10)
        assert torch.equal(module.get_parameter(f"{name}.weight"), masked(score, name).add(0.0))
        assert torch.equal(module.get_parameter(f"{name}.bias"), before[f"{name}.bias"])


def test_bernoulli_gradients_are_those_of_the_expected_loss_of_a_linear_layer() -> None:
    """For a loss that is linear in the weights, the mean gradient is the exact one of the expected loss."""
    from lightning_compress.supermask import SupermaskWeights

    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    weights, slopes = layer.weight.detach().clone(), torch.randn(2, 3)
    supermask = SupermaskWeights(layer, {"weight": 0.3}, method="bernoulli")
    scores = supermask.latent["weight"].clone().requires_grad_()
    (weights * torch.sigmoid(30 * scores) * slopes).sum().backward()
    (layer.weight * slopes).sum().backward()
    supermask.open()
    assert torch.allclose(layer.weight.grad, scores.grad, atol=1e-6)


# ---------------------------------------------------------------------- what the module holds


@pytest.mark.parametrize("method", ["edge_popup", "bernoulli", "signed"])
@pytest.mark.parametrize("init", ["as_is", "signed_constant", "uniform"])
def test_no_weight_is_trained(method: Any, init: Any) -> None:
    torch.manual_seed(0)
    start = {name: value.detach().clone() for name, value in SmallModule().named_parameters()}
    validated = []

    class Look(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                validated.append({name: pl_module.get_parameter(name).detach().clone() for name in LAYERS})

    callback = SupermaskCallback(0.6, method=method, init=init, seed=None if init == "as_is" else 4)
    module = run(callback, Look())
    for name, value in module.named_parameters():
        if name not in LAYERS:
            assert torch.equal(value, start[name])
    for held in (*validated, {name: module.get_parameter(name) for name in LAYERS}):
        for name, value in held.items():
            remains = value != 0
            if init == "as_is":
                ratio = value[remains] / start[name][remains]
                assert set(ratio.tolist()) <= ({1.0, -1.0} if method == "signed" else {1.0})
            if init == "signed_constant":
                assert len(value.abs()[remains].unique()) == 1
            if method != "bernoulli":
                assert int(remains.sum()) == round(0.4 * value.numel())
    assert any((validated[0][name] != validated[-1][name]).any() for name in LAYERS)


def test_the_file_of_a_fit_has_seeds_and_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    module = run(SupermaskCallback(0.8, method="signed", init="uniform", seed=9))
    size = save_compressed(module, tmp_path / "net.lcz")
    of = {one.names[0]: one.encoding for one in size.tensors}
    assert all(of[name].startswith("weights from a seed") for name in LAYERS)
    other = load_compressed(tmp_path / "net.lcz", SmallModule())
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "net.ckpt")
    again = load_compressed(tmp_path / "net.ckpt", SmallModule())
    assert save_compressed(again, tmp_path / "again.lcz").bytes == size.bytes


def test_fine_tuning_afterwards_makes_the_file_write_plain_weights(tmp_path: Path) -> None:
    module = run(SupermaskCallback(0.8, init="signed_constant", seed=9), max_epochs=1)
    quiet_trainer(max_epochs=1).fit(module, shuffled(), plain())
    size = save_compressed(module, tmp_path / "net.lcz")
    assert not any(one.encoding.startswith("weights from a seed") for one in size.tensors)
    for name, value in module.state_dict().items():
        assert torch.equal(load_compressed(tmp_path / "net.lcz")[name], value)


def test_others_train_on_request_and_what_exclude_names_trains_always() -> None:
    torch.manual_seed(0)
    start = {name: value.detach().clone() for name, value in SmallModule().named_parameters()}
    trained = run(SupermaskCallback(others="trained"))
    assert not torch.equal(trained.net.norm.weight, start["net.norm.weight"])
    module = run(SupermaskCallback(exclude="net.head"))
    assert not torch.equal(module.net.head.bias, start["net.head.bias"])
    assert not torch.equal(module.net.head.weight, start["net.head.weight"])
    assert torch.equal(module.net.norm.weight, start["net.norm.weight"])


@pytest.mark.parametrize("method", ["edge_popup", "bernoulli", "signed"])
def test_an_average_is_projected_onto_a_mask(method: Any) -> None:
    torch.manual_seed(0)
    start = {name: value.detach().clone() for name, value in SmallModule().named_parameters()}
    module = run(SupermaskCallback(0.6, method=method), EMAWeightAveraging(decay=0.8))
    for name in LAYERS:
        value = module.get_parameter(name).detach()
        ratio = value[value != 0] / start[name][value != 0]
        assert set(ratio.tolist()) <= ({1.0, -1.0} if method == "signed" else {1.0})
        if method != "bernoulli":
            assert int((value != 0).sum()) == round(0.4 * value.numel())


def test_regressors_of_a_wrapper_are_not_frozen() -> None:
    hint = {"student": "net.conv", "teacher": "net.conv", "regressor": True, "channel_dim": 1}
    wrapped = DistillationModule(SmallModule(), SmallModule(), hints=[hint])
    callback = SupermaskCallback()
    run(callback, module=wrapped, max_epochs=1)
    own = dict(SmallModule().named_parameters()).keys()
    assert set(callback._frozen) == own - {*LAYERS}


# ---------------------------------------------------------------------- bad input


class Groups(SmallModule):
    def configure_optimizers(self) -> Any:
        norms = [*self.net.norm.parameters()]
        rest = [one for one in self.parameters() if all(one is not norm for norm in norms)]
        return torch.optim.SGD([{"params": rest}, {"params": norms, "weight_decay": 0.1}], lr=0.01)


def test_weight_decay_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=0.1 of group 1 of SGD moves nothing: .*others='frozen'"):
        run(SupermaskCallback(), module=Groups())
    run(SupermaskCallback(others="trained"), module=Groups(), max_epochs=1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target": "net.norm.weight"}, r"net.norm.weight has the shape \(6,\)"),
        ({"target": "net.dropout"}, "selects no parameter"),
    ],
)
def test_layers_without_weights_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(SupermaskCallback(**settings))


def test_a_layer_of_zeros_is_refused() -> None:
    module = SmallModule()
    nn.init.zeros_(module.net.head.weight)
    with pytest.raises(ValueError, match=r"Every entry of net\.head\.weight is zero"):
        run(SupermaskCallback(), module=module)


@pytest.mark.parametrize(
    "settings",
    [
        {"amount": 1.0},
        {"amount": {}},
        {"method": "none"},
        {"init": "normal"},
        {"seed": 3},
        {"seed": -1, "init": "uniform"},
        {"rescale": True},
        {"others": "x"},
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SupermaskCallback(**settings)


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (IterativePruningCallback(0.5), "scores instead of weights"),
        (QuantizationAwareTrainingCallback(), "scores instead of weights"),
        (LotteryTicketCallback(0.3, rounds=1, target="net.head"), "going back under scores"),
    ],
)
def test_beside_a_technique_that_sets_the_same_weights(other: Callback, rule: str) -> None:
    with pytest.raises(IncompatibleError) as error:
        run(SupermaskCallback(target="net.hidden"), other)
    assert error.value.rule == rule
