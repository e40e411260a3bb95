"""Numbers by patterns of names: how many clusters, or bits, each parameter gets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_compress.core.select import select_parameters


def numbers_by_name(
    module: nn.Module,
    numbers: int | Mapping[str, int | None],
    *,
    target: str | Sequence[str] | None = None,
    default: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    argument: str,
    done: str,
    leaving: str,
) -> dict[str, int]:
    """Return the number of each parameter, by name; what gets 0 or None is left out.

    Args:
        module: The network.
        numbers: One for all, or `{pattern: number}`, patterns as in `target`, of which the first that matches counts.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution, or
            what the patterns of `numbers` name.
        default: Patterns in the place of "every linear layer and convolution".
        exclude: Patterns to leave out.
        argument: What messages call the numbers,
        done: what parameters without one are not,
        leaving: and the number that leaves a parameter as it is.

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
    first: dict[str, int | None] = {}
    for pattern, number in numbers.items():
        for name in _quietly(module, pattern):
            first.setdefault(name, number)
    if unnamed := [name for name in considered if name not in first]:
        warnings.warn(
            f"Not {done}, because no pattern of {argument}={dict(numbers)} names them: {', '.join(unnamed)}. Add a "
            f"pattern ({leaving}: leave it), or exclude them.",
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
