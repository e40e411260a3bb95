"""Find the layers for `target=None`: those that the fit trains and the network's `forward` uses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_compress.core.select import has_entries, is_weight_layer, layer_weights
from lightning_compress.trainer.averages import averages_inside
from lightning_compress.trainer.reached import is_within, reached_by_forward
from lightning_compress.trainer.unwrap import innermost

_NAMED = 4  # number of paths in a message


class Layers(NamedTuple):
    """The layers of a LightningModule when a fit begins, by the names of their weights.

    Attributes:
        taken: Layers that train and that the network uses.
        untrained: Layers that no optimizer trains.
        unused: Layers that train, but that the network does not use.
        frozen: Layers of `taken` that do not train yet, because a callback will unfreeze them.
        averages: Paths of modules that average others, with the path of the module that each averages.
    """

    taken: list[str]
    untrained: list[str]
    unused: list[str]
    frozen: list[str]
    averages: dict[str, str | None]


def layers_of_fit(
    trainer: Trainer | None, pl_module: LightningModule, network: str = "", *, frozen: bool = True
) -> Layers:
    """Sort the linear layers and convolutions of a module whose fit begins.

    A layer trains if an optimizer has its weight and the weight requires a gradient; with a callback that unfreezes
    layers (`BaseFinetuning`), frozen ones are taken too. The network uses the layers inside `network`, or, without it,
    those that the code of `forward` reaches, if the code can be read and reaches a layer that trains. Layers of
    averages are left out.

    Args:
        trainer: The Trainer, whose optimizers exist. None before any fit: then parameters that require a gradient count
            as trained.
        pl_module: The LightningModule.
        network: Dotted path of the submodule that makes the prediction, if the user has named one.
        frozen: Whether to take layers that a callback will unfreeze.
    """
    module = innermost(pl_module)
    averages = averages_inside(module)
    layers = {
        name: parameters
        for name, parameters in layer_weights(module).items()
        if all(map(has_entries, parameters)) and not is_within(name, {*averages})
    }
    ids = _trained(trainer) if trainer is not None else {id(one) for one in module.parameters() if one.requires_grad}
    trained = [name for name, parameters in layers.items() if all(id(one) in ids for one in parameters)]
    later = []
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    if frozen and any(isinstance(one, BaseFinetuning) for one in callbacks):
        later = [name for name, parameters in layers.items() if not any(one.requires_grad for one in parameters)]
    parts = {network} if network else _parts(module, averages)
    if parts is None or not any(is_within(name, parts) for name in trained):
        parts = {""}
    used = {name for name in layers if "" in parts or is_within(name, parts)}
    return Layers(
        [name for name in layers if name in used and (name in trained or name in later)],
        [name for name in layers if not (name in trained or name in later)],
        [name for name in layers if name not in used and (name in trained or name in later)],
        [name for name in later if name in used],
        averages,
    )


def refuse_average_in_forward(pl_module: LightningModule, network: str) -> None:
    """Raise a ValueError if channels would have to be found in a forward that uses an average of the trained module."""
    module = innermost(pl_module)
    parts = set() if network else reached_by_forward(module) or set()
    for path, original in averages_inside(module).items():
        if is_within(path, parts):
            raise ValueError(
                f"The forward of {type(module).__name__} uses {path}, which averages {original or 'a module'} and does "
                f"not train itself: pass network={original or '...'!r}, with the submodule that trains. Its average "
                f"is then cut with it."
            )


def unused_layers(pl_module: LightningModule) -> list[str]:
    """Return the names of the linear layers and convolutions that the code of `forward` does not reach."""
    module = innermost(pl_module)
    parts = _parts(module, averages_inside(module))
    layers = [name for name, one in module.named_modules() if is_weight_layer(one)]
    used = [name for name in layers if parts is None or is_within(name, parts)]
    return [name for name in layers if name not in used] if used else []


def begun_to_train(trainer: Trainer, pl_module: LightningModule, names: Collection[str]) -> list[str]:
    """Return the names among some layers' weights that an optimizer trains by now."""
    ids = _trained(trainer)
    layers = layer_weights(innermost(pl_module))
    return [name for name in names if all(id(one) in ids for one in layers.get(name, [nn.Parameter(torch.empty(0))]))]


def described(pl_module: LightningModule, layers: Layers, *, follows: bool) -> str:
    """Describe the layers that are left out, and the share of the parameters that is taken; "" if all matrices are.

    Args:
        pl_module: The LightningModule.
        layers: Its layers, as `layers_of_fit` has sorted them.
        follows: Whether averages are changed along with the modules that they average.
    """
    parameters = {
        name: one
        for name, one in innermost(pl_module).named_parameters()
        if has_entries(one) and not is_within(name, {*layers.averages})
    }
    apart = {*layers.taken, *layers.untrained, *layers.unused}
    others = [name for name, one in parameters.items() if one.dim() > 1 and name not in apart]
    everything = [*apart, *others]
    still = [*layers.untrained, *(name for name in others if not parameters[name].requires_grad)]
    others = [name for name in others if parameters[name].requires_grad]
    said = [
        f"{_listed(names, everything)} ({why})"
        for names, why in (
            (still, "no optimizer trains it"),
            (layers.unused, "the network's forward does not use it"),
            (others, "no linear layer or convolution"),
        )
        if names
    ]
    for path, original in layers.averages.items():
        if original is None or not follows:
            said.append(f"{path} (an average)")
    notes = [f"left as they are: {', '.join(said)}"] if said else []
    if layers.frozen:
        notes.append(f"{_listed(layers.frozen, everything)}: taken, though frozen for now")
    if follows:
        notes += [f"{path} follows {one or 'the module'}" for path, one in layers.averages.items() if one is not None]
    if not notes:
        return ""
    total = sum(one.numel() for one in parameters.values())
    share = sum(parameters[name].numel() for name in layers.taken if name in parameters) / max(1, total)
    return (
        f"the targets ({len(layers.taken)}) hold {share:.0%} of all parameters; {'; '.join(notes)}. Choose others "
        f"by target=."
    )


def _trained(trainer: Trainer) -> set[int]:
    optimizers = [getattr(one, "optimizer", one) for one in trainer.optimizers]
    groups = [group for one in optimizers for group in one.param_groups]
    return {id(one) for group in groups for one in group["params"] if one.requires_grad}


def _parts(module: LightningModule, averages: Mapping[str, str | None]) -> set[str] | None:
    """Return the paths that `forward` uses; the use of an average counts as the use of the averaged module."""
    reached = reached_by_forward(module)
    if reached is None:
        return None
    near = [path for path in averages if is_within(path, reached) or any(is_within(one, {path}) for one in reached)]
    return reached | {original for path in near if (original := averages[path]) is not None}


def _listed(names: Iterable[str], everything: Iterable[str]) -> str:
    """Return a list of weights as text, with the path of a module in the place of all its weights."""
    left, found = dict.fromkeys(names), []
    while left:
        name = next(iter(left))
        pieces = name.split(".")
        for path in (".".join(pieces[:n]) for n in range(1, len(pieces) + 1)):
            inside = {one for one in everything if is_within(one, {path})}
            if inside <= left.keys():
                break
        found.append(path.removesuffix(".weight"))
        left = {one: None for one in left if one not in inside}
    rest = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
