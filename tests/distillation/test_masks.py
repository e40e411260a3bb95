"""Positions that don't count, whatever the networks return there; and outputs that nothing is compared with."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import DistillationModule
from lightning_compress.distillation.hint_hooks import Hint
from lightning_compress.distillation.hint_losses import attention_transfer_loss, fitnet_loss, left_out

TAGS, WORDS, WIDTH = 5, 9, 8


def sentences() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (32, 6), generator=generator)
    return DataLoader(TensorDataset(ids, torch.arange(6) < torch.randint(2, 7, (32, 1), generator=generator)), 8)


class Padded(nn.Linear):
    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(padding.shape).masked_fill(padding, math.nan)[..., None]


class Tagger(LightningModule):
    """Its features are NaN, its logits -inf where there is padding."""

    def __init__(self, how: str = "bool") -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(WORDS, WIDTH), Padded(WIDTH, WIDTH), nn.Linear(WIDTH, TAGS)
        self.how = how

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        padding = torch.zeros_like(ids).bool() if mask is None else mask == 0
        features = self.body(self.embedding(ids), padding).masked_fill(padding[..., None], 0.0)
        return self.head(features) + torch.zeros(ids.shape).masked_fill(padding, -math.inf)[..., None]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, counts = batch
        given = {"bool": counts, "long": counts.long(), "float": counts.float(), "none": None}[self.how]
        if self.how == "none":
            return F.cross_entropy(self(ids, mask=None).flatten(0, 1), ids.flatten() % TAGS)
        return F.cross_entropy(self(ids, mask=given)[counts], ids[counts] % TAGS)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def soft(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(s / 4, -1), F.softmax(t / 4, -1), reduction="batchmean") * 16


BY_HAND = {
    "soft_target": soft,
    "logit_regression": lambda s, t: (s - t).square().sum() / 2 / len(s),
    "cosine": lambda s, t: (1 - F.cosine_similarity(s, t, -1)).mean(),
}


@pytest.mark.parametrize("how", ["bool", "long", "float", "none"])
@pytest.mark.parametrize("loss", BY_HAND)
def test_padding_is_as_if_it_were_not_there(loss: Any, how: str) -> None:
    torch.manual_seed(0)
    student, teacher = Tagger(how), Tagger()
    by_hand = copy.deepcopy(student)
    optimizer = by_hand.configure_optimizers()
    for ids, counts in sentences():
        mask = torch.ones_like(counts) if how == "none" else counts
        with torch.no_grad():
            t = teacher(ids)[mask]
        s = by_hand(ids)[mask]
        optimizer.zero_grad()
        (0.1 * F.cross_entropy(s, ids[mask] % TAGS) + 0.9 * BY_HAND[loss](s, t)).backward()
        optimizer.step()
    module = DistillationModule(student, teacher, mask="mask", class_dim=-1, loss=loss)
    quiet_trainer(max_epochs=1).fit(module, sentences())
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("regressor", [False, True])
@pytest.mark.parametrize("kind", ["fitnet", "attention_transfer", "cosine"])
def test_hints_leave_padding_out_too(kind: str, regressor: bool) -> None:
    """The features are NaN there; without it, all that counts is compared."""
    if regressor and kind == "attention_transfer":
        pytest.skip("needs none")
    torch.manual_seed(0)
    student, teacher = Tagger(), Tagger()
    hint = {"student": "body", "teacher": "body", "loss": kind, "channel_dim": -1, "regressor": regressor}
    module = DistillationModule(
        student, teacher, mask="mask", class_dim=-1, hints=[hint], example_inputs={"ids": torch.zeros(2, 6).long()}
    )
    quiet_trainer(max_epochs=1).fit(module, sentences())
    assert all(one.isfinite().all() for one in module.parameters())
    auxiliary = module._lightning_compress.levels[0].objective.auxiliary
    assert all(one.isfinite().all() for one in auxiliary.parameters())


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_the_losses_of_hints_are_those_of_the_positions_that_count(channel_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    v, u = (torch.randn(2, 4, 3, generator=generator).requires_grad_() for _ in range(2))
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    rows, goals = v[mask], u[mask].detach()
    zeroed = [one.detach() * mask[..., None] for one in (v, u)]
    maps = [F.normalize(one.square().sum(-1), dim=-1) for one in zeroed]
    expected = {
        "fitnet": (rows - goals).square().mean(),
        "cosine": (1 - F.cosine_similarity(rows, goals, -1)).mean(),
        "attention_transfer": (maps[0] - maps[1]).square().sum() / 2,
    }
    with torch.no_grad():
        for one in (v, u):
            one[~mask] = math.nan
    for kind, value in expected.items():
        hint = Hint(student="a", teacher="b", loss=kind, channel_dim=channel_dim)  # type: ignore[arg-type]
        features = [one if channel_dim == -1 else one.movedim(-1, 1) for one in (v, u)]
        found = hint.between(*features, None, mask)
        torch.testing.assert_close(found.detach(), value.detach())
        (gradient,) = torch.autograd.grad(found, v)
        assert gradient.isfinite().all()
        assert not gradient[~mask].any()
    out = left_out(mask, (2, 3, 4), 1)
    torch.testing.assert_close(fitnet_loss(v.movedim(-1, 1), u.movedim(-1, 1), left_out=out), expected["fitnet"])
    assert attention_transfer_loss(v.movedim(-1, 1), u.movedim(-1, 1), left_out=out).isfinite()
    with pytest.raises(ValueError, match="which of their positions the mask is for"):
        left_out(mask, (2, 4, 4), None)


def test_what_the_mask_means_and_where_it_fits_no_features_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Pooled(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            logits = super().forward(ids, mask)
            return logits + 0 * self.pool(self.embedding(ids).mean(1)).sum()

    hint = {"student": "pool", "teacher": "pool"}
    module = DistillationModule(Pooled(), Pooled(), mask="mask", class_dim=-1, hints=[hint])
    with caplog.at_level("INFO"):
        quiet_trainer(max_epochs=2).fit(module, sentences())
    counts = next(iter(sentences()))[1]
    said = [one.message for one in caplog.records if "mask=" in one.message]
    assert len(said) == 2
    assert f"where it is 1 or True, at {int(counts.sum())} of 48 positions" in said[0]
    assert "is none of the positions of its features of shape (8, 8), which all count" in said[1]


class Labelling(Tagger):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, counts = batch
        labels = (ids % TAGS).masked_fill(~counts, -100)
        logits = self(ids, labels=labels)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_labels_are_no_mask() -> None:
    module = DistillationModule(Labelling(), Tagger(), mask="labels", class_dim=-1)
    with pytest.raises(ValueError, match=r"mask='labels': The mask holds .*labels != -100"):
        quiet_trainer(max_epochs=1).fit(module, sentences())


# ------------------------------------------------------------------ outputs of other kinds


class Detector(LightningModule):
    """As torchvision's: losses in training mode, one dict per image in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        return {"loss": y.square().mean()} if self.training else [{"boxes": row} for row in y]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])["loss"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def vectors() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(0))), 8)


