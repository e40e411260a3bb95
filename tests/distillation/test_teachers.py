"""Teachers: in which mode they run, what they may share with the student, and what may be one."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from support.small import CLASSES, FEATURES, plain, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import DistillationModule
from lightning_compress.deploy import capture
from lightning_compress.distillation.cache import Indexed
from lightning_compress.distillation.teachers import Teachers


class Student(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.05)


class Noted(nn.Module):
    """Notes the mode in which it is called, and who called it."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x


class AlwaysEvaluating(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class Merging(nn.Linear):
    """As a low-rank adapter: evaluation mode is more than a flag."""

    merged = False

    def train(self, mode: bool = True) -> Any:
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        assert self.merged is not self.training
        return super().forward(x)


def frozen() -> nn.Sequential:
    torch.manual_seed(1)
    parts = [Merging(FEATURES, 16), nn.BatchNorm1d(16), AlwaysEvaluating(16), nn.ReLU(), nn.Dropout(0.5), Noted()]
    return nn.Sequential(*parts).requires_grad_(False)


def made(shape: str) -> tuple[Student, nn.Module, nn.Module]:
    """A student, its teacher, and the frozen part that both have."""
    base = frozen()
    base.train()
    torch.manual_seed(2)
    student = Student(nn.Sequential(base, nn.Linear(16, CLASSES)))
    if shape == "side by side":
        return student, nn.Sequential(base, nn.Linear(16, CLASSES)), base
    head = nn.Linear(16, CLASSES).requires_grad_(False)
    teacher = nn.Sequential(base, head)
    if shape == "teacher in the student":
        student.teacher = teacher
        return student, teacher, base
    if shape == "student in the teacher":
        student.net = nn.Sequential(student.net.requires_grad_(False), nn.Linear(CLASSES, CLASSES))
        whole = LightningTeacher(teacher)
        whole.student = student.net[0]
        return student, whole, base
    student.teacher = LightningTeacher(teacher)
    return student, student.teacher, base


class LightningTeacher(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Unruly(Callback):
    """Changes modes in the middle of a fit, as users' hooks do."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for module in self.modules:
            module.train(batch_idx % 2 == 0)


SHAPES = ["side by side", "teacher in the student", "student in the teacher", "a LightningModule in the student"]


@pytest.mark.parametrize("unruly", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_frozen_part_of_both_is_in_the_mode_of_the_one_that_calls_it(shape: str, unruly: bool) -> None:
    """Against a loop by hand, in which the teacher runs on a copy of its own."""
    student, teacher, base = made(shape)
    by_hand, teacher_by_hand, _ = made(shape)
    trained = [one for one in by_hand.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    torch.manual_seed(7)
    for batch_idx, (x, y) in enumerate(plain()):
        own = copy.deepcopy(teacher_by_hand).eval()  # with the running statistics of this moment
        with torch.no_grad():
            t = own(x)
        if unruly:
            by_hand.train(batch_idx % 2 == 0)
        s = by_hand(x)
        soft = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean") * 16
        optimizer.zero_grad()
        (0.1 * F.cross_entropy(s, y) + 0.9 * soft).backward()
        optimizer.step()
    base[-1].modes.clear()
    module = DistillationModule(student, teacher)
    assert base.training
    assert base[0].training
    torch.manual_seed(7)
    callbacks = [Unruly(module)] if unruly else []
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(module, plain())
    teachers, students = base[-1].modes[::2], base[-1].modes[1::2]
    assert not any(teachers)
    assert students == ([number % 2 == 0 for number in range(len(students))] if unruly else [True] * len(students))
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_alpha_0_the_run_is_bit_for_bit_the_one_without_a_teacher(shape: str) -> None:
    bare, _, _ = made(shape)
    torch.manual_seed(7)
    quiet_trainer(max_epochs=2).fit(bare, plain())
    student, teacher, _ = made(shape)
    module = DistillationModule(student, teacher, alpha=0.0)
    torch.manual_seed(7)
    quiet_trainer(max_epochs=2).fit(module, plain())
    assert all(torch.equal(one, student.state_dict()[name]) for name, one in bare.state_dict().items())
    assert [one.training for one in bare.modules()] == [one.training for one in student.modules()]


def test_the_teachers_mode_is_seen_to_at_each_call() -> None:
    """Also where only a part of it, deep inside, is in another mode; a train() of its own is called."""
    part = nn.Sequential(Noted(), nn.Dropout(0.5), Merging(FEATURES, CLASSES))
    teachers = Teachers([nn.Sequential(nn.Sequential(part))])
    x = torch.ones(2, FEATURES)
    for module in (part[0], part[1], part[2], part):
        module.train()
        (first,), (second,) = teachers((x,), {}), teachers((x,), {})
        assert torch.equal(first, second)
        assert part[0].modes == [False, False]
        part[0].modes.clear()


def test_a_teacher_that_an_average_moves_is_asked_as_it_is_now() -> None:
    """The mean teacher: an average of the student, which the user's code updates."""

    class Follow(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            teacher.update_parameters(student.net)

    student = Student(nn.Sequential(nn.Linear(FEATURES, CLASSES), Noted()))
    teacher = torch.optim.swa_utils.AveragedModel(student.net)
    seen = []
    teacher.module.register_forward_pre_hook(lambda module, args: seen.append(module[0].weight.clone()))
    quiet_trainer(max_epochs=1, callbacks=[Follow()]).fit(DistillationModule(student, teacher), plain())
    assert not torch.equal(seen[1], seen[-1])
    assert not any(teacher.module[1].modes)
    assert all(student.net[1].modes)


def test_the_outputs_of_a_teacher_that_moves_are_not_kept() -> None:
    class Move(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                teacher.weight.mul_(0.5)

    teacher = nn.Linear(FEATURES, CLASSES)
    loader = DataLoader(Indexed(plain().dataset), batch_size=8)
    quiet_trainer(max_epochs=2).fit(
        DistillationModule(Student(nn.Linear(FEATURES, CLASSES)), teacher, index=-1), loader
    )
    module = DistillationModule(Student(nn.Linear(FEATURES, CLASSES)), teacher, index=-1)
    with pytest.raises(ValueError, match=r"has changed since its outputs were kept, which index=-1"):
        quiet_trainer(max_epochs=2, callbacks=[Move()]).fit(module, loader)


def test_running_statistics_that_the_student_shares_are_not_the_teachers_to_change() -> None:
    base = frozen()
    student = Student(nn.Sequential(base, nn.Linear(16, CLASSES)))
    with pytest.raises(ValueError, match=r"teacher_train_bn=True would change the running statistics of '0\.1'"):
        DistillationModule(student, nn.Sequential(base, nn.Linear(16, CLASSES)), teacher_train_bn=True)


@pytest.mark.parametrize("kind", ["the parameter", "its data", "a slice", "a buffer"])
def test_a_teacher_over_the_memory_of_the_student_is_refused(kind: str) -> None:
    student, teacher = Student(nn.Linear(FEATURES, CLASSES)), nn.Linear(FEATURES, CLASSES)
    weight = student.net.weight
    if kind == "a buffer":
        del teacher.weight
        teacher.register_buffer("weight", weight.detach())
    else:
        teacher.weight = {
            "the parameter": weight,
            "its data": nn.Parameter(weight.data, requires_grad=False),
            "a slice": nn.Parameter(weight.data[:2], requires_grad=False),
        }[kind]
    with pytest.raises(ValueError, match=r"shares net\.weight with the student"):
        DistillationModule(student, teacher)
    student.net.requires_grad_(False)
    DistillationModule(student, teacher)


def test_a_teacher_without_values_is_refused() -> None:
    with torch.device("meta"):
        teacher = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    with pytest.raises(ValueError, match=r"The teacher's 0\.weight is on the meta device and has no values"):
        DistillationModule(Student(nn.Linear(FEATURES, CLASSES)), teacher)
    with pytest.raises(ValueError, match=r"0\.weight .*is on the meta device and has no values"):
        capture(teacher, torch.zeros(2, FEATURES))


# ------------------------------------------------------------------ exported programs


def exported_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("given", ["program", "module", "inside"])
def test_an_exported_program_teaches_as_the_network_that_it_was_made_of(given: str) -> None:
    program = capture(exported_net(), torch.randn(4, FEATURES))
    teacher: Any = program if given == "program" else program.module()
    teacher = nn.Sequential(teacher, nn.Dropout(0.9)) if given == "inside" else teacher
    found = []
    for one in (teacher, exported_net()):
        torch.manual_seed(4)
        student = Student(nn.Linear(FEATURES, CLASSES))
        quiet_trainer(max_epochs=1).fit(DistillationModule(student, one), plain())
        found.append(student.net.weight)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(FEATURES), nn.Dropout(0.1)])
def test_a_program_that_was_exported_in_training_mode_is_refused(layer: nn.Module) -> None:
    net = nn.Sequential(layer, nn.Linear(FEATURES, CLASSES)).train()
    program = torch.export.export(net, (torch.randn(4, FEATURES),))
    with pytest.raises(ValueError, match=r"exported in training mode.*export it after network\.eval\(\)"):
        DistillationModule(Student(nn.Linear(FEATURES, CLASSES)), program)


def test_a_program_of_the_student_itself_is_over_its_memory() -> None:
    student = Student(nn.Linear(FEATURES, CLASSES))
    with pytest.raises(ValueError, match=r"shares net\.weight with the student"):
        DistillationModule(student, capture(student.net, torch.randn(4, FEATURES)))


# ------------------------------------------------------------------ networks at other paths


class Named(LightningModule):
    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        self.add_module(name, net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.student_net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", ["LightningModule", "module"])
def test_the_teachers_network_may_have_another_path(kind: str) -> None:
    net = exported_net()
    whole = (
        Named("backbone", nn.Sequential(net))
        if kind == "LightningModule"
        else nn.ModuleDict({"backbone": nn.Sequential(net)})
    )
    found = []
    for teacher, options in ((net, {}), (whole, {"teacher_network": "backbone.0"})):
        torch.manual_seed(4)
        student = Named("student_net", nn.Linear(FEATURES, CLASSES))
        module = DistillationModule(student, teacher, network="student_net", **options)
        quiet_trainer(max_epochs=1).fit(module, plain())
        found.append(student.student_net.weight)
    assert torch.equal(*found)
    student = Named("student_net", nn.Linear(FEATURES, CLASSES))
    with pytest.raises(ValueError, match=r"teacher_network='head' is no submodule of .*'backbone'"):
        DistillationModule(student, whole, network="student_net", teacher_network="head")
    if kind == "LightningModule":
        with pytest.raises(ValueError, match=r"network='student_net' is no submodule of Named.*teacher_network="):
            DistillationModule(student, whole, network="student_net")
        with pytest.raises(ValueError, match=r"no forward: pass teacher_network="):
            DistillationModule(student, whole, network="student_net", teacher_network="")


# ------------------------------------------------------------------ files


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Wide(Student):
    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, width), nn.Linear(width, CLASSES)))
        self.save_hyperparameters()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("where", ["beside", "hyperparameters", "weights", "another width"])
def test_a_teachers_file_runs_no_code(
    where: str, is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    teacher = Wide(9 if where == "another width" else 4)
    code = RunsCode(tmp_path / "ran")
    content: dict[str, Any] = {
        "state_dict": teacher.state_dict(),
        "hyper_parameters": dict(teacher.hparams),
        "pytorch-lightning_version": "2.6.4",
    }
    if where == "weights":
        content["state_dict"]["net.0.weight"] = code
    elif where == "hyperparameters":
        content["hyper_parameters"]["code"] = code
    else:
        content["code"] = code
    path = tmp_path / "teacher.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"make (that|the) module yourself"):
        DistillationModule(Wide(), path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # what the test is about: the file does run code where it may
    assert (tmp_path / "ran").exists()
