"""Forms of replaced layers for tests, which are simpler than those of the rooms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.low_rank.record import LowRankStructure
from lightning_compress.replacement.find import find_layers
from lightning_compress.replacement.layer import LayerShape, linear_map
from lightning_compress.replacement.plan import Plan, Replacement
from lightning_compress.replacement.record import note_replaced
from lightning_compress.replacement.statistics import gather_statistics
from lightning_compress.replacement.swap import Replaced, swap
from lightning_compress.trainer.replacing import ReplacingCallback


class TwoParts(Replaced):
    """A linear layer, convolution or embedding as two: the first one does everything, at a rank."""

    form = "two_parts"
    shares: ClassVar = {"first.weight": "entries"}

    @classmethod
    def check(cls, of: LayerShape, numbers: Mapping[str, Any]) -> None:
        rank, most = numbers["rank"], min(of.inputs * math.prod(of.kernel), of.outputs)
        if set(numbers) != {"rank"} or type(rank) is not int or not 1 <= rank <= most or of.groups != 1:
            raise ValueError(f"rank must be from 1 to {most}; got {rank!r}.")

    @classmethod
    def parts(cls, of: LayerShape, numbers: Mapping[str, Any]) -> dict[str, nn.Module]:
        where = {"dtype": of.dtype, "device": of.device}
        if of.kind == "embedding":
            first: nn.Module = nn.Embedding(of.inputs, numbers["rank"], of.padding_idx, **where)
            return {"first": first, "second": nn.Linear(numbers["rank"], of.outputs, bias=False, **where)}
        if of.kind == "linear":
            first = nn.Linear(of.inputs, numbers["rank"], bias=False, **where)
            return {"first": first, "second": nn.Linear(numbers["rank"], of.outputs, bias=of.bias, **where)}
        conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(of.kernel) - 1]
        first = conv(
            *(of.inputs, numbers["rank"], of.kernel, of.stride, of.padding, of.dilation),
            bias=False,
            padding_mode=of.padding_mode,
            **where,
        )
        return {"first": first, "second": conv(numbers["rank"], of.outputs, 1, bias=of.bias, **where)}

    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        first, second = self.first.weight, self.second.weight
        if self.of.kind == "embedding":
            return first @ second.t(), None
        return (second.flatten(1) @ first.flatten(1)).unflatten(1, first.shape[1:]), self.second.bias


class Mirrored(TwoParts):
    """A linear layer, whose weight an embedding may have, as `TwoParts` has the embedding's."""

    form = "mirrored"
    shares: ClassVar = {"second.weight": "entries"}


def factored(layer: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return the values of the two parts, by a plain SVD."""
    found = linear_map(layer)
    left, sizes, right = torch.linalg.svd(found.weight.flatten(1).double(), full_matrices=False)
    tall, wide = (left[:, :rank] * sizes[:rank]).to(found.weight), right[:rank].to(found.weight)
    if found.kind == "embedding":
        return {"first.weight": tall, "second.weight": wide.t()}
    values = {
        "first.weight": wide.unflatten(1, found.weight.shape[1:]),
        "second.weight": tall[(..., *[None] * (found.weight.dim() - 2))],
    }
    return values | ({} if found.bias is None else {"second.bias": found.bias})


@contextmanager
def recorded_forms() -> Iterator[None]:
    """Let records of low rank have these forms, and only these."""
    with patch.object(LowRankStructure, "forms", {one.form: one for one in (TwoParts, Mirrored)}):
        yield


class Replacing(ReplacingCallback):
    """Replaces layers at given ranks, whose values are weighted by what the layers see."""

    kind = "low_rank"

    def __init__(self, ranks: Mapping[str, int], *, n_batches: int = 2, network: str = "") -> None:
        super().__init__(ranks=dict(ranks), n_batches=n_batches, network=network)
        self.ranks, self.n_batches, self.network, self.example_inputs = dict(ranks), n_batches, network, None
        self.planned = 0

    def plan(self, network: nn.Module, example_inputs: ExampleInputs, batches: Sequence[ExampleInputs]) -> Plan:
        self.planned += 1
        torch.rand(1)  # moves no generator of the fit
        found = find_layers(network, example_inputs)
        if missing := self.ranks.keys() - found.layers.keys():
            raise ValueError(f"{min(missing)} can't be replaced: {found.refused[min(missing)]}.")
        seen = gather_statistics(network, self.ranks, batches) if batches else {}
        made = {}
        for path, rank in self.ranks.items():
            values = factored(network.get_submodule(path), rank)
            if "second.bias" in values and path in seen:
                values["second.bias"] = values["second.bias"] + seen[path].mean.sum().float()
            made[path] = Replacement(TwoParts, {"rank": rank}, values)
        return Plan(made)


def replace(network: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replace layers of a network, for good, by their best approximation."""
    for path, rank in ranks.items():
        layer = network.get_submodule(path)
        swap(layer, TwoParts, {"rank": rank}, factored(layer, rank))
        note_replaced(layer, "low_rank")
    return network
