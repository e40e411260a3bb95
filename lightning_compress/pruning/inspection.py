"""A dry run of pruning: which parameters would be pruned, which have to stay, which are skipped, and why."""

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
    """The action of pruning on one parameter.

    Attributes:
        name: Qualified name of the parameter.
        shape: The parameter's shape.
        count: The number of entries, or channels, that `amount` counts; 0 if they are counted with another parameter
            or not at all.
        action: "pruned" (perhaps only some of its channels), "follows" (another parameter has the same channels),
            "frozen" (a target that has to stay) or "skipped" (no target).
        reason: The reason for the action, in words; empty for pruned parameters.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    action: Literal["pruned", "follows", "frozen", "skipped"]
    reason: str = ""


def inspect_weights(
    module: nn.Module, target: str | Sequence[str] | None = None, *, exclude: str | Sequence[str] = ()
) -> list[Verdict]:
    """Return the verdict of weight pruning with these patterns on every parameter, in the module's order.

    Args:
        module: The network, or the LightningModule that holds it.
        target: As for `select_parameters`.
        exclude: As for `select_parameters`.

    Raises:
        ValueError: As `select_parameters`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> for verdict in inspect_weights(net, exclude="3"):
        ...     print(verdict.name, verdict.count, verdict.action, "|", verdict.reason or "-")
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
    """Return the verdict of channel pruning with these patterns on every parameter, in the module's order.

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
        ...     print(verdict.name, verdict.count, verdict.action, "|", verdict.reason or "-")
        0.weight 4 pruned | -
        0.bias 0 follows | with 0.weight
        2.weight 2 frozen | it is an output of the network
        2.bias 0 skipped | not targeted
    """
    chosen = select_parameters(module, target, exclude=exclude)
    skipped = _reasons_to_skip(module, target, exclude)
    pruned, frozen = _Channels(), _Channels()
    for group in find_channels(module, example_inputs, chosen, network=network):
        (pruned if group.frozen is None else frozen).add(group, chosen)

    def verdict(name: str, shape: tuple[int, ...]) -> Verdict:
        if name in pruned.counts:
            return Verdict(name, shape, pruned.counts[name], "pruned")
        if name in pruned.followed:
            return Verdict(name, shape, 0, "follows", f"with {pruned.followed[name]}")
        if name not in chosen:
            return Verdict(name, shape, 0, "skipped", skipped[name])
        if name in frozen.counts:
            return Verdict(name, shape, frozen.counts[name], "frozen", frozen.reasons[name])
        if name in frozen.followed:
            return Verdict(name, shape, 0, "frozen", f"with {frozen.followed[name]}")
        return Verdict(name, shape, 0, "frozen", "no channels go by its name")

    return [verdict(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


class _Channels:
    """Counts channels by the tensors that make them: the first target counts for the others of its group.

    Groups may share a tensor.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self.followed: dict[str, str] = {}

    def add(self, group: Channels, targets: Collection[str]) -> None:
        first = next(one.tensor for one in group.weights if one.tensor in targets)
        self.counts[first] = self.counts.get(first, 0) + group.size
        self.reasons.setdefault(first, group.frozen or "")
        for member in group.members:
            self.followed.setdefault(member.tensor, first)


def _reasons_to_skip(
    module: nn.Module, target: str | Sequence[str] | None, exclude: str | Sequence[str]
) -> dict[str, str]:
    wanted = select_parameters(module, target, warn=False)  # the caller has been warned
    excluded = f"excluded by {exclude!r}"
    passed_over = "not targeted"
    return {name: excluded if name in wanted else passed_over for name, _ in module.named_parameters()}