@pytest.mark.parametrize("weight", [2.0, 0.0])
def test_at_alpha_0_hints_train_alone_whatever_the_outputs_are(weight: float) -> None:
    torch.manual_seed(0)
    student, teacher = Detector(), Detector()
    by_hand = copy.deepcopy(student)
    optimizer = by_hand.configure_optimizers()
    for (x,) in vectors():
        optimizer.zero_grad()
        hint = F.mse_loss(by_hand.a(x), teacher.a(x).detach())
        (by_hand(x)["loss"] + weight * hint).backward()
        optimizer.step()
    hints = [{"student": "a", "teacher": "a", "weight": weight}]
    quiet_trainer(max_epochs=1).fit(DistillationModule(student, teacher, alpha=0.0, hints=hints), vectors())
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)


def test_a_hint_of_weight_0_is_none() -> None:
    """Its features may be infinite, and its layer need not be there."""
    hints = [{"student": "nowhere", "teacher": "a", "weight": 0.0, "regressor": True}]
    student, bare = Detector(), Detector()
    bare.load_state_dict(student.state_dict())
    quiet_trainer(max_epochs=1).fit(DistillationModule(student, Detector(), alpha=0.0, hints=hints), vectors())
    quiet_trainer(max_epochs=1).fit(bare, vectors())
    assert all(torch.equal(one, student.state_dict()[name]) for name, one in bare.state_dict().items())


class Regressor(Detector):
    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu()).sum(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()


def test_regressors_of_one_number_per_sample() -> None:
    torch.manual_seed(0)
    student, teacher = Regressor(), Regressor()
    by_hand = copy.deepcopy(student)
    optimizer = by_hand.configure_optimizers()
    for (x,) in vectors():
        optimizer.zero_grad()
        y = by_hand(x)
        (0.1 * y.square().mean() + 0.9 * (y - teacher(x).detach()).square().mean() / 2).backward()
        optimizer.step()
    quiet_trainer(max_epochs=1).fit(DistillationModule(student, teacher, loss="logit_regression"), vectors())
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)


class Returned:
    def __init__(self, logits: Tensor) -> None:
        self.loss, self.logits = logits.sum(), logits


class Returning(Detector):
    """As networks of transformers, which return an object, or a dict, with the logits in it."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.as_dict = as_dict

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        return {"loss": y.sum(), "logits": y} if self.as_dict else Returned(y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0])
        return (output["logits"] if self.as_dict else output.logits).square().mean()


def test_the_logits_of_an_output_are_understood() -> None:
    torch.manual_seed(0)
    student, teacher = Returning(as_dict=False), Returning(as_dict=True)
    by_hand = copy.deepcopy(student)
    optimizer = by_hand.configure_optimizers()
    for (x,) in vectors():
        optimizer.zero_grad()
        y = by_hand(x).logits
        (0.1 * y.square().mean() + 0.9 * soft(y, teacher(x)["logits"].detach())).backward()
        optimizer.step()
    quiet_trainer(max_epochs=1).fit(DistillationModule(student, teacher), vectors())
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-6)
