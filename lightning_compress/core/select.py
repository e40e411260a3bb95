"""Select parameters by patterns of names: this module alone defines what `target` and `exclude` mean."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_compress.core.memory import refuse_shared_memory

_COMPILED = "_orig_mod."  # torch.compile inserts this into the names of a compiled submodule
_WILDCARDS = frozenset("*?[")

WEIGHT_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def is_weight_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, the `Conv1D` of transformers and its copies included."""
    return isinstance(module, WEIGHT_LAYERS) or is_transposed_linear(module)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is GPT-2's `Conv1D`: a linear layer whose weight is (inputs, outputs)."""
    weight = module._parameters.get("weight")
    if weight is None or not any(base.__name__ == "Conv1D" for base in type(module).__mro__):
        return False
    return weight.dim() == 2 and weight.shape[1] == getattr(module, "nf", None)


def output_blocks(layer: nn.Module) -> int | None:
    """Return the number of blocks along dim 0 of a weight whose output channels are in dim 1; None: they are in dim 0.

    Example:
        >>> output_blocks(nn.ConvTranspose1d(4, 6, 3, groups=2)), output_blocks(nn.Linear(2, 2))
        (2, None)
    """
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return layer.groups
    return 1 if is_transposed_linear(layer) else None


def select_parameters(
    module: nn.Module,
    target: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] = (),
    argument: str = "target",
    warn: bool = True,
) -> dict[str, nn.Parameter]:
    """Return the parameters that the patterns name, by qualified name and in the module's own order.

    A pattern is a glob over qualified names. One that matches a module takes the module's `weight`, or its own matrices
    called weights, such as `weight_ih_l0` of an LSTM and `in_proj_weight` of an attention; one that matches a
    parameter's full name takes that parameter. A pattern whose last part has a wildcard passes over vectors (biases,
    scales of norms) and empty parameters: these are taken only if the last part spells their name out. A parameter that
    two modules share is listed once.

    Args:
        module: The network, or the LightningModule that holds it.
        target: Patterns to take; `None` takes the weight of every linear layer and convolution, which callbacks limit
            to those that an optimizer of the fit trains at its start and that the code of `forward` reaches.
        exclude: Patterns to leave out, read by the same rules, vectors included.
        argument: Name of the constructor argument that `target` comes from, for messages.
        warn: Whether to warn of patterns that match nothing.

    Raises:
        ValueError: Nothing is left, a taken layer has no `weight` of its own (not built yet, or parametrized), or a
            taken parameter shares its memory with another one.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> list(select_parameters(net))
        ['0.weight', '3.weight']
        >>> list(select_parameters(net, ["3", "*.bias"], exclude="1.*"))
        ['0.bias', '3.weight', '3.bias']
    """
    parameters = dict(module.named_parameters())
    if target is None:
        wanted = _default(module, _as_list(exclude))
    else:
        wanted = _matching(module, _as_list(target), argument, warn=warn)
    left_out = _matching(module, _as_list(exclude), "exclude", warn=warn, vectors=True)
    chosen = {name: parameter for name, parameter in parameters.items() if name in wanted - left_out}
    if not chosen:
        raise ValueError(
            f"{argument}={target!r} with exclude={exclude!r} selects no parameter of {type(module).__name__}. Patterns "
            f"are globs over module names, such as {_some(_default_names(module)) or 'encoder.*'}."
        )
    for name, parameter in chosen.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is a lazy parameter without a shape: run one batch through the model first.")
        if parameter.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)} and no entries: leave it out of {argument}.")
    refuse_shared_memory(module, chosen)
    return chosen


def matched_parameters(module: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Return the names of all parameters, vectors included, that patterns name, or whose module they name.

    Example:
        >>> matched_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["1", "0.b*"])
        ['0.bias', '1.weight', '1.bias']
    """
    wanted = _as_list(patterns)
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if any(_matches(one, name.rpartition(".")[0], name) for one in wanted)]


def layer_weights(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of every layer's weight, by its name: the weight itself, or those it is computed from."""
    first_name = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, list[nn.Parameter]] = {}
    for name, child in module.named_modules():
        if is_weight_layer(child):
            weight = child._parameters.get("weight")
            if weight is None:
                found[_join(name, "weight")] = list(child.parameters())
            else:
                found.setdefault(first_name[id(weight)], [weight])
    return found


