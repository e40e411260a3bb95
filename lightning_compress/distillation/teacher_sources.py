"""Make networks from everything that a user may pass as a teacher."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import fx, nn
from torch.export import ExportedProgram

from lightning_compress.coding import load_compressed
from lightning_compress.core.memory import shared_memory
from lightning_compress.core.tensors import named_tensors
from lightning_compress.trainer.unwrap import innermost


def find_teachers(given: Sequence[Any], student: LightningModule) -> list[nn.Module]:
    """Return the teachers as modules.

    Args:
        given: Modules, LightningModules, exported programs, and paths of files with weights.
        student: The LightningModule of the student.

    Raises:
        TypeError: A teacher is none of these.
        ValueError: No teacher is given, a file does not fit, or a teacher has no values, is a program in training mode,
            or shares memory with parameters that the student trains.
    """
    if not given:
        raise ValueError("teacher=[] contains no teacher: pass a module, or the path of a checkpoint.")
    found = [_module(one, student) for one in given]
    mine = {id(parameter): name for name, parameter in student.named_parameters()}
    for teacher in found:
        _refuse_training_graphs(teacher)
        if empty := next((name for name, one in named_tensors(teacher).items() if one.is_meta), None):
            raise ValueError(
                f"The teacher's {empty} is on the meta device and has no values: load the weights of "
                f"{type(teacher).__name__} first, or pass their path as the teacher."
            )
        shared = [mine[id(one)] for one in teacher.parameters() if id(one) in mine and one.requires_grad]
        shared += _in_memory_of(student, teacher)
        if shared:
            raise ValueError(
                f"The teacher shares {shared[0]} with the student, and would change with it: pass a copy, "
                f"copy.deepcopy(student), which does not change; or freeze the shared modules by requires_grad_(False)."
            )
    return found


def _in_memory_of(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Return the names of the student's trained parameters whose memory contains other tensors of the teacher."""
    mine = {f"student.{name}": one for name, one in student.named_parameters() if one.requires_grad}
    theirs = {f"teacher.{name}": one for name, one in named_tensors(teacher).items()}
    between = [pair for pair in shared_memory(mine | theirs) if pair[0] in mine and pair[1] in theirs]
    return [first.removeprefix("student.") for first, _ in between]


def _refuse_training_graphs(teacher: nn.Module) -> None:
    graphs = (module.graph for module in teacher.modules() if isinstance(module, fx.GraphModule))
    for node in (node for graph in graphs for node in graph.nodes):
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        if values.get("train") is True or values.get("training") is True:
            raise ValueError(
                f"The teacher is a program that was exported in training mode ({node.target}), which it can't leave: "
                f"export it after network.eval(), as lightning_compress.deploy.capture does."
            )


def load_teachers(module: LightningModule, paths: Sequence[str | PathLike[str]]) -> list[nn.Module]:
    """Return copies of a module, each with the weights of one file, as an ensemble of teachers.

    Args:
        module: A module of the class, and with the arguments, of the modules in the files.
        paths: Paths of checkpoints, state dicts or compressed files.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file does not fit the module.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_compress import save_compressed
        >>> written, path = BoringModel(), Path(tempfile.mkdtemp()) / "teacher.lcz"
        >>> _ = save_compressed(written, path)
        >>> (teacher,) = load_teachers(BoringModel(), [path])
        >>> bool((teacher.layer.weight == written.layer.weight).all())
        True
    """
    return [_load(path, module) for path in paths]


def _load(path: str | PathLike[str], module: LightningModule) -> nn.Module:
    copied = copy.deepcopy(module)
    copied.configure_model()  # some modules make their layers there
    loaded: nn.Module = load_compressed(path, copied)
    return loaded


def _module(given: Any, student: LightningModule) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, ExportedProgram):
        return given.module()
    if isinstance(given, str | PathLike):
        return _from_file(given, innermost(student))
    raise TypeError(
        f"teacher must be a module, a LightningModule, an exported program, the path of a checkpoint, or a list of "
        f"these; got {type(given).__name__}. Make a module of a Hydra config by hydra.utils.instantiate(config)."
    )


def _from_file(path: str | PathLike[str], student: LightningModule) -> nn.Module:
    kind, reason = type(student), "it was written with other hyperparameters"
    if not _other_hyperparameters(path, student):
        try:
            return _load(path, student)
        except ValueError as misfit:
            reason = str(misfit)
    try:
        return kind.load_from_checkpoint(Path(path), map_location="cpu", weights_only=True)
    except Exception as failure:  # whatever the class's own code raises
        raise ValueError(
            f"teacher={str(path)!r} is no {kind.__name__} like the student ({reason}), and {kind.__name__}."
            f"load_from_checkpoint can't make the module that it was written with ({failure}): make that module "
            f"yourself, and pass it instead of the path."
        ) from failure


def _other_hyperparameters(path: str | PathLike[str], student: LightningModule) -> bool:
    """Whether a checkpoint's module was made with other arguments, which shapes alone may not show."""
    if not zipfile.is_zipfile(path):  # the file is a compressed one, or does not exist
        return False
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        kind = type(student).__name__
        raise ValueError(
            f"teacher={str(path)!r} is damaged, or holds other objects than tensors and plain values, which are not "
            f"read because that can run code. If you trust the file, make the module yourself, by "
            f"{kind}.load_from_checkpoint(path, weights_only=False), and pass it instead of the path."
        ) from error
    theirs = content.get("hyper_parameters") if isinstance(content, dict) else None
    return theirs is not None and repr(dict(theirs)) != repr(dict(student.hparams))


def network_of(teacher: nn.Module, network: str, teacher_network: str | None) -> nn.Module:
    """Return the submodule of a teacher that maps inputs to outputs.

    Args:
        teacher: The teacher. By default a LightningModule's submodule at `network` is used, and any other module whole.
        network: The path of the network in the student.
        teacher_network: The path of the network in the teacher, where the default does not fit.

    Raises:
        ValueError: There is no such submodule, or no forward.
    """
    if teacher_network is None:
        if not isinstance(teacher, LightningModule):
            return teacher
        what, path = "network", network
    else:
        what, path = "teacher_network", teacher_network
    if not path and isinstance(teacher, LightningModule) and not is_overridden("forward", teacher):
        raise ValueError(
            f"The teacher {type(teacher).__name__} has no forward: pass teacher_network= with the path of the "
            f"submodule whose output is the prediction, or that submodule as the teacher."
        )
    owner = innermost(teacher) if isinstance(teacher, LightningModule) else teacher
    try:
        return owner.get_submodule(path)
    except AttributeError as error:
        children = ", ".join(repr(name) for name, _ in owner.named_children())
        raise ValueError(
            f"{what}={path!r} is no submodule of {type(owner).__name__}, whose children are {children}: pass "
            f"teacher_network= with its path in the teacher."
        ) from error
