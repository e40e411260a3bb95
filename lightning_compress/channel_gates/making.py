"""Make gates a part of a network, with the hooks by which they act, and take them away again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.channel_gates.gates import GATES, LayerGates
from lightning_compress.core.hooks import unhook

_NEXT = "next_handle"  # key in the state of pickled hooks


class _Hook:
    """A hook of one layer; a copy of the network has a copy of it, which acts with the copied gates."""

    def __init__(self, gates: LayerGates, number: int) -> None:
        self.gates = gates
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {_NEXT: RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled network keeps the numbers of its hooks, which torch would give to other hooks in a new process.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state[_NEXT])
        vars(self).update({key: value for key, value in state.items() if key != _NEXT})


class _Look(_Hook):
    """Shows the gate what its layer is about to read."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.gates.look(self.number, args[0] if args else kwargs["input"])


class _Apply(_Hook):
    """Multiplies the output of a layer's end by the gains of the channels that are kept."""

    def __call__(self, end: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.gates.apply_to(self.number, output)


def give_gates(network: nn.Module, gates: LayerGates) -> None:
    """Make gates a part of a network, which from now on runs with them, in training and in evaluation.

    Raises:
        ValueError: The network has something else under the name `channel_gates`.

    Example:
        >>> import torch
        >>> from lightning_compress.channel_gates.kinds import Layer
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> give_gates(net, LayerGates([Layer("0", "0", 2, 4, last=True)], share=0.5))
        >>> (net[0](torch.rand(1, 2)) != 0).tolist()
        [[True, True, False, False]]
    """
    if hasattr(network, GATES):
        raise ValueError(f"{type(network).__name__} has a {GATES} of its own already: rename yours.")
    network.add_module(GATES, gates)
    gates.train(network.training)
    for number, layer in enumerate(gates.layers):
        # First of all: what else hooks into these layers sees the same in training and after a load.
        network.get_submodule(layer.name).register_forward_pre_hook(
            _Look(gates, number), prepend=True, with_kwargs=True
        )
        network.get_submodule(layer.end).register_forward_hook(_Apply(gates, number), prepend=True)


def take_gates(network: nn.Module) -> None:
    """Take the gates away from a network, with their hooks."""
    network._modules.pop(GATES, None)
    unhook(network, lambda hook: isinstance(hook, _Hook))
