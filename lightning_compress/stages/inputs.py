"""The inputs of a network, which must be like those that it was cut with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Inputs:
    """The structure of example inputs, and the leaves of others like them.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        has_samples: For each leaf, whether its first dimension is the batch.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], has_samples: Sequence[bool]) -> None:
        self.leaves, self._spec = tree_flatten((args, dict(kwargs)))
        self._keywords, self.has_samples = tuple(kwargs), tuple(has_samples)
        self._is_flat = not kwargs and all(isinstance(one, Tensor) for one in args)

    def forget_tensors(self) -> None:
        """Keep no tensors, which would stay on the device where they are."""
        self.leaves = [None if isinstance(one, Tensor) else one for one in self.leaves]

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with these leaves."""
        args, kwargs = tree_unflatten(list(leaves), self._spec)
        return args, kwargs

    def checked(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], examples: Sequence[Any]
    ) -> tuple[list[Any], int]:
        """Return the leaves of inputs, and the number of samples.

        Raises:
            ValueError: They differ from the examples in more than the number of samples.
        """
        if self._is_flat and not kwargs and len(args) == len(examples) and all(isinstance(one, Tensor) for one in args):
            leaves = list(args)
        else:
            ordered = {name: kwargs[name] for name in self._keywords if name in kwargs} | dict(kwargs)
            leaves, spec = tree_flatten((args, ordered))
            if spec != self._spec:
                expected = self.arguments(examples)
                raise ValueError(
                    f"The inputs are {_structure(args, kwargs)}, and those of the example were "
                    f"{_structure(*expected)}: pass the same arguments."
                )
        numbers = set()
        for leaf, example, has_samples in zip(leaves, examples, self.has_samples, strict=True):
            if not isinstance(example, Tensor):
                if isinstance(leaf, Tensor) or leaf != example:
                    raise ValueError(f"An input is {_said(leaf)}, and was {example!r} in the example.")
                continue
            first = int(has_samples)
            if (
                not isinstance(leaf, Tensor)
                or leaf.dim() != example.dim()
                or leaf.shape[first:] != example.shape[first:]
                or leaf.dtype != example.dtype
            ):
                raise ValueError(
                    f"An input is {_said(leaf)}, and was {_said(example)} in the example: only the number of samples, "
                    f"which is the first size, may differ."
                )
            if has_samples:
                numbers.add(leaf.shape[0])
        if len(numbers) > 1:
            raise ValueError(f"The inputs have different numbers of samples: {', '.join(map(str, sorted(numbers)))}.")
        return leaves, numbers.pop()


def _said(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)} and type {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)


def _structure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named = f" and {', '.join(map(repr, kwargs))}" if kwargs else ""
    return f"{len(args)} positional{named}"
