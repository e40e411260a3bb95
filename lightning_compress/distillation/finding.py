"""What a user may pass as a teacher, to networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_compress.coding import load_compressed
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.inside import innermost


def find_teachers(given: Sequence[Any], student: LightningModule) -> list[nn.Module]:
    """Return the modules that teach.

    Args:
        given: Modules, LightningModules, and paths of files with weights.
        student: Whom they teach.

    Raises:
        TypeError: One is something else.
        ValueError: None is given, a file doesn't fit, or one shares parameters with the student.
    """
    if not given:
        raise ValueError("teacher=[] names no teacher: pass a module, or the path of a checkpoint.")
    found = [_module(one, student) for one in given]
    mine = {id(parameter): name for name, parameter in student.named_parameters()}
    for teacher in found:
        shared = [mine[id(parameter)] for parameter in teacher.parameters() if id(parameter) in mine]
        if shared:
            raise ValueError(
                f"The teacher shares {shared[0]} with the student, and would change with it: pass a copy, "
                f"copy.deepcopy(student), which stays what it is."
            )
    return found


def _module(given: Any, student: LightningModule) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, str | PathLike):
        return _from_file(given, innermost(student))
    raise TypeError(
        f"teacher is a module, a LightningModule, the path of a checkpoint, or a list of these; got "
        f"{type(given).__name__}. From a Hydra config of your own: hydra.utils.instantiate(config)."
    )


def _from_file(path: str | PathLike[str], student: LightningModule) -> nn.Module:
    copied = copy.deepcopy(student)
    copied.configure_model()  # where layers are made there
    try:
        loaded: nn.Module = load_compressed(path, copied)
    except ValueError as misfit:
        try:
            return type(student).load_from_checkpoint(Path(path), map_location="cpu")
        except Exception as failure:
            raise ValueError(
                f"teacher={str(path)!r} holds other weights than {type(student).__name__} has ({misfit}), and "
                f"{type(student).__name__}.load_from_checkpoint can't make the module that it was written with "
                f"({failure}): make that module yourself, and pass it instead of the path."
            ) from failure
    return loaded


def network_of(teacher: nn.Module, network: str) -> nn.Module:
    """Return what of a teacher maps inputs to outputs: of a LightningModule, the submodule at `network`.

    Raises:
        ValueError: There is no such submodule, or no forward.
    """
    if not isinstance(teacher, LightningModule):
        return teacher
    if not network and not is_overridden("forward", teacher):
        raise ValueError(
            f"The teacher {type(teacher).__name__} has no forward: pass network= with the path of the submodule whose "
            f"output is the prediction, or that submodule as the teacher."
        )
    return resolve_network(teacher, network)
