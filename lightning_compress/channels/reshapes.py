"""Adapt reshapes whose sizes are written in a module's own code to the sizes that are left after a cut.

Window attention asks for (windows, places, 3, heads, width), with numbers that its code computes from the width of the
input: after a cut of heads or of their width the tensor holds less than that. Such a module notes, as an attribute,
what its code asks for and what there is, and a reshape that would fail gets the latter:

    reshape_3_to_x_x_x_3_x = (1, 1, 1, 2, 1)     of 3 dimensions to 5; where the code asks for 3, there are 2

A reshape that names all its sizes and fits is left alone, and nothing changes while nothing is cut. The network's own
class stays what it is: sizes in its own forward freeze what they name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
MOST = 12  # of one module
_RESHAPES = (Tensor.view, Tensor.reshape, torch.reshape)

Sizes = tuple[int, ...]


def is_reshape(name: str) -> bool:
    """Whether an attribute's name says what a reshape asks for."""
    return _NAME.fullmatch(name) is not None


class Pattern(NamedTuple):
    """What a reshape asks for: the number of dimensions that it takes, and the sizes, -1 standing for any."""

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
        """What a module notes before a cut: what its code asks for, and 1 for what is left to it."""
        return tuple(max(size, 1) for size in self.sizes)

    def matches(self, takes: int, asked: Sizes) -> bool:
        """Whether a reshape may be this one."""
        alike = self.takes == takes and len(self.sizes) == len(asked)
        return alike and all(a == -1 or (type(b) is int and a == b) for a, b in zip(self.sizes, asked, strict=True))


def prepare(model: nn.Module, attributes: Iterable[Attribute]) -> list[Callable[[], None]]:
    """Have modules record their reshapes before any cut; return a function that undoes it."""
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
    """Give a module the forward that corrects the sizes of its reshapes; return a function that undoes it."""
    before = type(module)
    if issubclass(before, Adapted):
        return []
    module.__class__ = _adapted(before)  # type: ignore[arg-type]
    return [partial(setattr, module, "__class__", before)]


class Adapted(nn.Module):
    """What a module's class is mixed with whose reshapes get other sizes than its code asks for."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its function mode breaks the graph anyway
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's own class."""
        if (leaf := leaf_of(self, args, kwargs)) is not None:
            return leaf
        with _Reshapes({} if Solving.active else _noted(self)):
            return super().forward(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script would read the sizes in the code of {type(self).__name__}, which are those of before "
            "the cut. Use torch.export.export or torch.jit.trace."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__bases__[1],), vars(self)


