"""What a layer loses in each form and at each rank, and the weights with which it loses least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.low_rank.factors import Principal, even, exact, principal
from lightning_compress.low_rank.forms import FORMS
from lightning_compress.low_rank.nested import energy
from lightning_compress.low_rank.ranks import rank_grid
from lightning_compress.low_rank.spatial import SpatialSplit
from lightning_compress.low_rank.tucker import TuckerSplit
from lightning_compress.replacement.layer import LinearMap

_FIRST_RANKS = 8  # of Tucker splits, for each of which all second ranks are considered


@dataclass(frozen=True)
class Moments:
    """The mean and the covariance of the inputs of a layer, or of one of its groups.

    Attributes:
        mean: (n,), of the inputs, or of a convolution's unfolded patches.
        covariance: (n, n), about the mean.
    """

    mean: Tensor
    covariance: Tensor


class Splits:
    """All forms of one layer.

    Args:
        layer: The layer.
        moments: Those of the inputs of each group; or, of an embedding, the share of each entry (entries,). None: plain
            SVD.
    """

    def __init__(self, layer: LinearMap, moments: Sequence[Moments] | Tensor | None) -> None:
        self.layer, self.moments = layer, moments
        weight = exact(layer.weight)
        self.device = weight.device
        self.groups = list(weight.reshape(layer.groups, -1, *weight.shape[1:]))
        self.means: list[Tensor] | None = None
        spread: list[Tensor | None] = [None] * len(self.groups)
        if layer.kind == "embedding":
            shares = torch.ones(len(weight)) if moments is None else moments
            assert isinstance(shares, Tensor)
            spread = [weight.T @ (exact(shares).to(self.device)[:, None] * weight)]
        elif moments is not None:
            assert not isinstance(moments, Tensor)
            means = [exact(one.mean).to(self.device) for one in moments]
            about = [exact(one.covariance).to(self.device) for one in moments]
            if layer.bias is None:  # no bias can make up for a change of the mean
                about = [one + torch.outer(mean, mean) for one, mean in zip(about, means, strict=True)]
            else:
                self.means = means
            spread = list(about)
        self.spread = spread
        self.total = sum(
            float(self._unfolded(one).square().sum() if known is None else self._energy(one, known))
            for one, known in zip(self.groups, spread, strict=True)
        )
        self._losses: dict[str, dict[tuple[int, ...], float]] = {}

    def _unfolded(self, weight: Tensor) -> Tensor:
        return torch.eye(weight.shape[1]).to(weight) if self.layer.kind == "embedding" else weight.flatten(1)

    def _energy(self, weight: Tensor, spread: Tensor) -> Tensor:
        return energy(self._unfolded(weight), spread)

    def _solve(self, form: str) -> list[Any]:
        """Return what is known of every rank of a form, of each group; it is large, and made anew for each call."""
        kind = {"spatial": SpatialSplit, "tucker": TuckerSplit}.get(form)
        return [
            principal(self._unfolded(one), known) if kind is None else kind(one, known)
            for one, known in zip(self.groups, self.spread, strict=True)
        ]

    def numbers(self, form: str) -> list[tuple[int, ...]]:
        """Return the numbers of a form that are considered."""
        most = FORMS[form].most(self.layer.sizes)
        if form != "tucker":
            return [(rank,) for rank in rank_grid(most[0])]
        firsts = sorted({max(1, round(most[0] * k / _FIRST_RANKS)) for k in range(1, _FIRST_RANKS + 1)})
        pairs = itertools.product(firsts, rank_grid(most[1]))
        taps = math.prod(self.layer.sizes.kernel)  # a rank that is so much higher than the other one gains nothing
        return [(first, second) for first, second in pairs if first <= second * taps and second <= first * taps]

    def lost(self, form: str, numbers: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the share of the variance of the layer's outputs that is lost, for each of some numbers of a form."""
        known = self._losses.setdefault(form, {})
        if todo := [one for one in numbers if one not in known]:
            solved = self._solve(form)
            firsts = {one[0] for one in todo} if form == "tucker" else set()
            of_first = {first: [split.losses(first) for split in solved] for first in firsts}
            for one in todo:
                curves = of_first[one[0]] if form == "tucker" else [split.losses for split in solved]
                loss = sum(float(curve[min(one[-1], len(curve) - 1)]) for curve in curves)
                known[one] = min(max(loss / self.total, 0.0), 1.0) if self.total > 0 else 0.0
        return [known[one] for one in numbers]

    @torch.no_grad()
    def values(self, form: str, numbers: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the parameters of the parts, by name, in the type of the layer."""
        parts = [self._parts(form, numbers, *one) for one in zip(self.groups, self._solve(form), strict=True)]
        layer = self.layer
        names = FORMS[form].part_names
        found = {
            f"{name}.weight": torch.cat(of_groups)
            for name, of_groups in zip(names, zip(*parts, strict=True), strict=True)
        }
        if layer.bias is not None:
            bias = exact(layer.bias)
            if self.means is not None:
                shifts = [
                    (one.flatten(1) - FORMS[form].product(*some).flatten(1)) @ mean
                    for one, some, mean in zip(self.groups, parts, self.means, strict=True)
                ]
                bias = bias + torch.cat(shifts)
            found[f"{names[-1]}.bias"] = bias
        return {name: value.to(layer.weight) for name, value in found.items()}

    def _parts(self, form: str, numbers: tuple[int, ...], weight: Tensor, solved: Any) -> tuple[Tensor, ...]:
        """Return the weights of the parts of one group."""
        if form == "tucker":
            reduce, core, expand, _ = solved.parts(*numbers)
            return reduce, core, expand
        if form == "spatial":
            first, second = solved.parts(*numbers)
            return first, second
        assert isinstance(solved, Principal)
        basis = solved.basis[:, : numbers[0]]
        if self.layer.kind == "embedding":
            wide, tall = even(basis.T, weight @ basis)
            return tall, wide.T
        first, second = even(basis.T @ weight.flatten(1), basis)
        ones = [1] * (weight.dim() - 2)
        return first.reshape(-1, *weight.shape[1:]), second.reshape(*second.shape, *ones)
