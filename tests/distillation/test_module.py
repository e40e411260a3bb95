"""DistillationModule against a loop written by hand, and as users would use it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.compare import differences
from support.small import (
    BATCH,
    CLASSES,
    FEATURES,
    SAMPLES,
    ManualModule,
    SmallModule,
    dataset,
    plain,
    quiet_trainer,
    shuffled,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress import DistillationModule, IterativePruningCallback, load_compressed, save_compressed
from lightning_compress.distillation.cache import Indexed
from lightning_compress.distillation.hint_hooks import Hint
from lightning_compress.trainer.scheduled import Scheduled
from lightning_compress.trainer.step_window import Ramp

HINT = {"student": "net.conv", "teacher": "net.conv", "regressor": True, "channel_dim": 1}


class Plain(LightningModule):
    """No dropout, no batch norm: a loop by hand is one line per step."""

    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def by_hand(student: Plain, teachers: list[Plain], alpha: float, temperature: float, shares: list[float]) -> Plain:
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for x, y in plain():
        with torch.no_grad():
            p = sum(
                share * F.softmax(teacher(x) / temperature, 1) for share, teacher in zip(shares, teachers, strict=True)
            )
        s = student(x)
        soft = F.kl_div(F.log_softmax(s / temperature, 1), p, reduction="batchmean") * temperature**2
        optimizer.zero_grad()
        ((1 - alpha) * F.cross_entropy(s, y) + alpha * soft).backward()
        optimizer.step()
    return student


def fitted(module: LightningModule, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1} | options))
    trainer.fit(module, plain())
    return trainer


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 4.0), (0.3, 1.0), (1.0, 20.0)])
def test_it_trains_as_the_loop_by_hand(alpha: float, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = Plain(), Plain(width=30)
    expected = by_hand(student, [teacher], alpha, temperature, [1.0])
    fitted(DistillationModule(student, teacher, alpha=alpha, temperature=temperature))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_several_teachers_are_averaged_as_probabilities() -> None:
    torch.manual_seed(0)
    student, teachers = Plain(), [Plain(width=30), Plain(width=5)]
    expected = by_hand(student, teachers, 0.7, 2.0, [0.75, 0.25])
    fitted(DistillationModule(student, teachers, alpha=0.7, temperature=2.0, teacher_weights=[3, 1]))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ the teacher stays what and where it is


def test_the_teacher_is_frozen_and_nowhere_in_the_student(tmp_path: Path) -> None:
    class Watched(SmallModule):
        modes: list[bool] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            self.modes.append(self.training or torch.is_grad_enabled() or self.net.norm.training)
            return super().forward(x)

    teacher = Watched()
    before = copy.deepcopy(teacher.state_dict())
    student = SmallModule()
    module = DistillationModule(student, teacher)
    module.train()
    teacher.train()  # by mistake
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, shuffled(), plain())
    assert teacher.modes
    assert not any(teacher.modes)
    assert differences(before, teacher.state_dict()) == []
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert len(list(module.modules())) == len(list(SmallModule().modules()))
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 8
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    SmallModule().load_state_dict(saved["state_dict"], strict=True)
    assert not any("teacher" in str(key) for key in saved)
    bare = quiet_trainer(max_epochs=2)
    bare.fit(SmallModule(), shuffled(), plain())
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    extra = (tmp_path / "last.ckpt").stat().st_size - (tmp_path / "bare.ckpt").stat().st_size
    assert extra < 30_000  # random states, no network


def test_batch_norms_of_the_teacher_use_the_batch_if_asked() -> None:
    teacher = SmallModule()
    module = DistillationModule(SmallModule(), teacher, teacher_train_bn=True)
    mean = teacher.net.norm.running_mean.clone()
    quiet_trainer(max_epochs=1).fit(module, shuffled())
    assert not torch.equal(mean, teacher.net.norm.running_mean)
    assert not teacher.net.dropout.training


@pytest.mark.parametrize(
    ("own", "options", "seen"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float64, {}, torch.float64),
        (torch.float32, {"teacher_autocast": True}, torch.bfloat16),
    ],
)
def test_the_teacher_computes_in_its_own_dtype(own: torch.dtype, options: dict[str, Any], seen: torch.dtype) -> None:
    found = []

    class Typed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            found.append(super().forward(x).dtype)
            return super().forward(x)

    teacher = Typed(nn.Linear(FEATURES, CLASSES)).to(own)
    fitted(DistillationModule(Plain(), teacher, **options), precision="bf16-mixed")
    assert set(found) == {seen}


def test_a_teacher_may_be_a_file(tmp_path: Path) -> None:
    teacher = Plain(width=8)
    trainer = fitted(teacher)
    trainer.save_checkpoint(tmp_path / "same.ckpt")
    save_compressed(teacher, tmp_path / "same.lcz")
    larger = Plain(width=40)
    fitted(larger).save_checkpoint(tmp_path / "larger.ckpt")
    for name, kind in (("same.ckpt", teacher), ("same.lcz", teacher), ("larger.ckpt", larger)):
        module = DistillationModule(Plain(width=8), str(tmp_path / name))
        (found,) = module._lightning_compress.levels[0].objective.teachers.networks
        assert differences(dict(found.state_dict()), dict(kind.state_dict())) == []
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="make that module yourself, and pass it instead of the path"):
        DistillationModule(Plain(), tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        DistillationModule(Plain(), tmp_path / "missing.ckpt")


class Activated(Plain):
    def __init__(self, activation: str = "tanh") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net[1] = nn.Tanh() if activation == "tanh" else nn.ReLU()


def test_a_file_says_what_network_its_weights_are_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fitted(Activated("relu")).save_checkpoint(tmp_path / "relu.ckpt")
    module = DistillationModule(Activated("tanh"), tmp_path / "relu.ckpt")
    (found,) = module._lightning_compress.levels[0].objective.teachers.networks
    assert isinstance(found.net[1], nn.ReLU)


def test_the_teachers_mode_is_seen_to_at_each_fit() -> None:
    teacher = SmallModule()
    module = DistillationModule(SmallModule(), teacher, teacher_train_bn=True)
    teacher.eval()
    teacher.net.dropout.train()
    quiet_trainer(max_epochs=1).fit(module, shuffled())
    assert teacher.net.norm.training
    assert not teacher.net.dropout.training
    assert teacher.net.norm.num_batches_tracked == SAMPLES // BATCH


def test_no_teacher_is_asked_for_nothing() -> None:
    teacher = Counted()
    fitted(DistillationModule(Plain(), teacher, alpha=0.0))
    assert teacher.calls == 0


def test_at_alpha_1_a_batch_needs_no_labels() -> None:
    torch.manual_seed(0)
    student, teacher = Unlabelled(), Plain(width=30)
    expected = by_hand(student, [teacher], 1.0, 4.0, [1.0])
    fitted(DistillationModule(student, teacher, alpha=1.0))
    torch.testing.assert_close(student.net[0].weight, expected.net[0].weight, rtol=1e-5, atol=1e-6)


class Unlabelled(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum() * float("nan")


def test_self_distillation_and_a_pruned_network_with_its_dense_self() -> None:
    module = SmallModule()
    quiet_trainer(max_epochs=1).fit(module, shuffled())
    pruning = IterativePruningCallback(0.8, end_epoch=1.0)
    trainer = quiet_trainer(max_epochs=2, callbacks=[pruning])
    trainer.fit(DistillationModule(module, copy.deepcopy(module)), shuffled())
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)
    with pytest.raises(ValueError, match=r"shares net\.conv\.weight with the student"):
        DistillationModule(module, module)
    view = SmallModule()
    view.net.head.weight.data = module.net.head.weight.data  # another Parameter, the same memory
    with pytest.raises(ValueError, match=r"shares net\.head\.weight with the student"):
        DistillationModule(module, view)


# ------------------------------------------------------------------ what the step sees and returns


class Returning(Plain):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.skipped = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.how == "skips" and batch_idx % 2:
            self.skipped += 1
            return None
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        logits.detach().zero_()  # what the step does with its logits later is its own affair
        return {"loss": loss, "logits": logits} if self.how == "dict" else loss


@pytest.mark.parametrize("how", ["dict", "skips"])
def test_steps_that_return_a_dict_or_nothing(how: str) -> None:
    torch.manual_seed(0)
    student, teacher = Returning(how), Plain(width=30)
    expected = by_hand(student, [teacher], 0.5, 4.0, [1.0])
    seen = []

    class Look(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs)

    module = DistillationModule(student, teacher, alpha=0.5)
    fitted(module, callbacks=[Look()], enable_checkpointing=True)
    if how == "dict":
        assert all(set(outputs) == {"loss", "logits"} for outputs in seen)
        torch.testing.assert_close(student.net[0].weight, expected.net[0].weight, rtol=1e-5, atol=1e-6)
    assert student.skipped == (6 if how == "skips" else 0)


class Shaped(Plain):
    """Outputs of a token per feature, (N, T, C), or of a pixel per feature, (N, C, H, W)."""

    def __init__(self, pixels: bool, keyword: bool = False) -> None:
        super().__init__()
        self.pixels, self.keyword = pixels, keyword
        self.net = Tokens()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        logits = self.net(x)
        return {"hidden": x, "logits": logits.permute(0, 2, 1).unflatten(2, (3, 4)) if self.pixels else logits}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mask = (batch[0] > 0).long()
        found = self(batch[0], mask=mask) if self.keyword else self(batch[0])
        return found["logits"].mean() * 0.0


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(-1))


def token_loss(student: nn.Module, teacher: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    total = torch.zeros(())
    for i, j in keep.nonzero().tolist():  # one position after the other
        p, q = F.softmax(teacher(x)[i, j] / 2, 0), F.softmax(student(x)[i, j] / 2, 0)
        total = total + 4 * sum(p[c] * (p[c] / q[c]).log() for c in range(CLASSES))
    return total / len(keep.nonzero())


@pytest.mark.parametrize(("pixels", "class_dim", "mask"), [(False, -1, None), (False, 2, "mask"), (True, 1, None)])
def test_tokens_and_pixels_count_like_samples(pixels: bool, class_dim: int, mask: str | None) -> None:
    torch.manual_seed(0)
    student, teacher = Shaped(pixels, keyword=mask is not None), Shaped(pixels)
    options = {"alpha": 1.0, "temperature": 2.0, "class_dim": class_dim, "mask": mask, "output": "logits"}
    module = DistillationModule(student, teacher, **options)
    batch = next(iter(plain()))
    keep = batch[0] > 0 if mask else torch.ones_like(batch[0])
    expected = token_loss(student.net, teacher.net, batch[0], keep)
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    with pytest.raises(ValueError, match="class_dim=-1 for tokens"):
        DistillationModule(student, teacher, output="logits").training_step(batch, 0)


def test_alpha_and_temperature_follow_their_schedules_and_are_logged() -> None:
    logged = []

    class Look(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            logged.append(
                [round(float(trainer.callback_metrics[f"compress/{name}"]), 4) for name in ("alpha", "temperature")]
            )
            assert trainer.global_step == 1 or trainer.callback_metrics["compress/distillation_loss"] > 0

    alpha = {"start": 0.0, "end": 1.0, "end_epoch": 2.0}
    module = DistillationModule(Plain(), Plain(), alpha=alpha, temperature={"start": 5, "end": 1, "schedule": "cosine"})
    fitted(module, max_epochs=3, callbacks=[Look()], enable_checkpointing=True, log_every_n_steps=1)
    assert [row[0] for row in logged[:4]] == [0.0, 0.0417, 0.0833, 0.125]
    late = Scheduled.of({"start": 8, "end": 2, "schedule": "one_shot"}, "temperature")
    late.ramp = Ramp(start=5, end=6, interval=1)
    assert [late.at(step) for step in (0, 4, 5, 9)] == [8, 8, 2, 2]
    assert logged[12][:2] == [0.5, 3.0]
    assert logged[-1][:2] == [1.0, 1.0]


# ------------------------------------------------------------------ a cache of the teacher's outputs


class Counted(Plain):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        return super().forward(x)


class Augmented(Dataset[Any]):
    """The same samples as `dataset()`, in tuples or dicts, which may change from epoch to epoch."""

    def __init__(self, noise: float = 0.0, keyed: bool = False) -> None:
        self.noise, self.keyed = noise, keyed

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Any:
        x, y = dataset()[i]
        x = x + self.noise * torch.randn(FEATURES)
        return {"x": x, "y": y} if self.keyed else (x, y)


class Keyed(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert list(batch) == ["x", "y"]
        return super().training_step((batch["x"], batch["y"]), batch_idx)


@pytest.mark.parametrize(("kind", "keyed", "where"), [(Plain, False, -1), (Keyed, True, "index")])
def test_a_cached_teacher_runs_once_per_sample_and_teaches_the_same(
    kind: type[Plain], keyed: bool, where: str | int
) -> None:
    results, calls = [], []
    for cache in (None, where):
        torch.manual_seed(0)
        student, teachers = kind(), [Counted(width=20), Counted(width=5)]
        data = Augmented(keyed=keyed)
        loader = DataLoader(data if cache is None else Indexed(data), batch_size=BATCH, shuffle=True)
        module = DistillationModule(student, teachers, index=cache)
        quiet_trainer(max_epochs=3).fit(module, loader)
        results.append(list(student.state_dict().values()))
        calls.append([teacher.calls for teacher in teachers])
    torch.testing.assert_close(*results)
    assert calls == [[3 * SAMPLES] * 2, [SAMPLES] * 2]


def test_a_cache_refuses_inputs_that_change_and_batches_without_an_index() -> None:
    loader = DataLoader(Indexed(Augmented(noise=0.1)), batch_size=BATCH)
    with pytest.raises(ValueError, match="Random augmentation changes the inputs"):
        quiet_trainer(max_epochs=2).fit(DistillationModule(Plain(), Plain(), index=-1), loader)
    with pytest.raises(ValueError, match=r"index='index' .* has nothing there: .*Indexed\(dataset\)"):
        fitted(DistillationModule(Plain(), Plain(), index="index"))
    with pytest.raises(ValueError, match="index=0 is no tensor of sample indices"):
        fitted(DistillationModule(Plain(), Plain(), index=0))


def test_a_resume_keeps_the_schedule_that_was_planned(tmp_path: Path) -> None:
    def module() -> DistillationModule:
        return DistillationModule(Plain(), Plain(), temperature={"start": 8, "end": 2})

    trainer = fitted(module(), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    longer = module()
    quiet_trainer(max_epochs=9).fit(longer, plain(), ckpt_path=tmp_path / "it.ckpt", weights_only=True)
    number = longer._lightning_compress.levels[0].objective.temperature
    assert number.ramp == Ramp(start=0, end=24, interval=1)  # two thirds of three epochs


# ------------------------------------------------------------------ hints


@pytest.mark.parametrize("kind", ["fitnet", "attention_transfer", "cosine"])
def test_a_hint_adds_its_weighted_loss(kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = SmallModule().eval(), SmallModule().eval()
    x = next(iter(plain()))
    found = []
    for weight in (0.0, 1.0, 3.0):
        hint = {"student": "net.conv", "teacher": "net.conv", "loss": kind, "weight": weight, "channel_dim": 1}
        found.append(DistillationModule(student, teacher, alpha=0.0, hints=[hint]).training_step(x, 0))
    v, u = (one.net.conv(x[0].unsqueeze(1)) for one in (student, teacher))
    maps = [one.square().sum(1) / one.square().sum(1).norm(dim=1, keepdim=True) for one in (v, u)]
    expected = {
        "fitnet": (v - u).square().mean(),
        "attention_transfer": (maps[0] - maps[1]).square().sum(1).mean(),
        "cosine": 1 - F.cosine_similarity(v, u, dim=1).mean(),
    }[kind]
    torch.testing.assert_close(found[1] - found[0], expected)
    torch.testing.assert_close(found[2] - found[0], 3 * expected)


def test_the_same_layer_may_have_two_hints_and_a_look_at_shapes_leaves_no_trace() -> None:
    torch.manual_seed(0)
    student = SmallModule()
    module = DistillationModule(student, SmallModule(), hints=[HINT, HINT])
    statistics = student.net.norm.running_mean.clone()

    class Stop(ModelCheckpoint):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert torch.equal(student.net.norm.running_mean, statistics)
            assert trainer.train_dataloader is None

    quiet_trainer(max_epochs=1, callbacks=[Stop()], enable_checkpointing=True).fit(module, shuffled())
    assert len(module._lightning_compress.levels[0].objective.auxiliary) == 2


def test_channels_may_be_last() -> None:
    torch.manual_seed(0)
    hint = Hint.of({"student": "a", "teacher": "a", "loss": "attention_transfer", "channel_dim": -1})
    v, u = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    first = Hint.of({"student": "a", "teacher": "a", "loss": "attention_transfer"})
    torch.testing.assert_close(hint.between(v, u, None), first.between(v.mT, u.mT, None))


def test_a_regressor_trains_and_is_kept_for_a_resume_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = SmallModule()
    module = DistillationModule(student, SmallModule(), hints=[HINT | {"weight": 5.0}])
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, shuffled(), plain())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == SmallModule().state_dict().keys()
    (state,) = saved["callbacks"].values()
    kept = state["technique"]["regressors"]
    assert {name: tuple(value.shape) for name, value in kept.items()} == {"0.weight": (6, 6, 1), "0.bias": (6,)}
    assert len(trainer.optimizers[0].state) == 10
    assert type(student) is SmallModule
    trainer.fit(module, shuffled(), plain())  # again, with what it has


def test_hints_bring_the_layers_together() -> None:
    def distance(weight: float) -> float:
        torch.manual_seed(0)
        student, teacher = SmallModule(), SmallModule()
        hint = {"student": "net.norm", "teacher": "net.norm", "loss": "cosine", "weight": weight, "channel_dim": 1}
        quiet_trainer(max_epochs=2).fit(DistillationModule(student, teacher, alpha=0.0, hints=[hint]), shuffled())
        x = dataset().tensors[0].unsqueeze(1)
        with torch.no_grad():
            mine, other = (one.net.eval().norm(one.net.conv(x)) for one in (student, teacher))
        return float(1 - F.cosine_similarity(mine, other, dim=1).mean())

    assert distance(10.0) < 0.5 * distance(0.0)


def test_patterns_of_callbacks_do_not_see_regressors_and_averages_keep_them_apart() -> None:
    pruning = IterativePruningCallback(0.5, end_epoch=1.0, target="*")
    module = DistillationModule(SmallModule(), SmallModule(), hints=[HINT])
    averaging = EMAWeightAveraging(decay=0.5)
    trainer = quiet_trainer(max_epochs=2, callbacks=[averaging, pruning])
    trainer.fit(module, shuffled(), plain())
    assert sorted(pruning.masks) == ["net.conv.weight", "net.head.weight", "net.hidden.weight"]


class Inplace(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


def test_features_are_those_before_an_activation_in_place() -> None:
    torch.manual_seed(0)
    student, teacher = Inplace(), Inplace()
    module = DistillationModule(student, teacher, alpha=0.0, hints=[{"student": "net.0", "teacher": "net.0"}])
    batch = next(iter(plain()))
    loss = module.training_step(batch, 0)
    loss.backward()
    own = F.cross_entropy(student(batch[0]), batch[1])
    expected = (student.net[0](batch[0]) - teacher.net[0](batch[0])).square().mean()
    torch.testing.assert_close(loss, own + expected)


# ------------------------------------------------------------------ what can't be


class Twice(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) + self(-batch[0]).square().mean()


class Direct(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Tupled(Plain):
    def forward(self, x: Tensor) -> Any:
        return self.net(x), x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])


class Graceless(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch[0])
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Hurting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))


class Headless(Plain):
    forward = LightningModule.forward


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (Plain, nn.Linear(FEATURES, 5), {}, r"shape \(8, 3\), the teacher's \(8, 5\): 3 classes against 5"),
        (Plain, nn.Unflatten(1, (3, 4)), {}, r"shape \(8, 3\), the teacher's \(8, 3, 4\)"),
        (Plain, Plain, {"network": "body"}, "network='body' is no submodule of Plain, whose children are 'net'"),
        (Direct, Plain, {}, "The forward of Direct was not called in the training_step .* pass network="),
        (Twice, Plain, {}, "The forward of Twice was called twice in one step"),
        (Tupled, Plain, {}, "student's network returns a tuple of 2, and no tensor: pass output="),
        (Plain, Tupled, {}, "teacher returns a tuple of 2, and no tensor: pass output="),
        (Tupled, Plain, {"output": 5}, "returns a tuple of 2, which has no output=5"),
        (Plain, Plain, {"alpha": 1.5}, r"alpha is the share of the teacher, 0 to 1; got 1\.5"),
        (Plain, Plain, {"alpha": {"start": 0.0, "end": -1}}, "alpha is the share of the teacher"),
        (Graceless, Plain, {}, "it has no gradient, and would teach the student nothing"),
        (Plain, Hurting(FEATURES, CLASSES), {}, "The teacher Hurting changes its inputs in place"),
        (Plain, Plain, {"alpha": {"start": "1", "end": 0}}, "The start of alpha is a number; got the text '1'"),
        (
            Plain,
            Plain,
            {"alpha": {"start": 1, "end": 0, "start_epoch": 3, "end_epoch": 2}},
            "alpha: end_epoch=2 must be later than start_epoch=3",
        ),
        (Plain, Plain, {"hints": ["net.0"]}, "A hint has student= and teacher=, .* got 'net.0'"),
        (Plain, Plain, {"alpha": {"from": 1, "end": 0}}, "alpha is a number, or a mapping with start and end"),
        (Plain, Plain, {"temperature": 0}, "temperature is a number above 0; got 0"),
        (Plain, Plain, {"temperature": float("nan")}, "temperature is a number.*; got nan"),
        (Plain, Plain, {"loss": "kl"}, "loss must be one of soft_target, logit_regression, cosine; got 'kl'"),
        (Plain, [Plain(), Plain()], {"teacher_weights": [1.0]}, "teacher_weights has 1 numbers for 2 teachers"),
        (Plain, [], {}, "contains no teacher"),
        (Plain, Headless, {}, "The teacher Headless has no forward: pass teacher_network="),
        (Plain, Plain, {"mask": "attention"}, "mask='attention' is no keyword argument"),
        (Plain, Plain, {"hints": [{"student": "net.0"}]}, "A hint has student= and teacher="),
        (
            Plain,
            Plain,
            {"hints": [{"student": "net.9", "teacher": "net.0"}]},
            r"Hint 'net\.9' from 'net\.0': the student Plain has no layer 'net\.9'; it has 'net'",
        ),
        (
            Plain,
            Plain(width=5),
            {"hints": [{"student": "net.0", "teacher": "net.0"}]},
            r"Hint 'net\.0' from 'net\.0': .* a regressor is needed",
        ),
        (Plain, Plain, {"hints": [{"student": "net.0", "teacher": "net.0", "loss": "l1"}]}, "loss of a hint is one of"),
        (
            Plain,
            [Plain(), Plain()],
            {"hints": [{"student": "net.0", "teacher": "net.0"}]},
            "Hints come from one teacher",
        ),
        (Plain, Plain, {"index": -1, "teacher_train_bn": True}, "index= keeps outputs only"),
        (ManualModule, SmallModule, {}, "does not support the manual optimization of ManualModule"),
    ],
)
def test_one_clear_error(
    student: Callable[[], LightningModule], teacher: Any, options: dict[str, Any], message: str
) -> None:
    teacher = teacher() if isinstance(teacher, type) else teacher
    with pytest.raises(ValueError, match=message):
        fitted(DistillationModule(student(), teacher, **options), fast_dev_run=True)


def test_hydra_makes_student_and_teacher() -> None:
    small = {"_target_": "support.small.SmallModule", "optimizer": "adam"}
    config = {"_target_": "lightning_compress.DistillationModule", "student": small, "teacher": [small, small]}
    module = instantiate(config | {"temperature": {"start": 8, "end": 1}}, _convert_="all")
    assert isinstance(module, SmallModule)
    quiet_trainer(max_epochs=1).fit(module, shuffled())


def test_a_teacher_of_no_kind_and_a_config_that_was_not_instantiated() -> None:
    with pytest.raises(TypeError, match=r"hydra\.utils\.instantiate"):
        DistillationModule(Plain(), {"_target_": "torch.nn.Linear"})  # type: ignore[arg-type]


def test_a_regressor_over_channels_that_were_cut_says_so() -> None:
    pruning = IterativePruningCallback(0.5, granularity="neuron", shrink="during_fit", end_epoch=1.0)
    module = DistillationModule(SmallModule(), SmallModule(), hints=[HINT])
    with pytest.raises(ValueError, match="the regressor was made for 6 channels of the student, and there are"):
        quiet_trainer(callbacks=[pruning]).fit(module, shuffled(), plain())


def test_averages_are_cut_with_the_network_beside_a_regressor() -> None:
    pruning = IterativePruningCallback(
        0.5, granularity="neuron", shrink="during_fit", end_epoch=1.0, target="net.hidden"
    )
    module = DistillationModule(SmallModule(), SmallModule(), hints=[HINT])
    averaging = EMAWeightAveraging(decay=0.5)
    quiet_trainer(max_epochs=2, callbacks=[averaging, pruning]).fit(module, shuffled(), plain())
    assert module.net.hidden.out_features == 8
    assert module.state_dict().keys() == SmallModule().state_dict().keys()


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


def test_a_compiled_network_learns_as_the_plain_one() -> None:
    with pytest.raises(ValueError, match=r"torch\.compile hides"):
        fitted(DistillationModule(Compiled(), Plain(), hints=[{"student": "net", "teacher": "net"}], network="net"))
    results = []
    for kind in (Plain, Compiled):
        torch.manual_seed(0)
        student = kind()
        torch.manual_seed(1)
        fitted(DistillationModule(student, Plain(), network="net"))
        results.append(list(student.state_dict().values()))
    torch.testing.assert_close(*results)


def test_a_run_goes_on_without_its_teacher(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = DistillationModule(SmallModule(), SmallModule())
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, shuffled(), plain())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    alone = SmallModule()
    quiet_trainer(max_epochs=2).fit(alone, shuffled(), plain(), ckpt_path=tmp_path / "it.ckpt", weights_only=True)
    assert load_compressed(tmp_path / "it.ckpt").keys() == alone.state_dict().keys()
    assert next(iter(DataLoader(dataset(), batch_size=BATCH)))[0].shape[0] == BATCH
