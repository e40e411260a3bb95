"""Hooks that quantize the inputs of layers to an affine grid of a few bits.

    x~ = scale * (q - z),  q = clamp(round(x / scale) + z, 0, 2^bits - 1)

All entries of an input share one scale and one zero point z. 0 is always a point of the grid, so padding stays exact.
The gradient passes straight through where q was not clamped, and is 0 elsewhere.
Jacob et al. 2018 (arXiv 1712.05877), sections 2.1 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.answering import way_of
from lightning_compress.core.input_hooks import InputHook, InputHooks, input_hook
from lightning_compress.quantization.grids import check_bits


@dataclass(frozen=True)
class InputGrid:
    """The grid of one layer's input: x~ = scale * (q - zero_point), q = 0 ... 2^bits - 1.

    Args:
        scale: The distance between neighbouring points, above 0.
        zero_point: The q at which x~ is 0.
        bits: The bits of q, 2 to 8.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> InputGrid(scale=0.5, zero_point=1, bits=2).levels()
        [-0.5, 0.0, 0.5, 1.0]
    """

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        if not 0 <= self.zero_point < 2**self.bits:
            raise ValueError(
                f"zero_point must be from 0 to {2**self.bits - 1} with {self.bits} bits; got {self.zero_point!r}."
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0; got {self.scale!r}.")

    @classmethod
    def covering(cls, low: float, high: float, bits: int) -> InputGrid:
        """Return the grid that covers `low`, `high` and 0.

        Args:
            low: The smallest input.
            high: The largest input.
            bits: The bits of the grid, 2 to 8.

        Example:
            >>> InputGrid.covering(-1.0, 2.0, 2)
            InputGrid(scale=1.0, zero_point=1, bits=2)
        """
        scale, zero_point = affine(torch.tensor(low), torch.tensor(high), bits)
        return cls(float(scale), int(zero_point), bits)

    def levels(self) -> list[float]:
        """Return the points of the grid, ascending."""
        return [self.scale * (q - self.zero_point) for q in range(2**self.bits)]


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scales and the zero points, in float32, of the grids that cover low, high and 0.

    If low and high are both 0, the scale is 1.

    Args:
        low: The smallest inputs, in any shape.
        high: The largest inputs, in the same shape.
        bits: The bits of the grids.

    Example:
        >>> affine(torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 3.0]), 2)
        (tensor([1., 1.]), tensor([1., 0.]))
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (low.abs() / scale).round()


class _OnGrid(torch.autograd.Function):
    """Computes x~ and a mask of the entries that were not clamped; only these pass the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> tuple[Tensor, Tensor]:
        q = x.to(torch.promote_types(x.dtype, torch.float32)).div(scale).round_().add_(zero_point)
        clamped = q.clamp(0, top)
        return clamped.sub(zero_point).mul_(scale).to(x.dtype), clamped == q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return x quantized to a grid, in its own dtype; the gradient passes straight through where x is not clamped.

    Args:
        x: A tensor of any shape.
        scale: The scale, a tensor of one number.
        zero_point: The zero point, a tensor of one whole number.
        bits: The bits of the grid, which has 2^bits points.

    Example:
        >>> x = torch.tensor([-3.0, -0.4, 0.2, 0.3, 5.0], requires_grad=True)
        >>> y = on_grid(x, torch.tensor(0.5), torch.tensor(1.0), 2); y.data
        tensor([-0.5000, -0.5000,  0.0000,  0.5000,  1.0000])
        >>> y.sum().backward(); x.grad
        tensor([0., 1., 1., 1., 0.])
    """
    top = 2**bits - 1
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _OnGrid.forward(x, scale, zero_point, top)[0]
    quantized: Tensor = _OnGrid.apply(x, scale, zero_point, top)[0]  # type: ignore[no-untyped-call]
    return quantized


class InputQuantizer(InputHook):
    """A hook that quantizes a layer's input; as long as it has no grid, the input stays real.

    Args:
        bits: The bits of the grid.

    Attributes:
        bits: The bits of the grid.
        scale: The scale of the grid, as a tensor; None without a grid.
        zero_point: The zero point of the grid, as a tensor; None without a grid.
        ways: The scale and the zero point for each other way in which the network runs, such as "width 0.5", by the
            way's name: see `core.answering.way_of`. A way without a grid of its own has that of the network as it is.
    """

    kind = "grid"
    format = 2  # with "ways"
    ways: Mapping[str, tuple[Tensor, Tensor]] = {}

    def __init__(self, bits: int = 8) -> None:
        self.bits = bits
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None

    @property
    def grid(self) -> InputGrid | None:
        """The grid, or None as long as there is none."""
        if self.scale is None or self.zero_point is None:
            return None
        return InputGrid(float(self.scale), int(self.zero_point), self.bits)

    def set(self, grid: InputGrid | None) -> None:
        """Replace the grid, for every way of running the network; with None the input stays real."""
        self.ways = {}
        if grid is None:
            self.scale = self.zero_point = None
        else:
            self.bits = grid.bits
            self.scale, self.zero_point = _tensors(grid)

    def change(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.scale is None or self.zero_point is None:
            return x
        if self.scale.device != x.device:
            self.scale, self.zero_point = self.scale.to(x.device), self.zero_point.to(x.device)
            self.ways = {way: (scale.to(x.device), zero.to(x.device)) for way, (scale, zero) in self.ways.items()}
        scale, zero_point = self.scale, self.zero_point
        if self.ways:
            scale, zero_point = self.ways.get(way_of(layer), (scale, zero_point))
        return on_grid(x, scale, zero_point, self.bits)

    def settle(self, way: str) -> None:
        if self.scale is not None and self.zero_point is not None:
            self.scale, self.zero_point = self.ways.get(way, (self.scale, self.zero_point))
        self.ways = {}

    def record(self) -> dict[str, Any] | None:
        if (grid := self.grid) is None:
            return None
        ways = {way: [float(scale), int(zero_point)] for way, (scale, zero_point) in self.ways.items()}
        return asdict(grid) | ({"ways": ways} if ways else {})

    def take(self, record: Mapping[str, Any] | None) -> None:
        self.set(None if record is None else InputGrid(record["scale"], record["zero_point"], record["bits"]))
        given = {} if record is None else record.get("ways", {})
        grids = {way: InputGrid(scale, zero_point, self.bits) for way, (scale, zero_point) in given.items()}
        self.ways = {way: _tensors(grid) for way, grid in grids.items()}


def _tensors(grid: InputGrid) -> tuple[Tensor, Tensor]:
    return torch.tensor(grid.scale), torch.tensor(float(grid.zero_point))


def quantize_inputs(model: nn.Module, grids: Mapping[str, InputGrid]) -> InputHooks:
    """Put hooks on layers that quantize their inputs; copies and the state dict's metadata include the grids.

    Args:
        model: The network; its modules, parameters and keys stay the same.
        grids: The grid of each layer, by the layer's qualified name.

    Returns:
        The hooks; `remove()` takes them off.

    Raises:
        ValueError: The model has no layer of a given name.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False))
        >>> net[0].weight.data.fill_(1.0)
        tensor([[1.]])
        >>> handle = quantize_inputs(net, {"0": InputGrid(scale=0.5, zero_point=0, bits=2)})
        >>> net(torch.tensor([[0.6], [9.0]])).flatten().tolist(), list(input_grids(net))
        ([0.5, 1.5], ['0'])
        >>> handle.remove(); net(torch.tensor([[0.6]])).item()
        0.6000000238418579
    """
    layers = dict(model.named_modules())
    if unknown := [name for name in grids if name not in layers]:
        known = ", ".join(repr(name) for name in list(layers)[1:6])
        raise ValueError(
            f"grids: {type(model).__name__} has no layer {unknown[0]!r}. Give qualified names of its layers; the first "
            f"are {known or 'none'}."
        )
    handles = []
    for name, grid in grids.items():
        hook = InputQuantizer()
        hook.set(grid)
        handles += hook.attach(layers[name])
    return InputHooks(list(grids), handles)


def input_grids(model: nn.Module) -> dict[str, InputGrid]:
    """Return the grids of all quantized inputs, by the qualified name of the layer.

    Example:
        >>> input_grids(nn.Linear(2, 2))
        {}
    """
    found = {}
    for name, layer in model.named_modules():
        hook = input_hook(layer)
        if isinstance(hook, InputQuantizer) and hook.grid is not None:
            found[name] = hook.grid
    return found
