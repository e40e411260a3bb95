"""The Tucker-2 split: 1 x 1 to r1 channels, the kernel from r1 to r2 channels, then 1 x 1 to the outputs.

It begins as the higher-order SVD does, and goes on as HOOI: the r1 directions of the inputs are the best ones for the
r2 directions of the outputs, and the other way round. Both are the closed form of `factors`, so that a covariance of
the inputs is minded; what follows the r1 channels is the least squares on what they see, of rank r2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.low_rank.factors import Principal, principal
from lightning_compress.low_rank.nested import Nested, energy, mean_block


class TuckerSplit:
    """The Tucker-2 splits of one convolution without groups, for every pair of ranks.

    Args:
        weight: (O, I, *kernel) in double precision.
        covariance: (I x kernel)^2, of the patches; None: the identity.

    Attributes:
        most: The highest first rank.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, covariance: Tensor | None) -> None:
        n_out, self.n_in, *self.kernel = weight.shape
        self.taps = math.prod(self.kernel)
        self.patches = weight.reshape(n_out, self.n_in, -1).transpose(1, 2).reshape(n_out, -1)  # the tap outermost
        if covariance is not None:
            sizes = (self.n_in, self.taps)
            covariance = covariance.reshape(*sizes, *sizes).permute(1, 0, 3, 2).reshape(covariance.shape)
        self.covariance = covariance
        self.of_pixel = None if covariance is None else mean_block(covariance, self.taps)
        self.total = energy(self.patches, covariance)
        self.begun = self._begin(self.patches)
        self.most = len(self.begun[0])

    def _begin(self, directions: Tensor, rank: int | None = None) -> tuple[Tensor, Nested]:
        """Return the best directions of the inputs for some directions of the outputs, and what follows them."""
        by_tap = directions.reshape(-1, self.n_in)
        basis = principal(by_tap, self.of_pixel).basis[:, :rank]
        inputs = torch.linalg.qr((basis.T @ by_tap).T)[0].T
        start = torch.einsum("oti,ri->ort", self.patches.reshape(len(self.patches), -1, self.n_in), inputs)
        return inputs, Nested(self.patches, inputs, self.covariance, start)

    def _of_outputs(self, nested: Nested, rank: int) -> tuple[Tensor, Principal, Tensor]:
        """Return what follows the first inputs, the directions of its outputs, and the loss for each second rank."""
        size = rank * self.taps
        rest = nested.rest(rank).reshape(len(self.patches), size)
        found = principal(rest, nested.gram[:size, :size])
        unexplained = (self.total - nested.explained[:size].square().sum()).clamp_(min=0)
        return rest, found, found.losses + unexplained

    @torch.no_grad()
    def losses(self, first: int) -> Tensor:
        """Return the outputs' expected squared change for a first rank and each second rank from 0, before HOOI."""
        return self._of_outputs(self.begun[1], first)[2]

    @torch.no_grad()
    def parts(self, first: int, second: int, rounds: int = 2) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return the weights of the three convolutions, the best of a few rounds of HOOI, and the loss.

        Returns:
            (r1, I, 1, ...), (r2, r1, *kernel), (O, r2, 1, ...), and the outputs' expected squared change.
        """
        inputs, nested = self.begun
        best: tuple[Tensor, Tensor, Tensor, float] | None = None
        for turn in range(rounds + 1):
            rest, found, losses = self._of_outputs(nested, first)
            outputs, loss = found.basis[:, :second], float(losses[second])
            if best is None or loss < best[-1]:
                best = (inputs[:first], outputs.T @ rest, outputs, loss)
            if second * self.taps < first:
                break  # so few outputs have fewer directions of inputs
            if turn < rounds:
                inputs, nested = self._begin(outputs.T @ self.patches, first)
        assert best is not None
        reduce, core, expand, loss = best
        lengths = [float(part.norm()) for part in best[:3]]
        scale = math.prod(lengths) ** (1 / 3) if min(lengths) > 0 else 1.0
        reduce, core, expand = (
            part * (scale / length if length > 0 else 1.0) for part, length in zip(best[:3], lengths, strict=True)
        )
        ones = [1] * len(self.kernel)
        return (
            reduce.reshape(first, self.n_in, *ones),
            core.reshape(second, first, *self.kernel),
            expand.reshape(-1, second, *ones),
            loss,
        )
