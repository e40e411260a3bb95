"""The present weights of a network for the stages that were cut out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.stages.extract import Stage


class StaleError(Exception):
    """The network has other modules, or tensors of other shapes, types or devices, than when it was split."""


class Live:
    """Finds the tensors of stages in a network at every call, so that weights that change later are seen.

    Args:
        network: Has the tensors.
        constants: Tensors that belong to its code, by name, from the graph of which stages were made.
    """

    def __init__(self, network: nn.Module, constants: Mapping[str, Tensor]) -> None:
        self.modules = list(network.modules())
        self._network, self._constants = network, constants
        self._found: dict[Stage, _Tensors] = {}

    def tensors(self, stage: Stage) -> list[Tensor]:
        """Return the tensors that a stage names.

        Raises:
            StaleError: The stages must be made anew.
        """
        if stage not in self._found:
            self._found[stage] = _Tensors(self._network, stage, self._constants)
        return self._found[stage].present()


class _Tensors:
    def __init__(self, network: nn.Module, stage: Stage, constants: Mapping[str, Tensor]) -> None:
        self._modules: dict[tuple[int, str], tuple[Any, str, nn.Module]] = {}
        self._slots = [self._slot(network, name, constants) for name in stage.names]
        self._shapes = [torch.Size(shape) for shape in stage.shapes]
        devices = [table[name].device for table, name in self._slots[:1]]
        self._kind = [*zip(stage.types, devices, strict=False)]

    def _slot(self, network: nn.Module, name: str, constants: Mapping[str, Tensor]) -> tuple[Any, str]:
        module = network
        *path, last = name.split(".")
        if name in constants:
            return constants, name
        for part in path:
            child = module.get_submodule(part)
            self._modules[id(module), part] = (module._modules, part, child)
            module = child
        return (module._parameters if last in module._parameters else module._buffers), last

    def present(self) -> list[Tensor]:
        for table, name, module in self._modules.values():
            if table.get(name) is not module:
                raise StaleError
        try:
            tensors = [table[name] for table, name in self._slots]
        except KeyError as error:
            raise StaleError from error
        if [one.shape for one in tensors] != self._shapes:
            raise StaleError
        if [(one.dtype, one.device) for one in tensors[:1]] != self._kind:
            raise StaleError
        return tensors
