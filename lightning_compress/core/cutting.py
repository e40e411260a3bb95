"""Cut channels out of a model, or zero what makes them; and tell whether two outputs agree."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.attention import make_sliceable
from lightning_compress.core.evaluation import buffers_restored, caches_off, entries_restored, renew_caches
from lightning_compress.core.groups import Attribute, ChannelGroup
from lightning_compress.core.inputs import ExampleInputs, call
from lightning_compress.core.reshapes import prepare
from lightning_compress.core.slicing import Slices, named_tensors

TOLERANCE = 1e-8  # relative, in double precision: rounding stays far below it, an error far above

Drop = Sequence[tuple[ChannelGroup, Tensor]]  # groups with the units that leave


@contextmanager
def silenced(model: nn.Module, drop: Drop, *, in_place: bool = False) -> Iterator[None]:
    """Zeros in everything that produces some channels, for the length of a `with` block.

    Args:
        model: The network.
        drop: The channels.
        in_place: Whether the tensors themselves are written, as those of the laboratory may be: only the slices that
            become zero are kept then. Without it, copies take their place, since the network's memory may be shared.
    """
    tensors = named_tensors(model)
    copied: set[str] = set()
    with ExitStack() as back:
        for group, units in drop:
            for member in (one for one in group.members if one.produces):
                tensor = tensors[member.tensor]
                if not in_place and member.tensor not in copied:
                    copied.add(member.tensor)
                    back.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.clone()
                positions = member.index[units].reshape(-1).to(tensor.device)
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
    """Cut units of groups out of a model, or out of a copy that has some of its parts."""
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
    for group, units in drop:
        for member in (one for one in group.members if one.tensor in tensors):
            size = tensors[member.tensor].shape[member.dim]
            here = stay.setdefault(member.tensor, {}).setdefault(member.dim, torch.ones(size, dtype=torch.bool))
            here[member.index[units].reshape(-1)] = False
        for one in (one for one in group.attributes if one.module in modules):
            key = (one.module, one.name, one.place)
            before = _get(model, one)
            count = counts.get(key, before)
            whole = one.index.numel() == before  # then groups that cross each take their share
            counts[key] = count * (group.size - len(units)) // group.size if whole else count - one.index[units].numel()
    for (module, name, place), count in counts.items():
        owner = model.get_submodule(module)
        if hasattr(owner, name):
            value: Any = count
            if place is not None:
                value = tuple(count if at == place else size for at, size in enumerate(getattr(owner, name)))
            slices.set(owner, name, value)
    kept = {name: {dim: mask.nonzero().squeeze(1) for dim, mask in dims.items()} for name, dims in stay.items()}
    slices.take(model, kept, optimizers=optimizers)


def _get(model: nn.Module, attribute: Attribute) -> int:
    value: Any = getattr(model.get_submodule(attribute.module), attribute.name, 0)  # a functional call notes nothing
    return int(value[attribute.place] if isinstance(value, tuple) and attribute.place is not None else value)


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """None if two lists of tensors agree, or where they do not."""
    if [one.shape for one in got] != [one.shape for one in expected]:
        shapes = ([tuple(one.shape) for one in some] for some in (got, expected))
        return "its output has shapes {}, not {}".format(*shapes)
    for one, other in zip(map(_real, got), map(_real, expected), strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return "its integer output differs"
            continue
        if bool(other.isnan().any()):
            return "the dense network's output is not a number, so that nothing can be compared"
        finite = other.isfinite()
        if not torch.equal(one.masked_fill(finite, 0).nan_to_num(), other.masked_fill(finite, 0).nan_to_num()):
            return "its output has other infinite values"
        scale = float(other[finite].abs().max()) if bool(finite.any()) else 0.0
        difference = float((one[finite] - other[finite]).abs().max()) if bool(finite.any()) else 0.0
        if not difference <= tolerance * max(scale, math.ulp(1.0)):
            return f"its output differs by {difference / scale if scale else math.inf:.2g} of its size"
    return None


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def run(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """The tensors of the model's output, the same every time: see `alike`."""
    return alike(model, lambda: call(model, example_inputs))


def alike(model: nn.Module, forward: Callable[[], Any]) -> list[Tensor]:
    """The tensors that a call of the model returns: random numbers start anew, and no call sees another's.

    Buffers, caches and counters are put back, and what modules keep for evaluation is made anew from their weights.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with caches_off(model), entries_restored(model), buffers_restored(model):
        renew_caches(model)
        return tensors_of(forward())


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def drop_of(groups: Mapping[str, ChannelGroup], keep: Mapping[str, Tensor]) -> list[tuple[ChannelGroup, Tensor]]:
    """Turn what stays of every group into what leaves."""
    drop = []
    for name, units in keep.items():
        gone = torch.ones(groups[name].size, dtype=torch.bool)
        gone[units] = False
        if bool(gone.any()):
            drop.append((groups[name], gone.nonzero().squeeze(1)))
    return drop
