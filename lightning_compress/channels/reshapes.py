"""Adapt the sizes that reshapes in a module's own code ask for to those that a cut leaves.

Window attention asks for (windows, places, 3, heads, width), with numbers that its code computes from the width of the
input. After a cut of heads or of their width the tensor holds less than that. Such a module gets an attribute: its name
has the sizes that the code asks for, and its value those that are left. A reshape that would fail gets the latter:

    reshape_3_to_x_x_x_3_x = (1, 1, 1, 2, 1)     a reshape of 3 dimensions to 5 asks for 3, where 2 are left

A reshape that names all its sizes and fits stays as it is, and so does every reshape of a dense network. The class of
the whole network is never adapted: channels whose number stands in its forward are frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import combinations
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.channels.attention import leaf_of
from lightning_compress.channels.groups import Attribute

_START = "reshape_"
_NAME = re.compile(rf"{_START}[1-9]\d?_to_(x|[1-9]\d{{0,8}})(_(x|[1-9]\d{{0,8}})){{0,15}}")
MOST = 12  # reshapes of one module
RESHAPES = (Tensor.view, Tensor.reshape, torch.reshape)

Sizes = tuple[int, ...]


def is_reshape(name: str) -> bool:
    """Return whether an attribute's name has the sizes that a reshape asks for."""
    return _NAME.fullmatch(name) is not None


class Pattern(NamedTuple):
    """A reshape: the number of dimensions of its input, and the sizes that it asks for, where -1 stands for any."""

    takes: int
    sizes: Sizes

    @classmethod
    def of(cls, name: str) -> Pattern:
        """Read an attribute's name.

        Example:
            >>> Pattern.of("reshape_4_to_x_x_96").name
            'reshape_4_to_x_x_96'
        """
        takes, _, sizes = name.removeprefix(_START).partition("_to_")
        return cls(int(takes), tuple(-1 if size == "x" else int(size) for size in sizes.split("_")))

    @property
    def name(self) -> str:
        """The attribute's name."""
        return f"{_START}{self.takes}_to_" + "_".join("x" if size < 0 else str(size) for size in self.sizes)

    @property
    def dense(self) -> Sizes:
        """The attribute's value before a cut: the sizes that the code asks for, and 1 in place of any."""
        return tuple(max(size, 1) for size in self.sizes)

    def matches(self, takes: int, asked: Sizes) -> bool:
        """Return whether a reshape with these sizes is of this pattern."""
        alike = self.takes == takes and len(self.sizes) == len(asked)
        return alike and all(a == -1 or (type(b) is int and a == b) for a, b in zip(self.sizes, asked, strict=True))


def prepare(model: nn.Module, attributes: Iterable[Attribute]) -> list[Callable[[], None]]:
    """Give modules the attributes for their reshapes, with the dense sizes; return functions that undo it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    undo: list[Callable[[], None]] = []
    for one in attributes:
        module = modules.get(one.module)
        if module is not None and is_reshape(one.name) and one.name not in vars(module):
            undo += adapt(module)
            setattr(module, one.name, Pattern.of(one.name).dense)
            undo.append(partial(delattr, module, one.name))
    return undo


def adapt(module: nn.Module) -> list[Callable[[], None]]:
    """Give a module a forward that corrects the sizes of its reshapes; return functions that undo it."""
    before = type(module)
    if issubclass(before, Adapted):
        return []
    module.__class__ = _adapted(before)  # type: ignore[arg-type]
    return [partial(setattr, module, "__class__", before)]


class Adapted(nn.Module):
    """Mixin for the class of a module whose reshapes get other sizes than its code asks for."""

    solved_by_trial: ClassVar[bool] = False  # a trial corrects the reshapes then

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile cannot trace the function mode
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's own class."""
        if (leaf := leaf_of(self, args, kwargs)) is not None:
            return leaf
        with _Reshapes({} if Adapted.solved_by_trial else sizes_left(self)):
            return super().forward(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script would read the sizes in the code of {type(self).__name__}, which are those of before "
            "the cut. Use torch.export.export or torch.jit.trace."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__bases__[1],), vars(self)


@cache  # modules of one class must stay of one class
def _adapted(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (Adapted, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Make an adapted module without attributes, which pickle then sets."""
    adapted = _adapted(kind)  # type: ignore[arg-type]
    return adapted.__new__(adapted)


def sizes_left(module: nn.Module) -> dict[Pattern, Sizes]:
    """Return by pattern the sizes that are left, with -1 where the code's own size stays."""
    found = {Pattern.of(name): sizes for name, sizes in vars(module).items() if is_reshape(name)}
    return {
        pattern: tuple(there if asked > 0 else -1 for asked, there in zip(pattern.sizes, sizes, strict=True))
        for pattern, sizes in found.items()
    }


class _Reshapes(TorchFunctionMode):
    def __init__(self, left: Mapping[Pattern, Sizes]) -> None:
        super().__init__()
        self._left = left

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in RESHAPES and not kwargs and (sizes := sizes_asked(args[1:])) and may_miss(args[0], sizes):
            args = args[0], _given(args[1:], sizes, corrected(sizes, self._left, args[0]))
        return func(*args, **(kwargs or {}))


def corrected(asked: Sizes, left: Mapping[Pattern, Sizes], tensor: Tensor) -> Sizes:
    """Replace as many of the sizes that a reshape asks for as can be, so that they fit the tensor.

    Example:
        >>> left = {Pattern(2, (-1, 3, -1)): (-1, 2, -1), Pattern(2, (-1, -1, 32)): (-1, -1, 16)}
        >>> corrected((8, 3, 32), left, torch.zeros(8, 2 * 16))
        (8, 2, 16)
    """
    noted = [sizes for pattern, sizes in left.items() if pattern.matches(tensor.dim(), asked)]
    for count in range(len(noted), 0, -1):
        there = {_with(asked, some) for some in combinations(noted, count)}
        fitting = [one for one in there if _fits(tensor, one)]
        if len(fitting) == 1:
            return fitting[0]
    return asked


def _with(asked: Sizes, noted: Iterable[Sizes]) -> Sizes:
    for sizes in noted:
        asked = tuple(old if new < 0 else new for old, new in zip(asked, sizes, strict=True))
    return asked


def sizes_asked(args: tuple[Any, ...]) -> Sizes:
    """Return the sizes that a reshape asks for; none if it asks for a type. In torch.jit.trace they are tensors."""
    sizes = _flat(args)
    plain = all(isinstance(one, int | Tensor | torch.SymInt) for one in sizes)
    return tuple(int(one) if isinstance(one, Tensor) else one for one in sizes) if plain else ()


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args


def _given(args: tuple[Any, ...], asked: Sizes, there: Sizes) -> tuple[Any, ...]:
    """Return the sizes that are left; an unchanged size stays the object that the code gave."""
    return tuple(
        given if old is new or (type(new) is int and old == new) else new
        for given, old, new in zip(_flat(args), asked, there, strict=True)
    )


def _fits(tensor: Tensor, sizes: Sizes) -> bool:
    known = math.prod(size for size in sizes if size >= 0)
    return tensor.numel() % max(known, 1) == 0 if -1 in sizes else tensor.numel() == known


def may_miss(tensor: Tensor, sizes: Sizes) -> bool:
    """Return whether the sizes may be wrong; an open size (-1) may hide that another one is."""
    return -1 in sizes or not _fits(tensor, sizes)
