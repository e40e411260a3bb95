"""A dry run of pruning: what would be pruned, what has to stay, what is passed over, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.select import select_parameters
from lightning_compress.pruning.channels import Channels, find_channels


@dataclass(frozen=True)
class Verdict:
    """What pruning would do with one parameter.

    Attributes:
        name: Qualified name of the parameter.
        shape: Its shape.
        units: What `amount` counts: entries, or channels; 0 where they are counted with another parameter or none.
        action: "pruned" (its channels perhaps only in part), "follows" (another parameter with the same channels),
            "frozen" (a target that has to stay) or "skipped" (no target).
        reason: Why, in words; empty for what is pruned.
    """

    name: str
    shape: tuple[int, ...]
    units: int
    action: Literal["pruned", "follows", "frozen", "skipped"]
    reason: str = ""


def inspect_weights(
    module: nn.Module, target: str | Sequence[str] | None = None, *, exclude: str | Sequence[str] = ()
) -> list[Verdict]:
    """Return what weight pruning with these patterns would do with every parameter, in the module's order.

    Args:
        module: The network, or the LightningModule that holds it.
        target: As for `select_parameters`.
        exclude: As for `select_parameters`.

    Raises:
        ValueError: As `select_parameters`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> for verdict in inspect_weights(net, exclude="3"):
        ...     print(verdict.name, verdict.units, verdict.action, "|", verdict.reason or "-")
        0.weight 36 pruned | -
        0.bias 0 skipped | not targeted
        1.weight 0 skipped | not targeted
        1.bias 0 skipped | not targeted
        3.weight 0 skipped | excluded by '3'
    """
    chosen = select_parameters(module, target, exclude=exclude)
    skipped = _reasons_to_skip(module, target, exclude)
    return [
        Verdict(name, tuple(parameter.shape), parameter.numel(), "pruned")
        if name in chosen
        else Verdict(name, tuple(parameter.shape), 0, "skipped", skipped[name])
        for name, parameter in module.named_parameters()
    ]


def inspect_channels(
    module: nn.Module,
    example_inputs: ExampleInputs,
    target: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] = (),
    network: str = "",
) -> list[Verdict]:
    """Return what neuron pruning with these patterns would do with every parameter, in the module's order.

    Args:
        module: The network, or the LightningModule that holds it.
        example_inputs: As for `find_channels`.
        target: As for `select_parameters`.
        exclude: As for `select_parameters`.
        network: As for `find_channels`.

    Raises:
        ValueError: As `select_parameters` and `find_channels`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> for verdict in inspect_channels(net, torch.zeros(5, 3)):
        ...     print(verdict.name, verdict.units, verdict.action, "|", verdict.reason or "-")
        0.weight 4 pruned | -
        0.bias 0 follows | with 0.weight
        2.weight 2 frozen | it is an output of the network
        2.bias 0 skipped | not targeted
    """
    chosen = select_parameters(module, target, exclude=exclude)
    skipped = _reasons_to_skip(module, target, exclude)
    pruned, frozen = _Channels(), _Channels()
    for channels in find_channels(module, example_inputs, chosen, network=network):
        (pruned if channels.frozen is None else frozen).add(channels, chosen)

    def verdict(name: str, shape: tuple[int, ...]) -> Verdict:
        if name in pruned.units:
            return Verdict(name, shape, pruned.units[name], "pruned")
        if name in pruned.followed:
            return Verdict(name, shape, 0, "follows", f"with {pruned.followed[name]}")
        if name not in chosen:
            return Verdict(name, shape, 0, "skipped", skipped[name])
        if name in frozen.units:
            return Verdict(name, shape, frozen.units[name], "frozen", frozen.reasons[name])
        if name in frozen.followed:
            return Verdict(name, shape, 0, "frozen", f"with {frozen.followed[name]}")
        return Verdict(name, shape, 0, "frozen", "no channels go by its name")

    return [verdict(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


class _Channels:
    """Channels by the tensors that make them: the first target stands for the others. Groups may share a tensor."""

    def __init__(self) -> None:
        self.units: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self.followed: dict[str, str] = {}

    def add(self, channels: Channels, targets: Collection[str]) -> None:
        first = next(one.tensor for one in channels.weights if one.tensor in targets)
        self.units[first] = self.units.get(first, 0) + channels.size
        self.reasons.setdefault(first, channels.frozen or "")
        for member in channels.members:
            self.followed.setdefault(member.tensor, first)


def _reasons_to_skip(
    module: nn.Module, target: str | Sequence[str] | None, exclude: str | Sequence[str]
) -> dict[str, str]:
    wanted = select_parameters(module, target, warn=False)  # the caller has been warned
    excluded = f"excluded by {exclude!r}"
    passed_over = "not targeted"
    return {name: excluded if name in wanted else passed_over for name, _ in module.named_parameters()}
