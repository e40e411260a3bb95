"""An embedding and an output matrix of one weight E, which go on sharing the factor that is as long as E is.

The shared directions are the best ones for the sum of what both lose, each as a share: the top eigenvectors of E (C /
a + I / b) E^T, where C is the covariance of what the output matrix reads, and a and b are its energy and that of the
embedding. The short factor is each one's own: for the output matrix U^T E, and for the embedding the least squares on
U for how often its entries are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_compress.low_rank.costs import Costs, costs_of
from lightning_compress.low_rank.factors import even, exact, principal
from lightning_compress.low_rank.forms import FORMS, LowRankForm
from lightning_compress.low_rank.nested import energy
from lightning_compress.low_rank.ranks import rank_grid
from lightning_compress.low_rank.sites import META, Chosen, Seen, Site
from lightning_compress.replacement.find import Layer
from lightning_compress.replacement.layer import dense_layer

_FORM, _OUTPUT = "tied_embedding", "tied_linear"
_TINY, _RIDGE = 1e-300, 1e-12


class TiedSite(Site):
    """An embedding and the output matrix that has its weight.

    Args:
        embedding: The path of the embedding, and what was seen of it.
        output: That of the output matrix.
    """

    @torch.no_grad()
    def __init__(self, embedding: tuple[str, Seen], output: tuple[str, Seen]) -> None:
        super().__init__(*embedding)
        self.output, self.seen_by_output = output
        layer, moments = self.seen_by_output.layer.map, self.seen_by_output.moments
        self.weight = weight = exact(self.seen.layer.map.weight)
        self.mean: Tensor | None = None
        spread = torch.eye(weight.shape[1]).to(weight)
        if moments is not None:
            assert not isinstance(moments, Tensor)
            mean, spread = exact(moments[0].mean).to(weight), exact(moments[0].covariance).to(weight)
            if layer.bias is None:
                spread = spread + torch.outer(mean, mean)
            else:
                self.mean = mean
        shares = self.seen.moments
        assert shares is None or isinstance(shares, Tensor)
        self.shares = torch.ones(len(weight)).to(weight) if shares is None else exact(shares).to(weight)
        self.spread, self.energy = spread, energy(weight, spread).clamp_(min=_TINY)
        self.dense = costs_of(self._of_output(None, META), self.seen_by_output.layer.inputs)  # which has all parameters
        self._lost: dict[tuple[int, ...], float] = {}

    def forms(self) -> list[str]:
        return [_FORM]

    def numbers(self, form: str) -> list[tuple[int, ...]]:
        return [(rank,) for rank in rank_grid(FORMS[_FORM].most(self.sizes)[0])]

    @torch.no_grad()
    def lost(self, form: str, numbers: Sequence[tuple[int, ...]]) -> list[float]:
        if not self._lost:
            basis = self._basis
            weight = self.weight
            of_output = ((basis.T @ weight @ self.spread) * (basis.T @ weight)).sum(1).cumsum(0) / self.energy
            root, common = self._least_squares(basis)
            explained = torch.linalg.solve_triangular(root, common, upper=False).square().sum(1).cumsum(0)
            of_embedding = explained / (self.shares @ weight.square().sum(1)).clamp_(min=_TINY)
            kept = (of_output.clamp_(0, 1) * of_embedding.clamp_(0, 1)).tolist()  # the losses, - log, add up
            self._lost = {(rank + 1,): 1 - share for rank, share in enumerate(kept)}
        return [self._lost[one] for one in numbers]

    @torch.no_grad()
    def values(self, form: str, numbers: tuple[int, ...]) -> dict[str, Chosen]:
        (rank,), weight = numbers, self.weight
        basis = self._basis[:, :rank]
        narrow, tall = even(basis.T @ weight, basis)
        root, common = self._least_squares(tall)
        layer = self.seen_by_output.layer.map
        of_embedding = torch.cholesky_solve(common - root @ root.T @ narrow, root) + narrow
        output = {"first.weight": narrow, "second.weight": tall}
        if layer.bias is not None:
            bias = exact(layer.bias).to(weight)
            output["second.bias"] = bias if self.mean is None else bias + (weight - tall @ narrow) @ self.mean
        found = {
            self.name: (_FORM, {"first.weight": tall, "second.weight": of_embedding.T}),
            self.output: (_OUTPUT, output),
        }
        return {
            path: (FORMS[one], {"rank": rank}, {name: value.to(layer.weight) for name, value in some.items()})
            for path, (one, some) in found.items()
        }

    def costs(self, form: str, numbers: tuple[int, ...]) -> Costs:
        embedding = costs_of(self._parts(form, numbers, META).values(), self.seen.layer.inputs)
        output = costs_of(self._of_output(numbers, META), self.seen_by_output.layer.inputs)
        together = embedding.parameters + output.parameters - len(self.weight) * numbers[0]
        return Costs(together, embedding.macs + output.macs)

    def timed(self) -> Layer:
        """Return the output matrix, beside which looking up entries takes no time."""
        return self.seen_by_output.layer

    def timed_as(self, form: str, numbers: tuple[int, ...]) -> tuple[type[LowRankForm], dict[str, int]]:
        return FORMS[_OUTPUT], {"rank": numbers[0]}

    @cached_property
    def _basis(self) -> Tensor:
        """The shared directions, the best first."""
        together = self.spread / self.energy
        together = together + torch.eye(len(together)).to(together) / self.weight.square().sum().clamp_(min=_TINY)
        return principal(self.weight, together).basis

    def _least_squares(self, tall: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of what the shared factor has in common with itself, and with the weight."""
        weighted = tall * self.shares[:, None]
        gram = tall.T @ weighted
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        return torch.linalg.cholesky(gram + ridge), weighted.T @ self.weight

    def _of_output(self, numbers: tuple[int, ...] | None, device: torch.device) -> list[nn.Module]:
        of = replace(self.seen_by_output.layer.map.sizes, device=device)
        if numbers is None:
            return [dense_layer(of)]
        return list(FORMS[_OUTPUT].parts(of, {"rank": numbers[0]}).values())
