"""Find the layers whose channels can be chosen for each sample, and which layers read these channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_compress.channel_gates.gates import GATES
from lightning_compress.channel_gates.kinds import Layer
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroup
from lightning_compress.core.example_inputs import ExampleInputs, batch_size, call
from lightning_compress.core.hooks import hooked
from lightning_compress.stages.split import running

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_SHOWN = 6  # layers in a message


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the channels of another one.

    Attributes:
        name: Qualified name of the reading layer.
        index: Shape (channels, k): row i holds the k positions of channel i along the second dimension of its weight.
    """

    name: str
    index: Tensor


@dataclass(frozen=True)
class FoundLayers:
    """The layers whose channels may be chosen.

    Attributes:
        layers: All that were asked for, in the order in which they run.
        readers: By layer the layers that read its channels, where it is known that no other code does and that the
            network's own code runs with some of the channels alone.
        refused: By layer the reason why it is not chosen unless it is named, or not at all.
    """

    layers: tuple[Layer, ...]
    readers: Mapping[str, tuple[Reader, ...]]
    refused: Mapping[str, str]


def find_layers(network: nn.Module, example_inputs: ExampleInputs, names: Sequence[str] | None = None) -> FoundLayers:
    """Find the layers of a network whose channels can be chosen for each sample.

    Args:
        network: Has no gates; it stays as it is.
        example_inputs: As for `channel_groups`.
        names: Of layers; None: the convolutions and linear layers whose channels go through at most a batch norm, and
            through code that maps zeros to zeros, to other layers alone.

    Raises:
        ValueError: A name is that of no such layer, or there is none at all; the message has the reasons.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> found = find_layers(net, torch.zeros(2, 1, 4, 4))
        >>> [(layer.name, layer.end) for layer in found.layers], dict(found.refused)
        ([('0', '1')], {'4': 'it is an output of the network'})
    """
    run = _Run.of(network, example_inputs)
    groups = _by_layer(channel_groups(network, example_inputs))
    layers, readers, refused = [], {}, {}
    for name, seen in run.seen.items():
        layer, never = _layer(network, name, seen, run)
        reason = never or _not_alone(network, name, groups.get(name), layer)
        if reason is not None:
            refused[name] = reason
        if layer is None or (reason is not None if names is None else name not in names):
            continue
        layers.append(layer)
        if reason is None:
            reading = _readers(network, groups[name], layer, run)
            if reading is not None:
                readers[name] = reading
    _check(type(network).__name__, layers, refused, names)
    return FoundLayers(tuple(layers), readers, refused)


@torch.no_grad()
def magnitudes(network: nn.Module, layer: Layer, readers: Sequence[Reader]) -> Tensor:
    """Return how large each output channel of a layer is, and how much of it is read, with a mean of 1.

    |scale of its norm|, or else L1 of the weights that make it, times L1 of the weights that read it, if known
    """
    module: Any = network.get_submodule(layer.name)
    norm: Any = network.get_submodule(layer.end)
    own = layer.end == layer.name or norm.weight is None
    found: Tensor = module.weight.abs().flatten(1).sum(1) if own else norm.weight.abs()
    if readers:
        read = torch.zeros_like(found)
        for reader in readers:
            weight: Any = network.get_submodule(reader.name).weight
            read += weight.abs().movedim(1, 0).flatten(1).sum(1)[reader.index.to(weight.device)].sum(1)
        found = found * read
    return found / found.mean().clamp(min=torch.finfo(found.dtype).tiny)


def _check(kind: str, layers: Sequence[Layer], refused: Mapping[str, str], names: Sequence[str] | None) -> None:
    known = {layer.name for layer in layers}
    for name in names or ():
        if name in known:
            continue
        if name in refused:
            raise ValueError(f"The channels of {name!r} can't be chosen for each sample: {refused[name]}.")
        others = ", ".join(map(repr, [*known, *refused][:_SHOWN]))
        raise ValueError(
            f"layers has {name!r}, which is no convolution or linear layer that runs in {kind}; there are {others}."
        )
    if not layers:
        reasons = [f"{name}: {reason}" for name, reason in refused.items()]
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        raise ValueError(
            f"{kind} has no layer whose channels go to other layers alone ({'; '.join(reasons[:_SHOWN]) or 'none ran'}"
            f"{more}): name layers in layers=."
        )


# ---------------------------------------------------------------------- what runs


@dataclass
class _Seen:
    """How a layer ran: how often, and whether each of its inputs had the samples in its first dimension."""

    calls: int = 0
    by_sample: bool = True
    norms: list[str] = field(default_factory=list)  # batch norms that read its output as it is


