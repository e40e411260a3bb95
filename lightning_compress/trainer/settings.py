"""The settings of a technique: the arguments of its constructor, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NO_SETTINGS = ("self", "__class__", "example_inputs")  # example inputs are data


def settings_of(constructor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings among the `locals()` of a constructor that has done nothing else yet.

    Sequences become lists and mappings become dicts, so that the `state_key` of a callback does not depend on whether
    Python, YAML or a command line gave them.

    Example:
        >>> class Technique:
        ...     def __init__(self, amount: float, *, target: Sequence[str] = (), example_inputs: Any = None) -> None:
        ...         print(settings_of(locals()))
        >>> technique = Technique(0.5, target=("conv*", "fc"))
        {'amount': 0.5, 'target': ['conv*', 'fc']}
    """
    return {name: _plain(value) for name, value in constructor.items() if name not in _NO_SETTINGS}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
