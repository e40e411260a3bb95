"""A site is what one decision replaces: a layer, or an embedding with the output matrix that has its weight."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.low_rank.costs import Costs, Shapes, costs_of
from lightning_compress.low_rank.forms import FORMS, LowRankForm, conv_like
from lightning_compress.low_rank.splits import Moments, Splits
from lightning_compress.replacement.layer import LayerShape, LinearMap

Method = Literal["auto", "channel", "spatial", "tucker"]
METHODS = get_args(Method)
META = torch.device("meta")
Chosen = tuple[type[LowRankForm], dict[str, int], dict[str, Tensor]]  # a form, its numbers, the values of its parts


@dataclass(frozen=True)
class Seen:
    """A layer, the shapes of its inputs in a pass, and the moments of what it read."""

    layer: LinearMap
    shapes: Shapes
    moments: Sequence[Moments] | Tensor | None


class Site:
    """A layer that may become one of low rank.

    Attributes:
        name: The path of its layer.
        dense: What it costs now.
    """

    def __init__(self, name: str, seen: Seen, method: Method = "auto") -> None:
        self.name, self.seen, self.method = name, seen, method
        self.sizes = seen.layer.sizes
        self.splits = Splits(seen.layer, seen.moments)
        self.dense = costs_of([dense_layer(on_device(self.sizes, META))], seen.shapes)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of its layers."""
        return (self.name,)

    def forms(self) -> list[str]:
        """Return the forms that it may take; of convolutions with a kernel those of the method."""
        fits = [form for form in ("linear", "embedding", *METHODS[1:]) if FORMS[form].refused(self.sizes) is None]
        return (
            fits if self.method == "auto" or self.sizes.kind != "conv" else [one for one in fits if one == self.method]
        )

    def why_not(self) -> str:
        """Return why it can take no form; "" if it can."""
        return "" if self.forms() else FORMS[self.method].refused(self.sizes) or ""

    def numbers(self, form: str) -> list[tuple[int, ...]]:
        """Return the numbers of a form that are considered."""
        return self.splits.numbers(form)

    def of_rank(self, form: str, rank: int) -> tuple[int, ...] | None:
        """Return the numbers of a form for one rank; None if that is more than it can have."""
        most = FORMS[form].most(self.sizes)
        return None if rank > max(most) else tuple(min(rank, one) for one in most)

    def lost(self, form: str, numbers: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the share of the variance of its outputs that it loses, for each of some numbers."""
        return self.splits.lost(form, numbers)

    def costs(self, form: str, numbers: tuple[int, ...]) -> Costs:
        """Return what it costs in a form."""
        return costs_of(self._parts(form, numbers, META).values(), self.seen.shapes)

    def values(self, form: str, numbers: tuple[int, ...]) -> dict[str, Chosen]:
        """Return what its layers become, by path."""
        return {self.name: (FORMS[form], named(form, numbers), self.splits.values(form, numbers))}

    def layers(self, form: str | None, numbers: tuple[int, ...]) -> nn.Module:
        """Return layers that cost what it costs in a form, with any values; None: what it costs as it is."""
        with random_state_of(self.sizes.device):
            if form is None:
                return dense_layer(self.sizes)
            return nn.Sequential(*self._parts(form, numbers, self.sizes.device).values())

    def inputs(self) -> list[Tensor]:
        """Return inputs of the shapes that it has seen, with any values."""
        of, generator = self.sizes, torch.Generator().manual_seed(0)
        if of.kind == "embedding":
            return [torch.randint(of.inputs, shape, generator=generator).to(of.device) for shape in self.seen.shapes]
        return [torch.randn(shape, generator=generator).to(of.device, of.dtype) for shape in self.seen.shapes]

    def _parts(self, form: str, numbers: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
        return FORMS[form].parts(on_device(self.sizes, device), named(form, numbers))


def named(form: str, numbers: tuple[int, ...]) -> dict[str, int]:
    """Return the numbers of a form by name."""
    return dict(zip(FORMS[form].names, numbers, strict=True))


def on_device(of: LayerShape, device: torch.device) -> LayerShape:
    """Return the same sizes on another device."""
    return replace(of, device=device)


def dense_layer(of: LayerShape) -> nn.Module:
    """Return a plain layer of some sizes, with any values."""
    where: dict[str, Any] = {"dtype": of.dtype, "device": of.device}
    if of.kind == "embedding":
        return nn.Embedding(of.inputs, of.outputs, of.padding_idx, **where)
    if of.kind == "linear":
        return nn.Linear(of.inputs, of.outputs, of.bias, **where)
    return conv_like(of, of.inputs, of.outputs, of.kernel, of.stride, of.padding, of.dilation, bias=of.bias)


def random_state_of(device: torch.device) -> AbstractContextManager[None]:
    """Put torch's random state back after a block in which layers are made on a device."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
