"""Run the frozen networks that a student learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only


class Teachers:
    """Teacher networks that run without gradients, in evaluation mode and in their own dtype.

    A module that the student shares, such as a frozen backbone, is in the teacher's mode only while the teacher runs,
    and gets its earlier mode back afterwards. A copy of this object shares the networks, because they don't change.

    Args:
        networks: The teacher, or the members of an ensemble.
        roots: For each network the module that contains it, in which layers are named; None: the networks themselves.
        student: The student, which may share frozen modules with the networks.
        train_bn: Whether their batch norms use the statistics of the batch, as in training.
        autocast: Whether the teachers run under the autocast of the fit (bf16-mixed).

    Raises:
        ValueError: With `train_bn`, the student shares a batch norm.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        >>> teachers = Teachers([network])
        >>> (logits,) = teachers((torch.ones(4, 2),), {})
        >>> logits.requires_grad, network.training
        (False, False)
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        roots: Sequence[nn.Module] | None = None,
        student: nn.Module | None = None,
        train_bn: bool = False,
        autocast: bool = False,
    ) -> None:
        self.networks = list(networks)
        self.roots = self.networks if roots is None else list(roots)
        self.train_bn = train_bn
        self.autocast = autocast
        self._device = "cpu"
        self._dtypes = [_dtype(network) for network in self.networks]
        self._settle(student)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        return self

    def to(self, device: torch.device | str, student: nn.Module | None = None) -> None:
        """Move the networks to a device, and set the mode of the modules that the student does not share."""
        self._device = torch.device(device).type
        for root in self.roots:
            root.to(device)
        self._settle(student)

    def version(self) -> int:
        """Return a number that grows whenever a weight or buffer of the networks is written to."""
        return sum(
            one._version
            for root in self.roots
            for one in (*root.parameters(), *root.buffers())
            if not one.is_inference()
        )

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return what each network returns for these arguments."""
        outputs = []
        with torch.no_grad():
            for network, root, modes, dtype in zip(self.networks, self.roots, self._modes, self._dtypes, strict=True):
                versions = [(one, one._version) for one in tree_leaves((args, dict(kwargs))) if _is_tracked(one)]
                taken = [_cast(one, dtype) for one in args]
                named = {name: _cast(one, dtype) for name, one in kwargs.items()}
                with (
                    nullcontext() if _are(modes) else self._evaluating(root),
                    nullcontext() if self.autocast else _without_autocast(self._device),
                ):
                    outputs.append(network(*taken, **named))
                if any(one._version != version for one, version in versions):
                    raise ValueError(
                        f"The teacher {type(network).__name__} changes its inputs in place, but the student gets the "
                        f"same inputs: pass a module that calls the teacher with a copy (x.clone())."
                    )
        return outputs

    def _settle(self, student: nn.Module | None) -> None:
        """Put the modules that the student does not share into evaluation mode, and save the modes for later calls.

        For a teacher that shares modules with its student, no modes are saved: each call sets them.
        """
        shared = set() if student is None else {id(vars(module)) for module in student.modules()}
        self._modes: list[list[tuple[nn.Module, bool]] | None] = []
        for root in self.roots:
            mine = {name: module for name, module in root.named_modules() if id(vars(module)) in shared}
            norms = [name for name, module in mine.items() if isinstance(module, _BatchNorm)]
            if self.train_bn and norms:
                raise ValueError(
                    f"teacher_train_bn=True would change the running statistics of {norms[0]!r}, which the student "
                    f"shares: pass a copy, copy.deepcopy(teacher), or leave teacher_train_bn out."
                )
            if not mine:
                self._evaluate(root)
                self._modes.append([(module, module.training) for module in root.modules()])
                continue
            for module in root.modules():
                if not any(id(vars(one)) in shared for one in module.modules()):
                    self._evaluate(module)
            self._modes.append(None)

    @contextmanager
    def _evaluating(self, root: nn.Module) -> Iterator[None]:
        before = [(module, module.training) for module in root.modules()]
        self._evaluate(root)
        try:
            yield
        finally:
            for module, training in before:
                if module.training is not training and type(module).train is not nn.Module.train:
                    module.train(training)  # an own `train` may do more than set the flag
            for module, training in before:
                module.training = training

    def _evaluate(self, root: nn.Module) -> None:
        _evaluate(root)
        if self.train_bn:
            for module in root.modules():
                if isinstance(module, _BatchNorm):
                    module.train()


def _evaluate(module: nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # an exported program, whose mode is part of its graph
        for child in module.children():
            _evaluate(child)
        module.training = False


def _are(modes: list[tuple[nn.Module, bool]] | None) -> bool:
    """Whether modules are in the modes that were saved."""
    return modes is not None and all(module.training is training for module, training in modes)


def _dtype(network: nn.Module) -> torch.dtype | None:
    return next((one.dtype for one in network.parameters() if one.is_floating_point()), None)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_tracked(argument: Any) -> bool:
    return isinstance(argument, Tensor) and not argument.is_inference()


def _cast(argument: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(argument, Tensor):  # the usual case
        return argument.to(dtype) if argument.is_floating_point() else argument
    return tree_map_only(Tensor, lambda one: _cast(one, dtype), argument)
