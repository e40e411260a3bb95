"""Name patterns to parameters: the one place that says what `target` and `exclude` mean."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_compress.core.memory import refuse_shared_memory

_COMPILED = "_orig_mod."  # what torch.compile puts into the names of a compiled submodule
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


def select_parameters(
    module: nn.Module,
    target: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] = (),
    argument: str = "target",
    warn: bool = True,
) -> dict[str, nn.Parameter]:
    """Return the parameters that the patterns name, by qualified name and in the module's own order.

    A pattern is a glob over qualified names. One that matches a module takes the module's `weight`; one that matches a
    parameter's full name takes that parameter. A pattern whose last part has a wildcard passes over vectors (biases,
    scales of norms): these are taken only when the last part spells them out. A parameter that two modules share is
    listed once.

    Args:
        module: The network, or the LightningModule that holds it.
        target: Patterns to take; `None` takes the weight of every linear layer and convolution.
        exclude: Patterns to leave out, read by the same rules, vectors included.
        argument: What messages call `target`.
        warn: Whether to warn of patterns that match nothing; not where that has been told before.

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
    wanted = _default(module) if target is None else _matching(module, _as_list(target), argument, warn=warn)
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
    refuse_shared_memory(module, chosen)
    return chosen


def _default_names(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, WEIGHT_LAYERS)]


def _default(module: nn.Module) -> set[str]:
    first_name = {id(parameter): name for name, parameter in module.named_parameters()}
    chosen = set()
    for name, child in module.named_modules():
        if not isinstance(child, WEIGHT_LAYERS):
            continue
        if "weight" not in child._parameters:
            raise ValueError(
                f"{name or 'the model'} ({type(child).__name__}) computes its weight from other parameters (a "
                f"parametrization, weight norm or torch.nn.utils.prune): make it permanent first, or exclude it."
            )
        chosen.add(first_name[id(child.weight)])
    return chosen


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
                by_module = short == "weight" and fnmatchcase(_plain(module_name), pattern)
                by_parameter = fnmatchcase(_plain(full), pattern)
                if by_module or by_parameter:
                    is_vector = parameter.dim() < 2
                    if vectors or not by_wildcard or not is_vector:
                        found.add(first_name[id(parameter)])
        if not found and warn:
            warnings.warn(
                f"{argument} pattern {pattern!r} matches no parameter of {type(module).__name__}; it has layers "
                f"such as {_some(_default_names(module)) or 'none that are linear or convolutions'}.",
                stacklevel=3,
            )
        chosen |= found
    return chosen


def _join(module_name: str, parameter_name: str) -> str:
    return f"{module_name}.{parameter_name}" if module_name else parameter_name


def _plain(name: str) -> str:
    return name.replace(_COMPILED, "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3])


def _as_list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
