"""Cut channels out of a model, or set to zero everything that produces them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.attention import make_sliceable
from lightning_compress.channels.groups import Attribute, ChannelGroup, Drop
from lightning_compress.channels.reshapes import prepare
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.tensors import named_tensors


@contextmanager
def silenced(model: nn.Module, drop: Drop, *, in_place: bool = False) -> Iterator[None]:
    """Set everything that produces some channels to zero within a `with` block.

    Args:
        model: The network.
        drop: The channels.
        in_place: Whether to write zeros into the tensors themselves, which needs little memory and is allowed in the
            sandbox. By default copies take their place, because other tensors may share the network's memory.
    """
    tensors = named_tensors(model)
    copied: set[str] = set()
    with ExitStack() as back:
        for group, channels in drop:
            for member in (one for one in group.members if one.produces):
                tensor = tensors[member.tensor]
                if not in_place and member.tensor not in copied:
                    copied.add(member.tensor)
                    back.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.clone()
                positions = member.index[channels].reshape(-1).to(tensor.device)
                if in_place:
                    dense = tensor.data.index_select(member.dim, positions)
                    back.callback(tensor.data.index_copy_, member.dim, positions, dense)
                tensor.data.index_fill_(member.dim, positions, 0)
        yield


def take(
    slices: Slices,
    model: nn.Module,
    drop: Drop,
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> None:
    """Cut channels out of a model, or out of a copy that has only some of its parts."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in {member.tensor.rpartition(".")[0] for group, _ in drop for member in group.members}:
        attention = modules.get(path)
        if type(attention) is nn.MultiheadAttention:
            slices.on_undo(make_sliceable(attention))
    for undo in prepare(model, [one for group, _ in drop for one in group.attributes]):
        slices.on_undo(undo)
    tensors = named_tensors(model)
    stay: dict[str, dict[int, Tensor]] = {}
    counts: dict[tuple[str, str, int | None], int] = {}
    for group, channels in drop:
        for member in (one for one in group.members if one.tensor in tensors):
            size = tensors[member.tensor].shape[member.dim]
            here = stay.setdefault(member.tensor, {}).setdefault(member.dim, torch.ones(size, dtype=torch.bool))
            here[member.index[channels].reshape(-1)] = False
        for one in (one for one in group.attributes if one.module in modules):
            key = (one.module, one.name, one.place)
            before = _get(modules[one.module], one)
            count = counts.get(key, before)
            whole = one.index.numel() == before  # heads and their width, which cross, each take their share of it
            counts[key] = (
                count * (group.size - len(channels)) // group.size if whole else count - one.index[channels].numel()
            )
    for (module, name, place), count in counts.items():
        value: Any = count
        if place is not None:
            value = tuple(count if at == place else size for at, size in enumerate(getattr(modules[module], name)))
        slices.set(modules[module], name, value)
    kept = {name: {dim: mask.nonzero().squeeze(1) for dim, mask in dims.items()} for name, dims in stay.items()}
    slices.take(model, kept, optimizers=optimizers)


def _get(module: nn.Module, attribute: Attribute) -> int:
    value: Any = getattr(module, attribute.name)
    return int(value if attribute.place is None else value[attribute.place])


def drop_of(groups: Mapping[str, ChannelGroup], keep: Mapping[str, Tensor]) -> list[tuple[ChannelGroup, Tensor]]:
    """Return the channels that leave every group, given those that stay."""
    drop = []
    for name, channels in keep.items():
        gone = torch.ones(groups[name].size, dtype=torch.bool)
        gone[channels] = False
        if bool(gone.any()):
            drop.append((groups[name], gone.nonzero().squeeze(1)))
    return drop
