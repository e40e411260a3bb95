"""Cut channels out of a network for good, in place: the same Parameters, thinner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroup, ChannelGroups, Drop, positions_kept
from lightning_compress.channels.load import follow_checkpoints
from lightning_compress.channels.reference import dense_without
from lightning_compress.channels.removal import drop_of, take
from lightning_compress.channels.sandbox import undisturbed
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.evaluation import renew_caches
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.outputs import TOLERANCES, compare, run
from lightning_compress.core.tensors import Kept, named_tensors
from lightning_compress.core.undo import forget_graphs

Indices = Tensor | Sequence[int] | Set[int]


@torch.inference_mode(False)  # tensors that are made in inference mode can never be trained
def cut(
    model: nn.Module,
    *inputs: ExampleInputs,
    keep: Mapping[str, Indices] | None = None,
    remove: Mapping[str, Indices] | None = None,
    example_inputs: ExampleInputs | None = None,
    allow_inexact: bool = False,
    groups: ChannelGroups | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    owner: nn.Module | None = None,
) -> nn.Module:
    """Cut channels out of some groups: `cut(model, x, keep={...})`, or `cut(model, x, remove={...})`.

    Parameters stay the same objects, with their `requires_grad`, gradients and hooks. Buffers, the size attributes of
    modules, and the optimizers' state are cut too. The function compares the thin network with the dense one without
    those channels on the example inputs, and puts everything back if they differ.

    Args:
        model: The network, changed in place.
        inputs: The example inputs, where they are not given as `example_inputs=`.
        keep: By group name the indices that stay, in any order. A group that is not named stays whole.
        remove: By group name the indices that leave, instead of `keep`.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.
        allow_inexact: Whether to cut channels that a norm or a softmax counts. Norms and softmax then average over the
            channels that stay.
        groups: The groups that `channel_groups` returned for this model, to save the time of planning again.
        optimizers: Optimizers of the model's parameters.
        copies: Modules with parameters of the same names, such as a moving average, which are cut in the same way.
        owner: The module that is saved and loaded, such as a LightningModule, where the model is a part of it. From now
            on it and the model take the shapes of every state dict that is loaded into them, thinner or wider. By
            default the model and its copies do.

    Returns:
        The model.

    Raises:
        TypeError: Not exactly one of `keep` and `remove` is given, or the example inputs are missing or given twice.
        ValueError: A group is unknown, frozen, inexact without `allow_inexact`, or would have no channel left; indices
            are out of range; or the thin network's outputs are wrong. The model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> cut(net, torch.zeros(2, 3), keep={"0": [0, 3, 5]})
        Sequential(
          (0): Linear(in_features=3, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    chosen, side, example_inputs = _asked(inputs, keep, remove, example_inputs)
    groups = channel_groups(model, example_inputs) if groups is None else groups
    named = {group.name: group for group in groups}
    checked = {name: _checked(named, name, indices, side, allow_inexact) for name, indices in chosen.items()}
    drop = drop_of(named, checked)
    if not drop:
        return model
    exact = all(group.exact for group, _ in drop)
    if groups.checker is not None:  # the example inputs may be zeros, which hide errors
        _check(drop, groups.checker.difference(model, drop))
    elif not exact:
        raise ValueError(
            f"{_describe(drop)} can only be cut with groups that channel_groups has just returned for this network, "
            f"because the cut is inexact: those that are given were renamed, or followed an earlier cut."
        )
    slices, optimizers, copies = Slices(), list(optimizers), list(copies)
    with undisturbed(model):
        expected = dense_without(model, example_inputs, drop) if exact else None
    try:
        for module, its in _loaded(model, copies, owner, groups):
            for handle in follow_checkpoints(module, its):
                slices.on_undo(handle.remove)
        for module in (model, *copies):
            take(slices, module, drop, optimizers=optimizers if module is model else ())
        with undisturbed(model):
            got = run(model, example_inputs)
    except Exception as error:
        slices.undo()
        raise ValueError(f"{_describe(drop)} could not be cut, and nothing was: {error}") from error
    except BaseException:
        slices.undo()
        raise
    if expected is not None:
        dtype = next((one.dtype for one in expected if one.is_floating_point()), torch.float32)
        if (wrong := compare(got, expected, TOLERANCES.get(dtype, 1e-3))) is not None:
            slices.undo()
            _check(drop, wrong)
    sliced = {member.tensor for group, _ in drop for member in group.members}
    for tensors in map(named_tensors, (model, *copies)):
        for tensor in (tensors[name] for name in sliced if name in tensors and tensors[name].requires_grad):
            forget_graphs(tensor)
    for module in (model, *copies):
        renew_caches(module)
    torch.clear_autocast_cache()  # it holds the dense weights
    return model


def _parts_of(copies: Iterable[nn.Module], path: str) -> list[nn.Module]:
    """Return the submodule at `path` of every copy that has one; a copy may have a part of the module alone."""
    return [modules[path] for modules in (dict(one.named_modules()) for one in copies) if path in modules]


def cut_part(
    owner: nn.Module,
    path: str,
    example_inputs: ExampleInputs,
    live: Mapping[str, Tensor],
    *,
    groups: ChannelGroups,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
) -> Kept:
    """Cut the part of a module at `path`, its copies and its optimizers' states down to the `live` channels of groups.

    Returns:
        By tensor of the owner and dimension the positions that stayed.
    """
    names = {f"{path}.{name}" if path else name: mask for name, mask in live.items()}
    kept = positions_kept(groups.prefixed(path), names, named_tensors(owner))
    cut(
        owner.get_submodule(path),
        example_inputs,
        keep={name: mask.nonzero().squeeze(1) for name, mask in live.items()},
        groups=groups,
        optimizers=optimizers,
        copies=_parts_of(copies, path),
        owner=owner,
    )
    return kept


def _loaded(
    model: nn.Module, copies: Iterable[nn.Module], owner: nn.Module | None, groups: ChannelGroups
) -> list[tuple[nn.Module, ChannelGroups]]:
    """Return the modules that follow what is loaded into them, with the groups by the names of each module."""
    if owner is None:
        return [(module, groups) for module in (model, *copies)]
    path = next(path for path, module in owner.named_modules() if module is model)
    found = groups.prefixed(path)
    for copy in copies:  # the owner loads the copies that it holds
        found = found.copied(_renamed(copy, owner), groups)
    return [(owner, found)] if model is owner else [(owner, found), (model, groups)]


def _renamed(copy: nn.Module, owner: nn.Module) -> dict[str, str]:
    """Return the names that a copy's tensors and modules have in the owner, without those that the owner lacks."""
    names = {id(one): name for name, one in (*named_tensors(owner).items(), *owner.named_modules())}
    own = (*named_tensors(copy).items(), *copy.named_modules())
    return {name: names[id(one)] for name, one in own if id(one) in names}


def _check(drop: Drop, wrong: str | None) -> None:
    if wrong is not None:
        raise ValueError(
            f"Without {_describe(drop)} the network does not compute what the dense one computes with zeros in their "
            f"place, so nothing was cut: {wrong}."
        )


def _asked(
    inputs: tuple[ExampleInputs, ...],
    keep: Mapping[str, Indices] | None,
    remove: Mapping[str, Indices] | None,
    example_inputs: ExampleInputs | None,
) -> tuple[Mapping[str, Indices], str, ExampleInputs]:
    """Check the arguments; return the indices by group, "keep" or "remove", and the example inputs."""
    given = [*inputs, *([] if example_inputs is None else [example_inputs])]
    if (keep is None) == (remove is None) or len(given) != 1:
        raise TypeError(
            "Say by name whether channels stay or leave: cut(model, example_inputs, keep={'conv1': [0, 2, 5]}) or "
            "cut(model, example_inputs, remove={'conv1': [1, 3, 4]}), one of the two. Got "
            f"keep={keep}, remove={remove} and {len(given)} arguments that could be the example inputs."
        )
    side, chosen = ("keep", keep) if keep is not None else ("remove", remove)
    if not isinstance(chosen, Mapping):
        raise TypeError(f"{side} must be a dict of indices by group name, such as {{'conv1': [0, 2]}}: got {chosen}.")
    return chosen, side, given[0]


def _checked(named: Mapping[str, ChannelGroup], name: str, indices: Indices, side: str, allow_inexact: bool) -> Tensor:
    """Check the indices of one group, and return those that stay, in order; `side` is "keep" or "remove"."""
    if name not in named:
        raise ValueError(f"There is no channel group {name!r}; there are {', '.join(map(repr, named))}.")
    group = named[name]
    channels = torch.as_tensor(sorted(indices) if isinstance(indices, Set) else indices, device="cpu").reshape(-1)
    channels = channels.long() if channels.numel() == 0 else channels
    if channels.dtype == torch.bool or channels.is_floating_point():
        raise ValueError(f"{side} for {name!r} must be indices, that is integers; got {channels.dtype}.")
    if channels.numel() and (int(channels.min()) < 0 or int(channels.max()) >= group.size):
        raise ValueError(
            f"{side} for {name!r} must lie in 0 to {group.size - 1}; "
            f"got {int(channels.min())} to {int(channels.max())}."
        )
    chosen = torch.isin(torch.arange(group.size), channels)
    channels = (chosen if side == "keep" else ~chosen).nonzero().squeeze(1)
    if channels.numel() == 0:
        raise ValueError(f"Nothing would be left of {name!r}: at least one of its {group.size} channels must stay.")
    if len(channels) < group.size and group.frozen is not None:
        raise ValueError(f"{name!r} cannot be cut: {group.frozen}.")
    if len(channels) < group.size and not group.exact and not allow_inexact:
        raise ValueError(
            f"Cutting {name!r} changes the function, because {group.note}: pass allow_inexact=True to do so."
        )
    return channels


def _describe(drop: Drop) -> str:
    parts = [f"{len(channels)} of {group.size} channels of {group.name!r}" for group, channels in drop[:3]]
    return ", ".join(parts) + (f" and {len(drop) - 3} more groups" if len(drop) > 3 else "")


def live_channels(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Return by group name a mask of the live channels: those that not only zeros produce."""
    tensors = named_tensors(model)
    alive = {}
    for group in groups:
        nonzero = torch.zeros(group.size, dtype=torch.bool)
        for member in (one for one in group.members if one.produces):
            tensor = tensors[member.tensor].detach()
            positions = (tensor != 0).movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).any(1)
            nonzero |= positions.cpu()[member.index].any(1)
        alive[group.name] = nonzero
    return alive


def shrink(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    owner: nn.Module | None = None,
) -> nn.Module:
    """Cut every masked channel: one that only zeros produce.

    The function cuts exact groups only. A network without masked channels stays as it is.

    Args:
        model: The network, changed in place.
        example_inputs: As for `cut`.
        groups: As for `cut`.
        optimizers: As for `cut`.
        copies: As for `cut`.
        owner: As for `cut`.

    Returns:
        The model.

    Raises:
        ValueError: All channels of a group are masked, or the cut fails. The model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net[0].weight.data[2:] = 0; net[0].bias.data[2:] = 0
        >>> shrink(net, torch.zeros(2, 3))[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    groups = channel_groups(model, example_inputs) if groups is None else groups
    keep = {}
    for name, live in live_channels(model, groups.free()).items():
        if not bool(live.any()):
            raise ValueError(
                f"All channels of {name!r} are masked: nothing would pass through it. At least one must stay."
            )
        if not bool(live.all()):
            keep[name] = live.nonzero().squeeze(1)
    return cut(model, example_inputs, keep=keep, groups=groups, optimizers=optimizers, copies=copies, owner=owner)
