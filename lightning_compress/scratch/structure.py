"""The structure of a pruned network: its thin or replaced layers, its zeros, and new weights in their place.

state = read_structure(path)       of a run's compressed.ckpt or compressed.lcz
adopt_state(model, state)          thin and replaced layers, as load_compressed builds them
masks = masks_of(model)            the zeros
new_weights(model)                 each layer's own initialization, for the inputs that it has now
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_compress.coding import load_compressed
from lightning_compress.core.records import records

Mask = Literal["same", "random"]
_STRUCTURAL = ("depth", "low_rank", "conv_block", "cut")  # kinds of records that say what layers a network has


def read_structure(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a pruned network's file, with its records.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is none of ours, or its network has more than thin layers, replaced layers and zeros.
    """
    state: dict[str, Tensor] = load_compressed(path)
    others = [kind for kind in records(getattr(state, "_metadata", None)) if kind not in _STRUCTURAL]
    if others:
        raise ValueError(
            f"{path} is of a network with records of the kind {others[0]!r}, which has more that was trained than "
            f"its weights. Take the file of a run that has pruned channels or weights, or replaced layers, and nothing "
            f"else."
        )
    return state


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return masks (False where the value is zero) of the parameters that pruning has masked, by name.

    These are matrices and kernels with zeros. Vectors are often zero without being pruned: an entry of a layer's bias
    counts where all weights of its channel are zero, and one of a norm where its scale and its shift are.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data, layer.bias.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2)
        >>> masks_of(layer)
        {'weight': tensor([[ True, False],
                [False, False]]), 'bias': tensor([ True, False])}
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = {name: one.detach() for name, one in module.named_parameters(recurse=False) if one.numel() > 0}
        dead = _dead_channels(module, own)
        for name, value in own.items():
            mask = value != 0
            if value.dim() < 2:
                mask = ~dead if dead is not None and dead.shape == value.shape else torch.ones_like(mask)
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
                mask[module.padding_idx] = True  # it is zero in every network
            if not bool(mask.all()):
                found[f"{path}.{name}".lstrip(".")] = mask
    return found


def _dead_channels(module: nn.Module, own: Mapping[str, Tensor]) -> Tensor | None:
    """Return which channels of a layer or norm are silent; None where that can't be said."""
    weight = own.get("weight")
    if weight is None:
        return None
    if weight.dim() > 1:
        channels = 1 if getattr(module, "transposed", False) else 0
        return (weight != 0).movedim(channels, 0).flatten(1).any(1).logical_not()
    bias = own.get("bias")
    silent = weight == 0 if bias is None else (weight == 0) & (bias == 0)
    return None if bool(silent.all()) else silent


def random_masks(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return masks that keep as many entries of each matrix, at random places; vectors are not masked.

    Example:
        >>> mask = torch.arange(100).view(10, 10) < 7
        >>> drawn = random_masks({"weight": mask}, torch.Generator())["weight"]
        >>> int(drawn.sum()), torch.equal(drawn, mask)
        (7, False)
    """
    found = {}
    for name, mask in masks.items():
        if mask.dim() > 1:
            kept = torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())].to(mask.device)
            found[name] = torch.zeros_like(mask).view(-1).index_fill_(0, kept, True).view(mask.shape)
    return found


@torch.no_grad()
def new_weights(model: nn.Module, reset: str = "") -> None:
    """Draw all weights of a network anew, as it is now: a thin layer by its own number of inputs.

    Modules whose parameters are all frozen keep them.

    Args:
        model: The network, in place. Its modules' `reset_parameters` are called, those of inner modules first.
        reset: The name of a method of the model that is called instead.

    Raises:
        ValueError: The model has no such method, or a parameter belongs to no module that has one.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = layer.weight.clone()
        >>> new_weights(layer)
        >>> bool((layer.weight == before).any())
        False
    """
    if reset:
        method = getattr(model, reset, None)
        if not callable(method):
            raise ValueError(
                f"reset={reset!r} is no method of {type(model).__name__}: name one that draws all weights anew."
            )
        method()
        return
    modules = dict(model.named_modules())
    resets = {path: one for path, one in modules.items() if _reset_of(one) is not None and _trains(one)}
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        above = [path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)] + [""]
        if parameter.requires_grad and not any(one in resets for one in above):
            raise ValueError(
                f"{name} would keep its trained values: {type(modules[path]).__name__} has no reset_parameters(). Give "
                f"{type(model).__name__} a method that draws all weights anew, and name it by reset=."
            )
    for module in reversed(resets.values()):  # inner ones first
        again = _reset_of(module)
        assert again is not None
        again()


def _trains(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False)) or list(module.parameters())
    return any(one.requires_grad for one in own)


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    found: Callable[[], object] | None = getattr(module, "reset_parameters", None)
    return getattr(module, "_reset_parameters", None) if found is None else found  # torch's name in attention
