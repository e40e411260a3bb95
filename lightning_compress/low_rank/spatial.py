"""The spatial split: a k x k convolution becomes a vertical one (k x 1) to r channels, then a horizontal one (1 x k).

The vertical filters are the best ones for strips of the input, W' = U_r U_r^T W as in `factors`; the horizontal ones
are the least squares on what the vertical ones see. Without a covariance this is plain SVD (Jaderberg et al. 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.low_rank.factors import even, principal
from lightning_compress.low_rank.nested import Nested, energy, mean_block


class SpatialSplit:
    """The spatial splits of one convolution without groups, for every rank.

    Args:
        weight: (O, I, height, width) in double precision.
        covariance: (I x height x width)^2, of the patches; None: plain SVD.

    Attributes:
        losses: (R + 1,): the outputs' expected squared change at rank 0 to R.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, covariance: Tensor | None) -> None:
        n_out, n_in, height, width = weight.shape
        self.height = height
        patches = weight.permute(0, 3, 1, 2).reshape(n_out, -1)  # the column of the kernel outermost
        if covariance is not None:
            sizes = (n_in, height, width)
            covariance = covariance.reshape(*sizes, *sizes).permute(2, 0, 1, 5, 3, 4).reshape(covariance.shape)
        strips = patches.reshape(n_out * width, -1)  # (O x width, I x height)
        basis = principal(strips, None if covariance is None else mean_block(covariance, width)).basis
        self.features = basis.T @ strips
        start = basis.reshape(n_out, width, -1).transpose(1, 2)
        self.nested = Nested(patches, self.features, covariance, start)
        explained = self.nested.explained.square().sum(1).reshape(-1, width).sum(1).cumsum(0)
        total = energy(patches, covariance)
        self.losses = torch.cat([total[None], (total - explained).clamp_(min=0)])

    @torch.no_grad()
    def parts(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the weights of both convolutions: (r, I, height, 1) and (O, r, 1, width)."""
        rest = self.nested.rest(rank)
        n_out, _, width = rest.shape
        first, second = even(self.features[:rank], rest.transpose(1, 2).reshape(-1, rank))
        horizontal = second.reshape(n_out, width, rank).transpose(1, 2)
        return first.reshape(rank, -1, self.height, 1), horizontal.reshape(n_out, rank, 1, width)