def check_computed(module: nn.Module, names: Iterable[str], exclude: str | Sequence[str] = ()) -> None:
    """Raise a ValueError for a layer's weight that is computed from other parameters, unless it is excluded."""
    parameters = dict(module.named_parameters())
    for name in names:
        layer = name.rpartition(".")[0]
        if name not in parameters and not any(_matches(one, layer, name) for one in _as_list(exclude)):
            raise ValueError(
                f"{layer or 'the model'} ({type(module.get_submodule(layer)).__name__}) computes its weight from other "
                f"parameters (a parametrization, weight norm or torch.nn.utils.prune): make it permanent first, or "
                f"exclude it."
            )


def refuse_sparse_gradients(module: nn.Module, names: Iterable[str], who: str) -> None:
    """Raise a ValueError if one of these parameters belongs to an embedding with sparse gradients.

    Args:
        module: The network.
        names: Qualified names of parameters.
        who: Name of the technique, for the message.
    """
    wanted = {id(parameter) for name, parameter in module.named_parameters() if name in set(names)}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse and id(layer.weight) in wanted:
            raise ValueError(
                f"{path or 'the model'} is an {type(layer).__name__}(sparse=True), whose gradients are sparse, and "
                f"{who} gives every weight a gradient: use sparse=False, or exclude it."
            )


def refuse_complex(module: nn.Module, names: Iterable[str], who: str) -> None:
    """Raise a ValueError if one of these parameters is complex: complex weights have neither an order nor signs.

    Args:
        module: The network.
        names: Qualified names of parameters.
        who: Name of the technique, for the message.
    """
    for name in names:
        parameter = module.get_parameter(name)
        if parameter.is_complex():
            raise ValueError(
                f"{name} is {parameter.dtype}, and {who} is for real weights: exclude it, or keep its real and "
                f"imaginary parts in two parameters."
            )


def has_entries(parameter: nn.Parameter) -> bool:
    """Whether a parameter has entries to compress; a lazy parameter counts, because it gets them later."""
    return isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.numel() > 0


def exact_patterns(names: Iterable[str]) -> list[str]:
    """Return patterns that match these parameters and no others.

    Example:
        >>> exact_patterns(["layer[0].weight"])
        ['layer[[]0].weight']
    """
    return [re.sub(r"([*?[])", r"[\1]", _plain(name)) for name in names]


def _default_names(module: nn.Module) -> list[str]:
    return [_plain(name) for name, child in module.named_modules() if is_weight_layer(child)]


def _default(module: nn.Module, exclude: Sequence[str]) -> set[str]:
    found = layer_weights(module)
    check_computed(module, found, exclude)
    return {name for name, (weight, *_) in found.items() if has_entries(weight)}


def _matches(pattern: str, module_name: str, full: str) -> bool:
    return fnmatchcase(_plain(module_name), pattern) or fnmatchcase(_plain(full), pattern)


def _matching(
    module: nn.Module, patterns: Iterable[str], argument: str, *, warn: bool, vectors: bool = False
) -> set[str]:
    first_name = {id(parameter): name for name, parameter in module.named_parameters()}
    chosen: set[str] = set()
    for pattern in patterns:
        by_wildcard = bool(_WILDCARDS & set(pattern.rpartition(".")[2]))
        found = set()
        for module_name, child in module.named_modules(remove_duplicate=False):
            for short, parameter in child._parameters.items():
                if parameter is None:
                    continue
                full = _join(module_name, short)
                if fnmatchcase(_plain(full), pattern) or (
                    _is_weight_of(child, short, parameter) and fnmatchcase(_plain(module_name), pattern)
                ):
                    is_matrix = parameter.dim() > 1 and has_entries(parameter)
                    if vectors or not by_wildcard or is_matrix:
                        found.add(first_name[id(parameter)])
        if not found and warn:
            warnings.warn(
                f"{argument} pattern {pattern!r} matches no parameter of {type(module).__name__}; it has layers "
                f"such as {_some(_default_names(module)) or 'none that are linear or convolutions'}.",
                stacklevel=3,
            )
        chosen |= found
    return chosen


def _is_weight_of(module: nn.Module, short: str, parameter: nn.Parameter) -> bool:
    if module._parameters.get("weight") is not None:
        return short == "weight"
    return "weight" in short and parameter.dim() > 1


def _join(module_name: str, parameter_name: str) -> str:
    return f"{module_name}.{parameter_name}" if module_name else parameter_name


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3])


def _as_list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