@dataclass
class _Run:
    """One run of a network.

    Attributes:
        seen: Of layers, in the order in which they ran.
        calls: How often each norm ran.
    """

    seen: dict[str, _Seen]
    calls: dict[str, int]

    @classmethod
    def of(cls, network: nn.Module, example_inputs: ExampleInputs) -> _Run:
        run, samples = cls({}, {}), batch_size(example_inputs)
        outputs: list[tuple[str, Tensor, int]] = []  # with their versions: code may write into them

        def layer_hook(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                one = run.seen.setdefault(name, _Seen())
                x = args[0] if args else kwargs.get("input")
                one.calls += 1
                one.by_sample &= isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == samples
                if not isinstance(module, nn.Linear) or output.dim() == 2:  # else a norm takes tokens for channels
                    outputs.append((name, output, output._version))

            return hook

        def norm_hook(name: str) -> Any:
            def hook(_: nn.Module, args: Any) -> None:
                run.calls[name] = run.calls.get(name, 0) + 1
                for layer, output, version in outputs:
                    if args and args[0] is output and output._version == version:
                        run.seen[layer].norms.append(name)

            return hook

        handles = []
        for name, module in network.named_modules():
            if isinstance(module, _ConvNd | nn.Linear) and not name.startswith(f"{GATES}."):
                handles.append(module.register_forward_hook(layer_hook(name), with_kwargs=True))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(norm_hook(name)))
        with hooked(*handles), running(network):
            call(network, example_inputs)
        return run


def _layer(network: nn.Module, name: str, seen: _Seen, run: _Run) -> tuple[Layer | None, str | None]:
    """Return a layer that can have gates, or the reason why it can't."""
    module: Any = network.get_submodule(name)
    if not _is_plain(module):
        return None, f"it is a {type(module).__name__}, and no plain convolution or linear layer"
    last = isinstance(module, nn.Linear)
    inputs, channels = module.weight.shape[1], module.weight.shape[0]
    reason = None
    if seen.calls > 1:
        reason = "it runs several times in one forward pass"
    elif not seen.by_sample:
        reason = "the first dimension of what it reads does not count the samples"
    elif not last and module.groups > 1:
        reason = "it is a convolution of groups, of which no channel can be left out alone"
    elif channels < 2:
        reason = "it has a single channel"
    if reason is not None:
        return None, reason
    norms = [one for one in seen.norms if run.calls[one] == 1 and _is_by_channel(network.get_submodule(one), channels)]
    return Layer(name, norms[0] if len(seen.norms) == len(norms) == 1 else name, inputs, channels, last), None


def _is_by_channel(norm: Any, channels: int) -> bool:
    """Whether a batch norm has statistics of its own, one for each channel, in evaluation."""
    return norm.num_features == channels and norm.running_mean is not None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what torch's own layers do, from its attributes `weight` and `bias`."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _LAYERS)


# ---------------------------------------------------------------------- who reads


def _by_layer(groups: Sequence[ChannelGroup]) -> dict[str, ChannelGroup]:
    """Return by layer the group whose channels are its output channels, one by one."""
    found = {}
    for group in groups:
        for member in group.members:
            layer, _, attribute = member.tensor.rpartition(".")
            if attribute == "weight" and member.produces and member.dim == 0 and member.index.shape[1] == 1:
                found[layer] = group
    return found


def _not_alone(network: nn.Module, name: str, group: ChannelGroup | None, layer: Layer | None) -> str | None:
    """Return why channels of a layer do not go to other layers alone; None: they do."""
    if group is None:
        return "its channels are not followed one by one"
    if group.frozen is not None:
        return group.frozen
    if not group.exact:
        return str(group.note)
    assert layer is not None
    makers = dict.fromkeys(one.tensor.rpartition(".")[0] for one in group.members if one.produces)
    others = [one for one in makers if one not in (name, layer.end)]
    if others:
        return f"{others[0]} makes the same channels, as where outputs are added"
    touched = [one for one in group.modules if one not in makers and isinstance(network.get_submodule(one), _BatchNorm)]
    if any(one != layer.end for one in touched):
        return f"the norm {touched[0]} does not read its output as it is"
    return None if any(not one.produces and one.dim == 1 for one in group.members) else "no layer reads its channels"


def _readers(network: nn.Module, group: ChannelGroup, layer: Layer, run: _Run) -> tuple[Reader, ...] | None:
    """Return the layers that read a layer's channels; None where something else does."""
    found = []
    for member in group.members:
        name, _, attribute = member.tensor.rpartition(".")
        if name in (layer.name, layer.end):
            continue
        module: Any = network.get_submodule(name)
        ran = run.seen.get(name)
        plain = attribute == "weight" and member.dim == 1 and _is_plain(module) and getattr(module, "groups", 1) == 1
        if not plain or ran is None or ran.calls != 1 or not ran.by_sample:
            return None
        found.append(Reader(name, member.index))
    return tuple(found)