@cache  # one class for each, so that two modules of one class stay so
def _adapted(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (Adapted, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Make a module without its attributes, which pickle sets."""
    adapted = _adapted(kind)  # type: ignore[arg-type]
    return adapted.__new__(adapted)


def _noted(module: nn.Module) -> dict[Pattern, Sizes]:
    """By what a reshape asks for, what is there; -1 for what is left to the code."""
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
        if func in _RESHAPES and not kwargs and (sizes := _sizes(args[1:])) and _may_miss(args[0], sizes):
            args = args[0], _given(args[1:], sizes, corrected(sizes, self._left, args[0]))
        return func(*args, **(kwargs or {}))


def corrected(asked: Sizes, left: Mapping[Pattern, Sizes], tensor: Tensor) -> Sizes:
    """What is there in place of what a reshape asks for: as much as can be of what is noted, so that the tensor fits.

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


def _sizes(args: tuple[Any, ...]) -> Sizes:
    """The sizes that a reshape asks for, which are tensors in torch.jit.trace; none if it asks for a type."""
    sizes = _flat(args)
    plain = all(isinstance(one, int | Tensor | torch.SymInt) for one in sizes)
    return tuple(int(one) if isinstance(one, Tensor) else one for one in sizes) if plain else ()


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args


def _given(args: tuple[Any, ...], asked: Sizes, there: Sizes) -> tuple[Any, ...]:
    """What is there, where it is what was asked for as it was asked for."""
    return tuple(
        given if old is new or (type(new) is int and old == new) else new
        for given, old, new in zip(_flat(args), asked, there, strict=True)
    )


def _fits(tensor: Tensor, sizes: Sizes) -> bool:
    known = math.prod(size for size in sizes if size >= 0)
    return tensor.numel() % max(known, 1) == 0 if -1 in sizes else tensor.numel() == known


def _may_miss(tensor: Tensor, sizes: Sizes) -> bool:
    """Whether the sizes are perhaps not what is there: one that is left open may take up what the others miss."""
    return -1 in sizes or not _fits(tensor, sizes)


class Seen:
    """A reshape in a module's dense code: how many dimensions it takes, what it makes, and the nodes along these."""

    def __init__(self, takes: int, shape: Sizes, nodes: Mapping[int, Tensor]) -> None:
        self.takes, self.shape, self.nodes = takes, shape, nodes


class Solving(TorchFunctionMode):
    """Runs a cut network; reshapes that fail get what the graph says is left, and what they needed is noted.

    Args:
        model: The network.
        seen: By module, the reshapes of its dense code.
        removed: By node, whether it is cut.
    """

    active: ClassVar[bool] = False  # what modules note of an earlier cut is its business then

    def __init__(self, model: nn.Module, seen: Mapping[str, Sequence[Seen]], removed: Tensor) -> None:
        super().__init__()
        self._model, self._seen, self._removed = model, seen, removed
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self.needed: dict[tuple[str, Pattern], Seen] = {}  # by module and what it asks for

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know whose forward runs."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._stack.append(module)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            self._stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        Solving.active = True
        try:
            with self:
                yield
        finally:
            Solving.active = False
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RESHAPES and not kwargs and (sizes := _sizes(args[1:])) and _may_miss(args[0], sizes):
            args = args[0], self._solved(args[0], sizes)
        return func(*args, **(kwargs or {}))

    def _solved(self, tensor: Tensor, asked: Sizes) -> Sizes:
        module = self._stack[-1] if self._stack else self._model
        path = self._paths.get(id(module), "")
        found: dict[Sizes, tuple[Pattern, Seen]] = {}
        for one in self._seen.get(path, ()):
            if module is self._model or one.takes != tensor.dim() or len(one.shape) != len(asked):
                continue
            full = torch.empty([math.prod(one.shape), *[1] * (one.takes - 1)], device="meta")
            before = corrected(asked, _noted(module), full)  # what it found before this cut
            if any(a not in (-1, b) for a, b in zip(before, one.shape, strict=True)):
                continue
            gone = {dim: int(self._removed[nodes].sum()) for dim, nodes in one.nodes.items()}
            there = tuple(size - gone.get(dim, 0) for dim, size in enumerate(one.shape))
            cut = [size if gone.get(dim, 0) and size >= 0 else -1 for dim, size in enumerate(asked)]
            if math.prod(there) == tensor.numel():
                found[there] = Pattern(one.takes, tuple(cut)), one
        if len(found) != 1:
            return corrected(asked, _noted(module), tensor)
        ((there, (pattern, one)),) = found.items()
        if max(pattern.sizes) >= 0:
            self.needed[path, pattern] = one
        return there


def attributes_needed(needed: Mapping[tuple[str, Pattern], Seen], unit_of: Tensor, size: int) -> list[Attribute]:
    """The reshapes that were needed as attributes of a group.

    Args:
        needed: What `Solving` noted.
        unit_of: By node the unit of the group, -1 for others.
        size: How many units the group has.
    """
    found = []
    for (module, pattern), one in needed.items():
        for dim in (dim for dim, asked in enumerate(pattern.sizes) if asked >= 0):
            units = unit_of[one.nodes[dim]]
            each = torch.bincount(units[units >= 0], minlength=size)
            if int(each.min()) == int(each.max()):
                order = torch.argsort(units, stable=True)[int((units < 0).sum()) :]
                found.append(Attribute(module, pattern.name, dim, order.reshape(size, -1)))
    return found
