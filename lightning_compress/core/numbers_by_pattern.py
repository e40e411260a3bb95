"""Numbers by patterns of names: how many clusters, or bits, each parameter gets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_compress.core.select import select_parameters

Number = TypeVar("Number", int, float)


def numbers_by_name(
    module: nn.Module,
    numbers: Number | Mapping[str, Number | None],
    *,
    target: str | Sequence[str] | None = None,
    default: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    argument: str,
    done: str,
    leaving: str,
) -> dict[str, Number]:
    """Return the number of each parameter, by name, without the parameters whose number is 0 or None.

    Args:
        module: The network.
        numbers: One number for all parameters, or `{pattern: number}`, of which the first pattern that matches counts.
        target: Patterns of modules (their `weight`) or parameters; None: the parameters that the patterns of `numbers`
            name, or, if it has none, those of `default`.
        default: Patterns, or None for every linear layer and convolution.
        exclude: Patterns to leave out.
        argument: Name of the constructor argument that `numbers` comes from, for messages.
        done: Participle of what is done to parameters with a number, such as "clustered", for messages.
        leaving: The number that leaves a parameter unchanged, for messages.

    Raises:
        ValueError: The patterns select nothing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
        >>> names = {"argument": "n_clusters", "done": "clustered", "leaving": "0"}
        >>> numbers_by_name(net, {"0": 256, "3": 0, "*": 32}, **names)
        {'0.weight': 256, '2.weight': 32}
    """
    if not isinstance(numbers, Mapping):
        chosen = select_parameters(module, default if target is None else target, exclude=exclude)
        return dict.fromkeys(chosen, numbers) if numbers else {}
    considered: Mapping[str, nn.Parameter]
    if target is None:
        chosen = select_parameters(module, list(numbers), exclude=exclude, argument=argument)
        considered = _quietly(module, default, exclude=exclude)
    else:
        considered = chosen = select_parameters(module, target, exclude=exclude)
    first: dict[str, Number | None] = {}
    for pattern, number in numbers.items():
        for name in _quietly(module, pattern):
            first.setdefault(name, number)
    if unnamed := [name for name in considered if name not in first]:
        warnings.warn(
            f"Not {done}, because no pattern of {argument}={dict(numbers)} names them: {', '.join(unnamed)}. Add a "
            f"pattern ({leaving} leaves parameters as they are), or exclude them.",
            stacklevel=2,
        )
    return {name: number for name in chosen if (number := first.get(name))}


def _quietly(
    module: nn.Module, target: str | Sequence[str] | None, *, exclude: str | Sequence[str] = ()
) -> Mapping[str, nn.Parameter]:
    """Select parameters without a warning for patterns that match nothing; the caller warns."""
    try:
        return select_parameters(module, target, exclude=exclude, warn=False)
    except ValueError:
        return {}
